"""The reader of an evsys run directory, of all its generations.

Metrics are in `metrics.jsonl`, or by split in `training/`, `validation/` and `test/metrics.jsonl`, with
`hyperparams.json`, `artifacts.json` and `conclusion.md` next to them; all of it in the directory itself or in its
`logs/`. A row is `{ts, step, split, metrics}`; older ones lack `split`, later ones `ts` and may have the `name` of a
benchmark, which becomes the attribute `benchmark`.

A file whose rows have no time was last written at its mtime: its last row gets that time, each row before it one
millisecond less (of several points of a series in one millisecond a backend keeps one). A row without a time among
others has that of the row before it. Rows are put in the order of their times.
"""

from __future__ import annotations

import heapq
import logging
import re
from array import array
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

from stepspan.compat.importing import BeginLine, ImportedSession, Line, default_job_id, event
from stepspan.compat.rows import NS_PER_MS, NS_PER_US, first_row, read_json, read_rows, row_index, row_numbers, unix_ns
from stepspan.errors import RecordError, short_repr
from stepspan.values import to_text

log = logging.getLogger("stepspan")

METRICS, HYPERPARAMS, ARTIFACTS, CONCLUSION = "metrics.jsonl", "hyperparams.json", "artifacts.json", "conclusion.md"
FOLDERS = {"training": "train", "validation": "val", "test": "test"}
"""Folder -> the split of rows in it that name none."""
FIELDS = {"ts", "step", "split", "metrics", "name"}
STATUSES = {"failed": "failed", "error": "failed", "interrupted": "interrupted", "cancelled": "interrupted"}
"""Status in a conclusion -> how the run ended."""
MAX_CONCLUSION_CHARS = 1 << 16


def detect(path: Path) -> str | None:
    """What a path is taken for, in words; None where it is not a run of evsys. Never raises."""
    try:
        root, files = _metrics_files(path)
        if not files or not all(_is_row(first_row(file)) for file, _ in files):
            return None
        if path.is_file():
            return f"evsys metrics: {path.name}"
        others = [root / name for name in (HYPERPARAMS, ARTIFACTS) if (root / name).is_file()]
        names = [str(file.relative_to(path)) for file in (*(file for file, _ in files), *others)]
        return f"an evsys run directory: {', '.join(names)}"
    except (OSError, ValueError):
        return None


def read_sessions(path: Path, *, job_id: str | None = None) -> Iterator[ImportedSession]:
    """The one session of a run directory, or of a metrics file and what is next to it.

    Args:
        path: The directory or file.
        job_id: The run's id; the directory's name and a hash of its path where None.

    Yields:
        The session; it ended as its conclusion says, and completed where there is none.

    Raises:
        RecordError: A row is not one of evsys (it names file and line), or there is nothing of evsys at all.
        OSError: A file cannot be read.

    """
    root, files = _metrics_files(path)
    hyperparams = read_json(root / HYPERPARAMS, dict)
    sources = [_MetricsFile(file, split) for file, split in files]
    artifacts = list(_artifacts(root / ARTIFACTS))
    times = [time for source in sources for time in (*source.times[:1], *source.times[-1:])]
    times += [ts for ts, *_ in artifacts]
    if not times:
        if not hyperparams:
            raise RecordError(
                f"no {METRICS}, {HYPERPARAMS} or {ARTIFACTS} of evsys with anything in it", where=str(path)
            )
        times = [(root / HYPERPARAMS).stat().st_mtime_ns]
    started, ended = min(times) - NS_PER_US, max(times)
    directory = (path if path.is_dir() else path.parent).resolve()
    name = (directory.parent if directory.name == "logs" else directory).name

    def lines(run: BeginLine) -> Iterator[Line]:
        if hyperparams:
            yield started, event("hyperparams", params=hyperparams), None
        yield from heapq.merge(*sources, artifacts, key=itemgetter(0))

    status = _status(root / CONCLUSION)
    yield ImportedSession(
        "evsys", path, job_id or default_job_id(path, name), name, started, ended, lines, status=status
    )


class _MetricsFile:
    """The rows of one metrics file, read again each time they are iterated over. Raises RecordError, OSError."""

    def __init__(self, path: Path, split: str) -> None:
        self._path = path
        self._split = split
        given = array("q", (self._time(number, row) for number, row in read_rows(path)))
        self._as_written = _with_all_times(given, path.stat().st_mtime_ns)
        self.times = array("q", sorted(self._as_written))
        """The times of the rows, ascending, Unix ns."""

    def __iter__(self) -> Iterator[Line]:
        pairs = zip(self._events(), self._as_written, strict=False)  # the file may have grown
        lines = ((ts, each, None) for each, ts in pairs if each["metrics"])
        return iter(lines if self.times == self._as_written else sorted(lines, key=itemgetter(0)))

    def _time(self, number: int, row: dict[str, Any]) -> int:
        """The time of a row in Unix ns; 0 for one that has none."""
        ts = unix_ns(row["ts"]) if "ts" in row else 0
        if ts is None or "step" not in row or not isinstance(row.get("metrics"), dict):
            problem = f"not a row of evsys, which has step, metrics and a time: {short_repr(row)}"
            raise RecordError(problem, where=f"{self._path}, line {number}")
        return ts

    def _events(self) -> Iterator[dict[str, Any]]:
        left_out = 0
        for _, row in read_rows(self._path):
            metrics = row_numbers(row["metrics"])
            left_out += len(row["metrics"]) - len(metrics)
            step, benchmark, split = row_index(row["step"]), row.get("name"), row.get("split")
            fields: dict[str, Any] = {"split": split if isinstance(split, str) and split else self._split}
            if step is not None:
                fields["step"] = step
            if benchmark is not None:
                fields["attributes"] = {"benchmark": str(benchmark)}
            yield event("metrics", **fields, metrics=metrics)
        if left_out:
            log.warning("stepspan: %s: %d values are not numbers, and were left out", self._path, left_out)


def _metrics_files(path: Path) -> tuple[Path, list[tuple[Path, str]]]:
    """The directory of a run's files, and its metrics files with the split of rows that name none."""
    if path.is_file():
        return path.parent, [(path, FOLDERS.get(path.parent.name, "train"))]
    for root in (path, path / "logs"):
        found = [(root / METRICS, "train"), *((root / folder / METRICS, split) for folder, split in FOLDERS.items())]
        files = [(file, split) for file, split in found if file.is_file()]
        if files or (root / HYPERPARAMS).is_file() or (root / ARTIFACTS).is_file():
            return root, files
    return path, []


def _is_row(row: dict[str, Any]) -> bool:
    return isinstance(row.get("metrics"), dict) and "step" in row and row.keys() <= FIELDS


def _with_all_times(times: array[int], mtime: int) -> array[int]:
    """The times of a file's rows, 0 replaced; `mtime` is the last row's where no row has one."""
    if not any(times):
        return array("q", (mtime - after * NS_PER_MS for after in range(len(times) - 1, -1, -1)))
    before = next(filter(None, times))
    for index, ts in enumerate(times):
        times[index] = before = ts or before
    return times


def _artifacts(path: Path) -> Iterator[Line]:
    """The artifacts by their times; those without one have the file's mtime."""
    entries = [each for each in read_json(path, list) if isinstance(each, dict) and "name" in each and "path" in each]
    if not entries:
        return
    mtime = path.stat().st_mtime_ns
    timed = [(unix_ns(entry.get("ts")) or mtime, entry) for entry in entries]
    for ts, entry in sorted(timed, key=itemgetter(0)):
        fields = {key: to_text(entry.get(key, "file")) for key in ("name", "path", "kind")}
        yield ts, event("artifact", **fields), None


def _status(path: Path) -> str:
    """How the run ended by its conclusion: completed, where that does not say."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")[:MAX_CONCLUSION_CHARS]
    except OSError:
        return "completed"
    found = re.search(r"^- status: (\w+)", text, re.MULTILINE)
    return STATUSES.get(found[1], "completed") if found else "completed"
