"""One table has every variable of OpenTelemetry: the page, doctor and what is read agree with it."""

from __future__ import annotations

from pathlib import Path

import opentelemetry.environment_variables as of_the_api
import opentelemetry.sdk.environment_variables as of_the_sdk
import pytest
from harness.runs import command
from harness.tools import tool_named

from stepspan.otlp.endpoint import read_variables
from stepspan.otlp.variable_table import TABLE, known_names, row_of, without_effect


def test_the_page_of_variables_is_made_from_the_table() -> None:
    tool = tool_named("variable_table")
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(), "run `python tools/variable_table.py`"


def test_each_variable_of_the_official_sdk_has_a_row() -> None:
    names = [value for module in (of_the_api, of_the_sdk) for value in vars(module).values() if isinstance(value, str)]
    named = [name for name in names if name.startswith("OTEL_") and name.isupper()]
    assert len(named) > 80
    assert [name for name in named if row_of(name) is None] == []


def test_what_is_read_is_honoured_and_what_is_honoured_is_read() -> None:
    class Names(dict[str, str]):
        def get(self, name: str, default: str = "") -> str:  # type: ignore[override]
            found.add(name)
            return default

    found = {"OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_PROPAGATORS"}  # read where identity and runs are
    read_variables(Names())
    found -= {name for name in found if name.startswith("STEPSPAN_")}
    honoured = {name for row in TABLE if row.honoured for name in row.names if name.startswith("OTEL_")}
    assert found == honoured


def test_no_name_stands_twice() -> None:
    assert len(known_names()) == len(set(known_names()))


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "100"}, "no queue in memory"),
        ({"OTEL_EXPORTER_ZIPKIN_ENDPOINT": "http://z"}, "sends OTLP"),
        ({"OTEL_PYTHON_LOG_CORRELATION": "true"}, "opentelemetry-instrument"),
        ({"OTEL_EXPORTER_OTLP_ENDPONT": "x"}, "did you mean OTEL_EXPORTER_OTLP_ENDPOINT?"),
        ({"OTEL_EXPORTER_OTLP_TRACE_ENDPOINT": "x"}, "did you mean OTEL_EXPORTER_OTLP_TRACES_ENDPOINT?"),
        ({"BAGGAGE": "a=b"}, "OTEL_RESOURCE_ATTRIBUTES"),
    ],
)
def test_what_has_no_effect_says_why(env: dict[str, str], found: str) -> None:
    [(name, why)] = without_effect(env).items()
    assert name in env
    assert found in why


def test_what_is_honoured_or_blank_is_not_among_them() -> None:
    assert without_effect({"OTEL_EXPORTER_OTLP_ENDPOINT": "x", "OTEL_BSP_MAX_QUEUE_SIZE": '""', "PATH": "/bin"}) == {}


def test_doctor_names_those_that_are_set_and_the_span_that_has_started_it(tmp_path: Path) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    told = command("doctor", "--directory", tmp_path / "runs", OTEL_BLRP_SCHEDULE_DELAY="9", TRACEPARENT=parent)
    assert told.returncode == 0, told.stdout
    [line] = [line for line in told.stdout.splitlines() if "OTEL_BLRP" in line]
    assert line.startswith("  no effect        OTEL_BLRP_SCHEDULE_DELAY: there is no queue in memory")
    assert f"{parent}: the run's span leads there" in told.stdout
    wrong = command("doctor", "--directory", tmp_path / "runs", TRACEPARENT="x")
    assert wrong.returncode == 1
    assert "TRACEPARENT='x'" in next(line for line in wrong.stdout.splitlines() if "FAIL:" in line)
