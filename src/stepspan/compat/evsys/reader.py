"""The reader of an evsys run directory, of all its generations.

Metrics stand in `metrics.jsonl`, or by split in `training/`, `validation/` and `test/metrics.jsonl`; beside them
`hyperparams.json`, `artifacts.json` and `conclusion.md`; all of it in the directory itself or in its `logs/`. A row is
`{ts, step, split, metrics}`; older ones lack `split`, later ones `ts` and may have the `name` of a benchmark, which
becomes the attribute `benchmark`.

A file whose rows have no time was last written at its mtime: its last row gets that time, each row before it one
millisecond less (of several points of a series in one millisecond a backend keeps one). A row without a time among
others has that of the row before it. Rows are put in the order of their times.
"""

from __future__ import annotations

import heapq
import logging
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from operator import itemgetter
from pathlib import Path
from typing import Any

from stepspan.compat.importing import Imported, Line, Mark
from stepspan.compat.jsonl import content, first_row, harmless, nanoseconds, number, rows, whole
from stepspan.events import Event

log = logging.getLogger("stepspan")

METRICS, HYPERPARAMS, ARTIFACTS, CONCLUSION = "metrics.jsonl", "hyperparams.json", "artifacts.json", "conclusion.md"
FOLDERS = {"training": "train", "validation": "val", "test": "test"}
"""Folder -> the split of rows in it that name none."""
FIELDS = {"ts", "step", "split", "metrics", "name"}
STATUSES = {"failed": "failed", "error": "failed", "interrupted": "interrupted", "cancelled": "interrupted"}
MILLISECOND, MICROSECOND = 1_000_000, 1_000

Timed = tuple[int, Event]


def detect(path: Path) -> str | None:
    """What a path is taken for, in words; None where it is no run of evsys. Never raises."""
    try:
        root, files = _files(path)
        if not files or not all(_is_row(first_row(file)) for file, _ in files):
            return None
        beside = [root / name for name in (HYPERPARAMS, ARTIFACTS) if (root / name).is_file()]
        names = [str(file.relative_to(path)) for file in (*(file for file, _ in files), *beside)]
        return f"an evsys run directory: {', '.join(names)}" if path.is_dir() else f"evsys metrics: {path.name}"
    except (OSError, ValueError):
        return None


def read(path: Path, *, job_id: str | None = None) -> Iterator[Imported]:
    """The one session of a run directory, or of a metrics file and what lies beside it.

    Its job id is, unless given, the directory's name and a hash of its whole path. Raises ValueError naming file and
    line for a row that is none of evsys's, or where there is nothing of evsys's; OSError.
    """
    root, files = _files(path)
    hyperparams = content(root / HYPERPARAMS, dict)
    sources = [_Source(file, split) for file, split in files]
    artifacts = list(_artifacts(root / ARTIFACTS))
    times = [time for source in sources for time in (source.times[:1], source.times[-1:]) if time]
    known = [*(time[0] for time in times), *(ts for ts, _ in artifacts)]
    if not known:
        if not hyperparams:
            raise ValueError(f"{path}: no {METRICS}, {HYPERPARAMS} or {ARTIFACTS} of evsys with anything in it")
        known = [(root / HYPERPARAMS).stat().st_mtime_ns]
    started, last = min(known) - MICROSECOND, max(known)
    place = path if path.is_dir() else path.parent
    name = (place.resolve().parent if place.resolve().name == "logs" else place.resolve()).name
    digest = blake2b(str(path.resolve()).encode("utf-8", "replace"), digest_size=3).hexdigest()
    status = _status(root / CONCLUSION)

    def lines() -> Iterator[Line]:
        run = Mark()
        yield started, _event("run_begin", parent=0, name=name, group=None, tags=[], attempt=[0, 0]), run
        if hyperparams:
            yield started, _event("hyperparams", params=hyperparams), None
        for ts, event in heapq.merge(*sources, artifacts, key=itemgetter(0)):
            yield ts, event, None
        yield last, _event("run_end", begin=0, status=status), run

    yield Imported("evsys", path, job_id or f"{name}-{digest}", started, lines, status=status)


@dataclass
class _Source:
    """The rows of one metrics file, as often as they are asked for. Raises ValueError for one that is none."""

    path: Path
    split: str

    def __post_init__(self) -> None:
        given = array("q", (self._time(line, row) for line, row in rows(self.path)))
        self._as_written = _filled(given, self.path.stat().st_mtime_ns)
        self.times = array("q", sorted(self._as_written))

    def __iter__(self) -> Iterator[Timed]:
        pairs = zip(self._events(), self._as_written, strict=False)  # the file may have grown
        timed: Iterable[Timed] = ((ts, event) for event, ts in pairs if event["metrics"])
        return iter(timed if self.times == self._as_written else sorted(timed, key=itemgetter(0)))

    def _time(self, line: int, row: dict[str, Any]) -> int:
        ts = nanoseconds(row["ts"]) if "ts" in row else 0
        if ts is None or "step" not in row or not isinstance(row.get("metrics"), dict):
            raise ValueError(f"{self.path}, line {line}: not a row of evsys: {row!s:.80}")
        return ts

    def _events(self) -> Iterator[Event]:
        refused = 0
        for _, row in rows(self.path):
            values = {key: number(value) for key, value in row["metrics"].items()}
            numbers = {key: value for key, value in values.items() if value is not None}
            refused += len(values) - len(numbers)
            step, benchmark, split = whole(row["step"]), row.get("name"), row.get("split")
            event = _event("metrics", split=split if isinstance(split, str) and split else self.split)
            if step is not None:
                event["step"] = step
            if benchmark is not None:
                event["attributes"] = {"benchmark": str(benchmark)}
            yield {**event, "metrics": numbers}
        if refused:
            log.warning("%s: %d values are no numbers, and were left out", self.path, refused)


def _files(path: Path) -> tuple[Path, list[tuple[Path, str]]]:
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


def _filled(times: array[int], mtime: int) -> array[int]:
    if not any(times):
        return array("q", (mtime - after * MILLISECOND for after in range(len(times) - 1, -1, -1)))
    before = next(filter(None, times))
    for index, ts in enumerate(times):
        times[index] = before = ts or before
    return times


def _artifacts(path: Path) -> Iterator[Timed]:
    found = [entry for entry in content(path, list) if isinstance(entry, dict) and "name" in entry and "path" in entry]
    if not found:
        return
    mtime = path.stat().st_mtime_ns
    timed = [(nanoseconds(entry.get("ts")) or mtime, entry) for entry in found]
    for ts, entry in sorted(timed, key=itemgetter(0)):
        told = {key: str(harmless(entry.get(key, "file"))) for key in ("name", "path", "kind")}
        yield ts, _event("artifact", **told)


def _status(path: Path) -> str:
    """How the run ended, where its conclusion says so."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")[: 1 << 16]
    except OSError:
        return "completed"
    found = re.search(r"^- status: (\w+)", text, re.MULTILINE)
    return STATUSES.get(found[1], "completed") if found else "completed"


def _event(tag: str, **fields: Any) -> Event:
    return {"ts": 0, "seq": 0, "tag": tag, **fields}
