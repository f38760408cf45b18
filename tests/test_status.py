"""`stepspan status` in a terminal of 80 columns: every cell is whole."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from harness.delivery import Scripted, deliver, options, trained
from rich.console import Console

from stepspan.cli.status import print_ledgers
from stepspan.cli.terminal import print_table, short_id_length
from stepspan.deliver.ledgers import session_ledger
from stepspan.mapping.records import SIGNALS
from stepspan.otlp.outcome import Outcome, Verdict


def narrow() -> Console:
    return Console(file=io.StringIO(), width=80, highlight=False)


def printed(console: Console) -> Any:
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    return text


def test_what_is_zero_everywhere_is_left_out(tmp_path: Path) -> None:
    session = trained(tmp_path, 10)
    for signal in SIGNALS:
        deliver(session, Scripted(), options(), signal)
    console = narrow()
    print_ledgers([session_ledger(session)], console)
    job, names, *rows = printed(console).splitlines()
    assert job == "job"
    assert names.split() == ["rank", "session", "status", "lines", "destination", "signal", "delivered", "state"]
    assert [row.split()[-3] for row in rows] == ["logs", "metrics", "traces"]
    assert rows[0].split()[:3] == ["0", "00000000", "completed"]


def test_a_table_that_is_too_wide_goes_on_below(tmp_path: Path) -> None:
    session = trained(tmp_path, 10)
    held = Outcome(Verdict.HOLD, "404: check the path")
    deliver(session, Scripted([held], destination="a-name-of-somewhat-more-than-usual-length"), options())
    console = narrow()
    print_ledgers([session_ledger(session)], console)
    text = printed(console)
    for cell in ("00000000", "completed", "a-name-of-somewhat-more-than-usual-length", "metrics", "pending", " hold"):
        assert cell in text
    assert "404: check the path" in text


def test_the_columns_that_tell_rows_apart_are_in_each_part() -> None:
    console = Console(file=io.StringIO(), width=20)
    print_table(console, [">rank", "one", "two"], [["3", "a" * 12, "b" * 12], ["4", "", ""]], keys=("rank",))
    parts = [part.splitlines() for part in console.file.getvalue().split("\n\n")]  # type: ignore[attr-defined]
    assert [[line.split() for line in part] for part in parts] == [
        [["rank", "one"], ["3", "a" * 12], ["4"]],
        [["rank", "two"], ["3", "b" * 12], ["4"]],
    ]


def test_ids_are_shortened_where_that_tells_them_apart() -> None:
    assert short_id_length(["0123456789abcdef", "1123456789abcdef"]) == 8
    assert short_id_length(["0123456789abcdef", "0123456789abcdee"]) == 16
