"""`stepspan export`: journals as OTLP JSON lines, mapped as delivery maps them."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

from stepspan.cli.sync import Progress
from stepspan.deliver.deliverer import Deliverer, caught_up, interrupt_on_signal, prepare_process
from stepspan.deliver.ledgers import session_ledger
from stepspan.deliver.options import Options
from stepspan.errors import ConfigError
from stepspan.identity import host_facts
from stepspan.journal.layout import find_sessions
from stepspan.mapping.records import SIGNALS, Attributes, Record, Signal
from stepspan.otlp.json import encode
from stepspan.otlp.outcome import Outcome, Verdict
from stepspan.processors import Processor

FORMATS = ("otlp-json",)
LONGEST_LINE = (1 << 20) - 1
"""The Collector's `otlp_json_file` receiver cuts a line of 1 MiB or more in pieces, and loses it."""


class JsonLines:
    """An exporter to files: each request is a line. `error`: what came of writing, if it went wrong."""

    destination = "export"
    processors: Sequence[Processor] = ()

    def __init__(self, files: Mapping[Signal, BinaryIO]) -> None:
        self.signals: tuple[Signal, ...] = tuple(files)
        self.written: Counter[Signal] = Counter()
        """Records, by signal."""
        self.too_long = 0
        """Records that fill more than a line by themselves."""
        self.error: OSError | None = None
        self._files = files
        self._lock = threading.Lock()

    def export(self, signal: Signal, resource: Attributes, records: Sequence[Record]) -> Outcome:
        """One line; more of them where one would be too long."""
        line = encode(signal, resource, records) + b"\n"
        if len(line) > LONGEST_LINE and len(records) > 1:
            half = len(records) // 2
            self.export(signal, resource, records[:half])
            return self.export(signal, resource, records[half:])
        try:
            with self._lock:  # signals may share a file
                self.too_long += len(line) > LONGEST_LINE
                self._files[signal].write(line)
                self.written[signal] += len(records)
        except OSError as error:  # nothing can be repeated: whoever waits sees it, and stops
            self.error = self.error or error
        return Outcome(Verdict.DELIVERED)

    def close(self) -> None:
        """Nothing: whoever opened the files closes them."""


def export_journals(
    paths: Sequence[Path], to: str, output: str | None, signals: Sequence[str], dead_after: float
) -> int:
    """Write what journals hold. The exit code. Raises `ConfigError` on wrong arguments."""
    if to not in FORMATS:
        raise ConfigError("--to", to, f"known is {', '.join(FORMATS)}")
    for signal in signals:
        if signal not in SIGNALS:
            raise ConfigError("--signal", signal, f"known are {', '.join(SIGNALS)}")
    for path in paths:
        if not path.is_dir():
            raise ConfigError("PATH", str(path), "not a directory: name a journal, a job or a session")
    wanted = [signal for signal in SIGNALS if not signals or signal in signals]
    try:
        with _Output(output, wanted) as files, tempfile.TemporaryDirectory(prefix="stepspan-export-") as state:
            return _export(paths, JsonLines(files), Path(state), dead_after)
    except BrokenPipeError:  # the next program has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"stepspan export: {error}", file=sys.stderr)
        return 1


def _export(paths: Sequence[Path], exporter: JsonLines, state: Path, dead_after: float) -> int:
    """By the deliverer, with cursors that nobody keeps: the journals stay as they are."""
    sessions = {session.path: session for path in paths for session in find_sessions(path.absolute())}
    if not sessions:
        print(f"stepspan export: no journal at or below {', '.join(map(str, paths))}", file=sys.stderr)
        return 1
    options = Options(boot_id=host_facts().boot_id, dead_after=dead_after, state_directory=state)
    deliverer = Deliverer([exporter], sessions.values, options)
    interrupt_on_signal(deliverer)
    prepare_process()
    total = sum(session_ledger(session)["journaled"] for session in sessions.values()) * len(deliverer.schedulers)
    deliverer.start()
    with Progress(deliverer, total, verb="exporting", stream=sys.stderr) as progress:
        complete = deliverer.wait(lambda it: caught_up(it) or exporter.error is not None, progress.tick)
    deliverer.stop()
    if exporter.error is not None:
        raise exporter.error
    if not complete:
        raise InterruptedError("interrupted")
    unreadable = {f"{path}: {why}" for scheduler in deliverer.schedulers for path, why in scheduler.unreadable.items()}
    unreadable |= {f"{s.signal}: stopped by a defect, see above" for s in deliverer.schedulers if s.broken}
    for line in sorted(unreadable):
        print(line, file=sys.stderr)
    if exporter.too_long:
        print(f"{exporter.too_long} records fill over 1 MiB each, which the Collector does not take", file=sys.stderr)
    print("exported", ", ".join(f"{exporter.written[s]:,} {s}" for s in exporter.signals), file=sys.stderr)
    return 1 if unreadable else 0


class _Output:
    """Where lines go: standard output, a file, or a file for each signal in a directory.

    Files get their names when they are whole: a Collector that watches the directory sees no half of one.
    """

    def __init__(self, output: str | None, signals: Sequence[Signal]) -> None:
        self._signals = signals
        place = Path(output or "")
        self._targets: dict[Signal, Path] = {}
        if output and (place.is_dir() or output.endswith(os.sep)):
            place.mkdir(parents=True, exist_ok=True)
            self._targets = {signal: place / f"{signal}.jsonl" for signal in signals}
        elif output:
            self._targets = dict.fromkeys(signals, place)
        self._drafts: dict[Path, BinaryIO] = {}

    def __enter__(self) -> Mapping[Signal, BinaryIO]:
        if not self._targets:
            return dict.fromkeys(self._signals, sys.stdout.buffer)
        for target in set(self._targets.values()):
            self._drafts[target] = open(_draft(target), "wb")
        return {signal: self._drafts[target] for signal, target in self._targets.items()}

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._drafts:
            sys.stdout.buffer.flush()
        for target, file in self._drafts.items():
            with closing(file):
                pass
            if kind is None:
                os.replace(_draft(target), target)
            else:
                os.unlink(_draft(target))


def _draft(target: Path) -> Path:
    return target.with_name(f".{target.name}.part")
