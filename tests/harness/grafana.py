"""The dashboards of `collector-config/stack/`, asked as Grafana asks: every query of every panel, variables filled."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

STACK = Path(__file__).parents[2] / "collector-config" / "stack"
PROMETHEUS_STACK = STACK / "prometheus"
SEVERAL = {"rank", "split"}
"""The variables that may have several values."""
NAMES = ("run", "ranks", "hardware", "telemetry-health")


@dataclass(frozen=True)
class Query:
    """One query of a panel, an annotation or a variable."""

    of: str
    """Dashboard and title."""
    source: str
    """The data source's uid."""
    text: str
    legend: str = ""
    instant: bool = False
    exemplars: bool = False

    def named(self, labels: dict[str, str]) -> str:
        """The legend of a series; KeyError on a label that it doesn't have."""
        return re.sub(r"{{(\w+)}}", lambda found: labels[found[1]], self.legend)

    def filled(self, **values: str) -> str:
        return fill(self.text, **values)


def fill(text: str, **values: str) -> str:
    """Grafana's variables replaced. `range` is in seconds; a variable without a value is an error.

    Of a variable that may have several, Grafana escapes each in the plain form, `$rank`,
    for a regular expression (in PromQL's quotes: with two backslashes), but not in `${rank:pipe}`, nor where all are
    chosen.
    """
    span = values.pop("range", "3600")
    known = {"__range": f"{span}s", **values}

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name in SEVERAL and found[3] != "pipe" and known[name] != ".*":
            return re.sub(r"[$^*{}\[\]'+?.()|]", r"\\\\\g<0>", known[name])
        return known[name]

    return re.sub(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)(?::(\w+))?\})", value, text)


def dashboard(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((STACK / "dashboards" / f"{name}.json").read_text())
    return found


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Panels without the rows' headings."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def queries(name: str) -> Iterator[Query]:
    """The queries of a dashboard's panels."""
    for panel in panels(dashboard(name)):
        for target in panel["targets"]:
            text = target["query"] if target["datasource"]["uid"] == "tempo" else target["expr"]
            of = f"{name}: {panel['title']} ({target['refId']})"
            legend, instant = target.get("legendFormat", ""), target.get("instant", False)
            yield Query(of, target["datasource"]["uid"], text, legend, instant, target.get("exemplar", False))


def marks(name: str) -> Iterator[Query]:
    for mark in dashboard(name).get("annotations", {}).get("list", []):
        assert mark["expr"] == mark["target"]["expr"]
        yield Query(f"{name}: {mark['name']}", mark["datasource"]["uid"], mark["target"]["expr"])


def variable(name: str, of: str = "run") -> dict[str, Any]:
    """A variable of a dashboard by its name."""
    return next(one for one in dashboard(of)["templating"]["list"] if one["name"] == name)


def value_of_raw(query: Any, **values: str) -> str:
    """What Grafana makes of variable `raw`: `query(promql)` gives an instant query's result."""
    raw = variable("raw")
    promql = fill(raw["query"], **values).removeprefix("query_result(").removesuffix(")")
    (found,) = query(promql)
    text = "{" + ",".join(f'{name}="{value}"' for name, value in found["metric"].items()) + "} 1"
    (value,) = re.findall(raw["regex"].strip("/"), text)
    return str(value)


def rules(file: str) -> list[dict[str, Any]]:
    """The rules of `recording.yml` or `alerts.yml`."""
    groups = yaml.safe_load((PROMETHEUS_STACK / file).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def selectors(tree: Any) -> Iterator[tuple[re.Pattern[str], dict[str, str]]]:
    """The names (as a pattern) and the other matchers of an expression's selectors."""
    if isinstance(tree, dict):
        if tree.get("type") in {"vectorSelector", "matrixSelector"}:
            matchers = {one["name"]: one["value"] for one in tree["matchers"] if one["type"] in {"=", "=~"}}
            yield re.compile(matchers.pop("__name__")), matchers
        for value in tree.values():
            yield from selectors(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from selectors(value)
