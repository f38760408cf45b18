"""Every OTEL_* variable of the specification, and its neighbours: what it does here, or why nothing.

The table of docs/variables.md is made from this one, and `stepspan doctor` says by it which variables that are set have
no effect. The specification: opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables and
…/otel/protocol/exporter; those of Python are opentelemetry-python's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import NamedTuple

from stepspan.environment import unquoted

OTLP = "OTEL_EXPORTER_OTLP_"
PARTS = ("", "TRACES_", "METRICS_", "LOGS_")
SIMILARITY = 0.8
"""How near, of 1, a known name must be in order to be suggested."""


class Variables(NamedTuple):
    """A row: variables that do the same.

    Args:
        names: Their names; what ends in `*` stands for all names that begin so.
        honoured: Whether they have an effect.
        text: Which one, or why none.

    """

    names: tuple[str, ...]
    honoured: bool
    text: str


def _of_otlp(name: str) -> tuple[str, ...]:
    return tuple(f"{OTLP}{part}{name}" for part in PARTS)


_QUEUES = tuple(
    f"OTEL_{processor}_{name}"
    for processor in ("BSP", "BLRP")
    for name in ("SCHEDULE_DELAY", "EXPORT_TIMEOUT", "MAX_QUEUE_SIZE", "MAX_EXPORT_BATCH_SIZE")
)

TABLE: tuple[Variables, ...] = (
    Variables(
        ("OTEL_SDK_DISABLED",),
        True,
        "`true`: nothing is sent; the journal is kept (`STEPSPAN_DISABLED=1` records nothing)",
    ),
    Variables(("OTEL_SERVICE_NAME",), True, "`service.name`, where neither an argument nor a setting says it"),
    Variables(
        ("OTEL_RESOURCE_ATTRIBUTES",),
        True,
        "attributes of the Resource, but for job and rank; what is not `key=value` is left out with a warning",
    ),
    Variables(
        ("OTEL_TRACES_EXPORTER", "OTEL_METRICS_EXPORTER", "OTEL_LOGS_EXPORTER"),
        True,
        "`none`: the signal is not sent. Other exporters are the SDK's: OTLP goes to the endpoint, if there is one",
    ),
    Variables(
        _of_otlp("ENDPOINT"),
        True,
        "where to; a general one gets `/v1/<signal>`. Without one nothing is sent. One that can't be meant (no host, a"
        " placeholder that nobody filled in) holds its signal",
    ),
    Variables(
        _of_otlp("PROTOCOL"),
        True,
        "`http/protobuf`, `grpc`, `http/json`; by default `grpc` for port 4317, else `http/protobuf`",
    ),
    Variables(
        _of_otlp("HEADERS"),
        True,
        "`key=value,key=value`, percent-encoded, or `key: value`; headers that can't be read hold their signal",
    ),
    Variables(_of_otlp("COMPRESSION"), True, "`gzip`, `deflate` or `none`, which is the default"),
    Variables(
        _of_otlp("TIMEOUT"),
        True,
        "**seconds**, as opentelemetry-python has it, or with a unit: `500ms`, `10s`. 1000 and more are taken as the"
        " specification's milliseconds, and what is above 600 is warned of. 0: ten minutes",
    ),
    Variables(
        _of_otlp("INSECURE"),
        True,
        "`true`, `1`, `yes`: no TLS, where the endpoint has no scheme. By default none to this machine itself",
    ),
    Variables(
        (*_of_otlp("CERTIFICATE"), *_of_otlp("CLIENT_KEY"), *_of_otlp("CLIENT_CERTIFICATE")),
        True,
        "files; one that is missing holds its signal until it is there. A key without its certificate holds it, too",
    ),
    Variables(
        (f"{OTLP}METRICS_TEMPORALITY_PREFERENCE",),
        True,
        "`cumulative` (default), `delta` or `lowmemory`, of sums and histograms",
    ),
    Variables(
        (f"{OTLP}METRICS_DEFAULT_HISTOGRAM_AGGREGATION",),
        True,
        "`explicit_bucket_histogram`, or `base2_exponential_bucket_histogram`, which is the default here",
    ),
    Variables(
        tuple(f"OTEL_PYTHON_EXPORTER_OTLP_{p}_{part}CREDENTIAL_PROVIDER" for p in ("HTTP", "GRPC") for part in PARTS),
        True,
        "the name of an entry point that gives credentials, as for opentelemetry-python",
    ),
    Variables(
        ("OTEL_TRACES_SAMPLER",),
        True,
        "`always_off`: no spans go out. `traceidratio`: a share of the traces, the same ones from all ranks."
        " `parentbased_…` is the same, for a run's traces begin with it. Spans that are left out count as filtered",
    ),
    Variables(("OTEL_TRACES_SAMPLER_ARG",), True, "the share, from 0 to 1"),
    Variables(
        ("OTEL_METRICS_EXEMPLAR_FILTER",),
        True,
        "`always_off`: no exemplars. Otherwise the slowest steps, of those whose traces go out",
    ),
    Variables(
        (
            *(f"OTEL_{kind}ATTRIBUTE_COUNT_LIMIT" for kind in ("", "SPAN_", "EVENT_", "LINK_", "LOGRECORD_")),
            *("OTEL_SPAN_EVENT_COUNT_LIMIT", "OTEL_SPAN_LINK_COUNT_LIMIT"),
        ),
        True,
        "how many are sent; `dropped_*_count` says how many are not, and the journal keeps them. By default 128",
    ),
    Variables(
        tuple(f"OTEL_{kind}ATTRIBUTE_VALUE_LENGTH_LIMIT" for kind in ("", "SPAN_", "LOGRECORD_")),
        True,
        "characters of a text that are sent, 16,384 at most",
    ),
    Variables(
        ("OTEL_PROPAGATORS",),
        True,
        "whether TRACEPARENT is read: where `tracecontext` is among them, as it is by default",
    ),
    Variables(
        ("TRACEPARENT", "TRACESTATE"),
        True,
        "the span that has started the run (the program's current one goes before it): the run's span links to it, or"
        " is its child with `STEPSPAN_PROPAGATE=1`",
    ),
    Variables(
        ("SSL_CERT_FILE", "SSL_CERT_DIR"),
        True,
        "authorities to trust beside the usual ones, where no `…_CERTIFICATE` is set; gRPC reads the file",
    ),
    Variables(
        ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"), True, "over HTTP, all that is trusted where no `…_CERTIFICATE` is set"
    ),
    Variables(
        ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
        True,
        "the proxy of requests, and which hosts go without; gRPC reads the first three in lower case only, and takes"
        " `http://` proxies only",
    ),
    Variables(_QUEUES, False, "there is no queue in memory: delivery follows the journal (`STEPSPAN_SEND_INTERVAL`)"),
    Variables(
        ("OTEL_METRIC_EXPORT_INTERVAL", "OTEL_METRIC_EXPORT_TIMEOUT"),
        False,
        "points go out as they are logged (`STEPSPAN_SEND_INTERVAL`); after `configure()` the SDK collects its metrics"
        " so often",
    ),
    Variables(("OTEL_LOG_LEVEL",), False, 'messages go to the logger "stepspan" of Python\'s `logging`: set its level'),
    Variables(("BAGGAGE",), False, "baggage is no attribute of a Resource: use OTEL_RESOURCE_ATTRIBUTES"),
    Variables(
        ("OTEL_CONFIG_FILE", "OTEL_EXPERIMENTAL_CONFIG_FILE"),
        False,
        "declarative configuration is the SDK's; `STEPSPAN_CONFIG` names stepspan's own file",
    ),
    Variables(("OTEL_ENTITIES",), False, "in development: use OTEL_RESOURCE_ATTRIBUTES"),
    Variables(
        ("OTEL_EXPERIMENTAL_RESOURCE_DETECTORS",),
        False,
        "the Resource is the job's, rank's and host's; a Collector's `resource_detection` adds the machine's",
    ),
    Variables(
        (f"{OTLP}SPAN_INSECURE", f"{OTLP}METRIC_INSECURE"),
        False,
        f"names of before: {OTLP}TRACES_INSECURE and {OTLP}METRICS_INSECURE",
    ),
    Variables(
        ("OTEL_EXPORTER_ZIPKIN_*", "OTEL_EXPORTER_JAEGER_*", "OTEL_EXPORTER_PROMETHEUS_*"),
        False,
        "stepspan sends OTLP; Prometheus and Jaeger take it, for Zipkin there is the Collector",
    ),
    Variables(
        ("OTEL_PYTHON_EXPORTER_OTLP_GRPC_RETRYABLE_ERROR_CODES",),
        False,
        "what each answer means is in `stepspan/otlp/answers.py`; nothing is given up",
    ),
    Variables(("OTEL_SEMCONV_STABILITY_OPT_IN",), False, "of instrumentation that emits old names, too"),
    Variables(
        ("OTEL_PYTHON_*", "OTEL_INSTRUMENTATION_*"),
        False,
        "of the SDK and `opentelemetry-instrument`, for what a program emits through them",
    ),
    Variables(
        ("OTEL_JAVA_*", "OTEL_JAVAAGENT_*", "OTEL_DOTNET_*", "OTEL_NODE_*", "OTEL_GO_*", "OTEL_PHP_*", "OTEL_RUBY_*"),
        False,
        "of other languages",
    ),
)


def row_of(name: str) -> Variables | None:
    """The row of a variable; None where the specification has no such name.

    Args:
        name: As it stands in the environment.

    """
    for row in TABLE:
        for each in row.names:
            if name == each or (each.endswith("*") and name.startswith(each[:-1])):
                return row
    return None


def without_effect(env: Mapping[str, str]) -> dict[str, str]:
    """The variables of OpenTelemetry that are set and have no effect.

    Args:
        env: The environment; a blank variable is not set.

    Returns:
        Each one's name, and why.

    """
    found: dict[str, str] = {}
    for name in sorted(env):
        if (name.startswith("OTEL_") or name == "BAGGAGE") and unquoted(env[name]):
            row = row_of(name)
            if row is None:
                found[name] = f"no variable of OpenTelemetry{_suggestion(name, known_names())}"
            elif not row.honoured:
                found[name] = row.text
    return found


def known_names() -> list[str]:
    """All names of the table that stand for themselves."""
    return [name for row in TABLE for name in row.names if not name.endswith("*")]


def _suggestion(name: str, known: Iterable[str]) -> str:
    return "".join(f": did you mean {nearest}?" for nearest in get_close_matches(name, known, 1, SIMILARITY))
