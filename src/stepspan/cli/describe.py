"""An event as a few words for a person: one row a tag."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stepspan.events import Event
from stepspan.values import format_seconds

Describe = Callable[[Event, "Event | None"], str]
COMMON = frozenset({"ts", "seq", "tag", "crc", "parent", "begin"})


def describe(event: Event, begin: Event | None = None) -> str:
    """What happened, in one line. `begin`: the begin line of an end, where it is known."""
    row = ROWS.get(event["tag"])
    try:
        if row is not None:
            return row(event, begin)
    except (KeyError, TypeError, ValueError, AttributeError):  # fields that are not what the schema says
        pass
    return f"{event['tag']} {pairs({key: value for key, value in event.items() if key not in COMMON})}".rstrip()


def pairs(values: Mapping[str, Any]) -> str:
    """`key=value key=value`."""
    return " ".join(f"{key}={short(value)}" for key, value in values.items())


def short(value: Any) -> str:
    """A value in a few characters."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return repr(text) if isinstance(value, str) and (" " in text or not text) else text


def printable(text: str) -> str:
    """Nothing in it moves a cursor, rings or colours: a journal holds what others wrote."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def _title(begin: Event | None, kind: str) -> str:
    """What an end line ends."""
    if begin is None:
        return kind
    if kind == "step":
        split = "" if begin.get("split", "train") == "train" else f"{begin['split']} "
        return f"{split}step {begin['step']}"
    return str(begin["name"]) if kind == "span" else f"{kind} {begin.get('epoch', begin.get('name') or '')}".rstrip()


def _took(event: Event, begin: Event | None) -> str:
    if begin is None:
        return " ended"
    return f" took {format_seconds((event.get('ended', event['ts']) - begin['ts']) / 1e9)}"


def _status(event: Event) -> str:
    return f", {event['status']}" if event.get("status") not in (None, "ok", "completed") else ""


def _begins(kind: str) -> Describe:
    return lambda event, _: f"{_title(event, kind)} begins"


def _ends(kind: str) -> Describe:
    return lambda event, begin: f"{_title(begin, kind)}{_took(event, begin)}{_status(event)}"


def _run_end(event: Event, begin: Event | None) -> str:
    return f"{_title(begin, 'run')}{_took(event, begin)}: {event['status']}"


def _step_end(event: Event, begin: Event | None) -> str:
    extra = "".join(f", {event[item]} {item}" for item in ("samples", "tokens") if item in event)
    wait = f", waited {format_seconds(event['data_wait'])} for data" if event.get("data_wait") else ""
    return f"{_title(begin, 'step')}{_took(event, begin)}{wait}{extra}{_status(event)}"


def _device_time(event: Event, begin: Event | None) -> str:
    took = "not known" if event["seconds"] is None else format_seconds(event["seconds"])
    return f"{_title(begin, 'a span')} on the device: {took}"


def _metrics(event: Event, _: Event | None) -> str:
    split = event.get("split", "train")
    values = {key: "…" if value is None else value for key, value in event["metrics"].items()}  # a GPU's, to come
    told = split == "train" or all(key.startswith(f"{split}/") for key in values)  # by the keys themselves
    return f"{'' if told else split + '  '}{pairs({**values, **event.get('attributes', {})})}"


def _event(event: Event, _: Event | None) -> str:
    status = f" [{event['status']}]" if event.get("status") else ""
    return f"{event['name']}{status} {pairs(event.get('attributes') or {})}".rstrip()


def _log(event: Event, _: Event | None) -> str:
    return f"{event['severity'].upper()} {event['logger']}: {event['message']}"


def _sample(event: Event, _: Event | None) -> str:
    values = (
        f"{name}{'{' + ','.join(map(str, more[0].values())) + '}' if more and more[0] else ''}={short(value)}"
        for name, value, *more in event["values"]
    )
    return f"{event['source']}: {' '.join(values)}"


ROWS: Mapping[str, Describe] = {
    "header": lambda e, _: f"session {e['session']} on {e['host']}, pid {e['pid']}",
    "run_begin": _begins("run"),
    "run_end": _run_end,
    "epoch_begin": _begins("epoch"),
    "epoch_end": _ends("epoch"),
    "step_begin": _begins("step"),
    "step_end": _step_end,
    "span_begin": _begins("span"),
    "span_end": _ends("span"),
    "device_time": _device_time,
    "metrics": _metrics,
    "hyperparams": lambda e, _: f"hyperparameters {pairs(e['params'])}",
    "artifact": lambda e, _: f"{e['kind']} {e['name']}: {e['path']}",
    "event": _event,
    "error": lambda e, _: f"{e['type']}: {e['message']}",
    "log": _log,
    "progress": lambda e, _: f"{e['total_steps']} steps in all",
    "sample": _sample,
    "memory": lambda e, _: f"device {e['device_id']}: {pairs(e['counters'])}",
    "otel": lambda e, _: f"OpenTelemetry {e['signal']}: {e['record'].get('name') or e['record'].get('body', '')}",
    "gap": lambda e, _: f"{e['dropped']} events before this one could not be written: {e['why']}",
}
