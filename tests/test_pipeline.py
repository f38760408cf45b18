"""Processors, then the journal, then followers: as it is printed in `stepspan.pipeline`."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
from harness.journals import ROOMY, header, lines

from stepspan import ConfigError, JsonlExporter, MemoryExporter, OtlpExporter, Pipeline
from stepspan.events import Event
from stepspan.processors import Redact, build

ENDPOINT = "http://127.0.0.1:1"


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_the_journal_is_kept_by_the_jsonl_exporter_and_the_others_follow_it(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    jsonl, otlp, memory = JsonlExporter(tmp_path, limits=ROOMY), OtlpExporter(ENDPOINT), MemoryExporter()
    exporters = [(jsonl, otlp, memory)[index] for index in order]
    pipeline = Pipeline(processors=[Redact()], exporters=exporters)
    assert pipeline.journal is jsonl.journal
    assert pipeline.followers == tuple(exporter for exporter in exporters if exporter is not jsonl)


def test_an_event_passes_the_processors_and_is_in_the_journal_when_the_call_returns(tmp_path: Path) -> None:
    drop = build([{"drop": {"tags": ["progress"]}}])
    pipeline = Pipeline(processors=[Redact(), *drop], exporters=[JsonlExporter(tmp_path), OtlpExporter(ENDPOINT)])
    pipeline.journal.open(header, job_id="job", host="node")
    params: Event = {"ts": 0, "seq": 0, "tag": "hyperparams", "params": {"api_key": "secret", "lr": 0.1}}
    assert pipeline.emit(params)
    assert not pipeline.emit({"ts": 0, "seq": 0, "tag": "progress", "total_steps": 3})
    assert pipeline.journal.session is not None
    _, written = lines(pipeline.journal.session.path)
    assert written["params"]["lr"] == 0.1
    assert written["params"]["api_key"] != "secret"
    pipeline.close("completed")


@pytest.mark.parametrize("count", [0, 2])
def test_exactly_one_exporter_keeps_the_journal(tmp_path: Path, count: int) -> None:
    journals = [JsonlExporter(tmp_path / str(number)) for number in range(count)]
    with pytest.raises(ConfigError, match="exactly one JsonlExporter keeps the journal"):
        Pipeline([], [MemoryExporter(), *journals])


def test_what_comes_after_the_end_is_lost_with_a_warning(tmp_path: Path) -> None:
    warnings: list[tuple[str, str]] = []
    pipeline = Pipeline(
        [], [JsonlExporter(tmp_path)], warn=lambda kind, message, *, key="": warnings.append((kind, message))
    )
    pipeline.journal.open(header, job_id="job", host="node")
    pipeline.close("completed")
    pipeline.emit({"ts": 0, "seq": 0, "tag": "progress", "total_steps": 3})
    assert warnings == [("closed", "the run is closed: progress was lost, as is every later event")]
