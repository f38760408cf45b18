"""`stepspan export`: journals as OTLP JSON lines, mapped as delivery maps them."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from stepspan.cli.delivering import deliver_until, delivery_failures, thinned_text
from stepspan.cli.options import require_directories, require_sessions
from stepspan.deliver.deliverer import Deliverer, caught_up
from stepspan.deliver.ledgers import cursors, session_ledger
from stepspan.deliver.options import Options
from stepspan.errors import ConfigError, JournalError
from stepspan.exporters.otlp import OtlpExporter
from stepspan.identity import host_facts
from stepspan.mapping.records import SIGNALS, Attributes, Record, Signal
from stepspan.otlp.json import encode
from stepspan.otlp.outcome import Outcome, Verdict
from stepspan.processors import Processor
from stepspan.reading.sessions import state_path

FORMATS = ("otlp-json",)
MAX_LINE_BYTES = (1 << 20) - 1
"""The Collector's `otlp_json_file` receiver cuts a line of 1 MiB or more in pieces, and loses it."""


class JsonLinesExporter:
    """An exporter to files: each request is a line.

    Args:
        files: The file of each signal; signals may share one. The caller closes them.

    """

    destination = "export"
    processors: Sequence[Processor] = ()

    def __init__(self, files: Mapping[Signal, BinaryIO]) -> None:
        self.signals: tuple[Signal, ...] = tuple(files)
        self.mapping_options = OtlpExporter("http://localhost").mapping_options  # by the variables, as `sync` has it
        self.written: Counter[Signal] = Counter()
        """How many records were written, by signal."""
        self.too_long = 0
        """Records that fill more than a line by themselves."""
        self.error: OSError | None = None
        """The first error in writing. A write is never repeated: see it, and stop."""
        self._files = files
        self._lock = threading.Lock()

    def export(self, signal: Signal, resource: Attributes, records: Sequence[Record]) -> Outcome:
        """Write one line, or several where one would be too long."""
        line = encode(signal, resource, records) + b"\n"
        if len(line) > MAX_LINE_BYTES and len(records) > 1:
            half = len(records) // 2
            self.export(signal, resource, records[:half])
            return self.export(signal, resource, records[half:])
        try:
            with self._lock:
                self.too_long += len(line) > MAX_LINE_BYTES
                self._files[signal].write(line)
                self.written[signal] += len(records)
        except OSError as error:
            self.error = self.error or error
        return Outcome(Verdict.DELIVERED)

    def close(self) -> None:
        """Nothing: the caller closes the files."""


def export_journals(
    paths: Sequence[Path],
    to: str,
    output: str | None,
    signals: Sequence[str],
    dead_after: float,
    *,
    all_ranks: bool = False,
) -> int:
    """Write what journals hold; the arguments are those of the command. The exit code. Raises `ConfigError`."""
    if to not in FORMATS:
        raise ConfigError("--to", to, f"known is {', '.join(FORMATS)}")
    for signal in signals:
        if signal not in SIGNALS:
            raise ConfigError("--signal", signal, f"known are {', '.join(SIGNALS)}")
    require_directories(paths)
    selected = [signal for signal in SIGNALS if not signals or signal in signals]
    try:
        with _open_output(output, selected) as files, tempfile.TemporaryDirectory(prefix="stepspan-export-") as state:
            options = Options(host_facts().boot_id, dead_after, Path(state), all_ranks=all_ranks)
            return _export(paths, JsonLinesExporter(files), options)
    except BrokenPipeError:  # the next program has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, JournalError) as error:
        print(f"stepspan: {error}", file=sys.stderr)
        return 1


def _export(paths: Sequence[Path], exporter: JsonLinesExporter, options: Options) -> int:
    """Deliver to the files, with cursors in the options' temporary `state_directory`: the journals stay as they are.

    A deliverer merges the sessions by event time. Whoever reads the lines in their order can send them to a receiver
    that refuses points much older than the newest it has.
    """
    sessions = require_sessions(*(path.absolute() for path in paths))
    deliverer = Deliverer([exporter], lambda _: sessions, options)
    lines = sum(session_ledger(session)["journaled"] for session in sessions)
    done = lambda deliverer: caught_up(deliverer) or exporter.error is not None  # noqa: E731
    complete = deliver_until(done, deliverer, lines=lines, verb="exporting", stream=sys.stderr)
    if exporter.error is not None:
        raise exporter.error
    if not complete:
        raise InterruptedError("interrupted")
    failures = delivery_failures(deliverer)
    for failure in failures:
        print(f"stepspan: {failure}", file=sys.stderr)
    if exporter.too_long:
        print(
            f"stepspan: {exporter.too_long} records fill over 1 MiB each, which the Collector does not take",
            file=sys.stderr,
        )
    written = ", ".join(f"{exporter.written[s]:,} {s}" for s in exporter.signals)
    thinned = sum(progress.ledger.thinned for s in deliverer.schedulers for progress in s.progress.values())
    found = [cursors(state_path(session, options.state_directory)).values() for session in sessions]
    left_out = sum(state.left_out for destinations in found for of in destinations for state in of.values())
    of_ranks = f"; left out by rank {left_out:,} (`--all-ranks` exports them)" if left_out else ""
    print(f"stepspan: exported {written}{thinned_text(thinned)}{of_ranks}", file=sys.stderr)
    return 1 if failures else 0


@contextmanager
def _open_output(output: str | None, signals: Sequence[Signal]) -> Iterator[Mapping[Signal, BinaryIO]]:
    """Where each signal's lines go: standard output, one file, or a file for each signal in a directory."""
    if not output:
        try:
            yield dict.fromkeys(signals, sys.stdout.buffer)
        finally:
            sys.stdout.buffer.flush()
        return
    path = Path(output)
    targets = dict.fromkeys(signals, path)
    if path.is_dir() or output.endswith(os.sep):
        path.mkdir(parents=True, exist_ok=True)
        targets = {signal: path / f"{signal}.jsonl" for signal in signals}
    with ExitStack() as stack:
        files = {target: stack.enter_context(_replacement(target)) for target in set(targets.values())}
        yield {signal: files[target] for signal, target in targets.items()}


@contextmanager
def _replacement(target: Path) -> Iterator[BinaryIO]:
    """A file that gets the name `target` when it is complete, so that a Collector never reads half of one.

    Unlike `layout.replace_file` it is written piece by piece. Nothing is left of it after an error.
    """
    draft = target.with_name(f".{target.name}.part")
    try:
        with open(draft, "wb") as file:
            yield file
        os.replace(draft, target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
