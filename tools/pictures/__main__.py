"""Draw the README's pictures: `make pictures`, about five minutes.

Grafana itself is no part of the stack that `make stack` builds, so nothing here is a screenshot. A training runs
(`training`), each panel of the committed dashboards is asked as Grafana would ask it, of the real Prometheus
and Loki, and what they answer is drawn (`drawing`) where and how the dashboard says. The panels that ask Tempo are
drawn from the spans that the Collector handed on, and say so.

    PYTHONPATH=tests python tools/pictures [ANSWERS.json]     what was answered is kept there, or drawn again
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import requests
import training as scene
import units
from drawing import FAINT, WIDTH, Box, Canvas, Drawn
from harness import grafana

DIRECTORY = Path(__file__).parents[2] / "docs" / "pictures"
NARROWEST = 400  # px: points that a panel of the dashboards can show at least


GAP, UNIT, HEAD, FOOT = 8, 36, 58, 34
"""px between panels, of a row of the dashboard's grid, of the heading, of the foot."""
HONEST = (
    "Drawn by stepspan from the dashboard's own queries against a real Prometheus (rules every second) and Loki; "
    "not a Grafana screenshot."
)


@dataclass(frozen=True)
class Picture:
    """Some rows of the grid of a dashboard."""

    name: str
    dashboard: str
    first: int
    end: int
    note: str = ""
    """What else is to be known, at the foot."""


SCRIPTED = "The GPUs are scripted."
ARRANGED = "The crash, the broken image and the NaN are arranged."
PICTURES = (
    Picture("run", "run", 0, 37, ARRANGED),
    Picture("run-broken", "run", 47, 66, ARRANGED),
    Picture("ranks", "ranks", 0, 36, "Rank 2 is made slow."),
    Picture("ranks-steps", "ranks", 36, 55),
    Picture("hardware", "hardware", 0, 32, SCRIPTED),
    Picture("telemetry-health", "telemetry-health", 0, 34, "The Collector was down for 35 s; there is no Tempo."),
)


def draw(picture: Picture, board: dict[str, Any], answers: dict[str, Any], directory: Path) -> None:
    """Write `NAME.png`."""
    canvas = Canvas(HEAD + (picture.end - picture.first) * UNIT + FOOT)
    canvas.text(GAP + 6, 22, board["title"], size=19, weight="bold")
    canvas.text(GAP + 6, 45, board["description"], size=13, color=FAINT)
    span = units.duration(answers["end"] - answers["start"])
    canvas.text(WIDTH - GAP - 6, 22, f"job_id  {answers.get('job', '')}      last {span}", size=13, ha="right")
    for panel in board["panels"]:
        place = panel["gridPos"]
        if picture.first <= place["y"] < picture.end:
            step = (WIDTH - GAP) / 24
            box = Box(GAP + place["x"] * step, HEAD + (place["y"] - picture.first) * UNIT,
                      place["w"] * step - GAP, place["h"] * UNIT - GAP)  # fmt: skip
            if panel["type"] == "row":
                canvas.text(box.x + 4, box.y + 15, f"⌄  {panel['title']}", size=15, weight="bold")
            else:
                Drawn(canvas, box, panel, answers).draw()
    canvas.text(GAP + 6, canvas.height - 15, " ".join(filter(None, (HONEST, picture.note))), size=12, color=FAINT)
    canvas.save(directory / f"{picture.name}.png")


class Asking:
    """Asks for a dashboard's panels at a moment, over the training so far."""

    def __init__(self, servers: scene.Servers, start: float, end: float) -> None:
        self.servers, self.start, self.end = servers, start, end
        self.values = {"job": scene.JOB, "rank": ".*", "split": ".*", "slower": "0s", "range": f"{end - start:.0f}"}
        self.values["raw"] = grafana.value_of_raw(
            lambda promql: servers.prometheus.query(promql, end), job=scene.JOB, range=self.values["range"]
        )

    def dashboard(self, name: str) -> dict[str, Any]:
        board = grafana.dashboard(name)
        panels = {
            str(panel["id"]): [self.target(panel, of) for of in panel["targets"]] for panel in grafana.panels(board)
        }
        marks = [self.mark(one) for one in board.get("annotations", {}).get("list", [])]
        return {"job": scene.JOB, "start": self.start, "end": self.end, "panels": panels, "marks": marks}

    def target(self, panel: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
        source = target["datasource"]["uid"]
        if source == "tempo":
            return {"spans": self.spans()}
        query = grafana.fill(target["expr"], **self.values)
        if source == "loki":
            return {"lines": self.servers.loki.query(query, self.start, self.end)}
        if target.get("instant"):
            return {"instant": self.servers.prometheus.query(query, self.end)}
        step = max(1, math.ceil((self.end - self.start) / panel.get("maxDataPoints", NARROWEST)))
        answer: dict[str, Any] = {"step": step, "range": self.range(query, step)}
        if target.get("exemplar"):
            answer["exemplars"] = self.servers.prometheus.exemplars(query, self.start, self.end)
        return answer

    def range(self, query: str, step: int) -> list[dict[str, Any]]:
        first = self.start // step * step
        asked = {"query": query, "start": f"{first:.0f}", "end": f"{math.floor(self.end)}", "step": str(step)}
        with requests.Session() as http:
            http.trust_env = False
            answer = http.post(f"{self.servers.prometheus.url}/api/v1/query_range", data=asked)
        answer.raise_for_status()
        series: list[dict[str, Any]] = orjson.loads(answer.content)["data"]["result"]
        return series

    def mark(self, mark: dict[str, Any]) -> dict[str, Any]:
        query = grafana.fill(mark["expr"], **self.values)
        if mark["datasource"]["uid"] == "loki":
            found = self.servers.loki.query(query, self.start, self.end)
            times = [t / 1e9 for _, lines in found for t, _ in lines]
        else:  # the beginning of each stretch in which the expression holds
            points = [t for series in self.range(query, 1) for t, _ in series["values"]]
            times = [t for t in points if t - 1 not in set(points)]
        return {"name": mark["name"], "colour": mark["iconColor"], "times": times}

    def spans(self) -> list[dict[str, Any]]:
        """The step spans that the TraceQL of the dashboards selects."""
        return [
            {
                "trace": span["traceId"],
                "start": span["startTimeUnixNano"] / 1e9,
                "duration": (span["endTimeUnixNano"] - span["startTimeUnixNano"]) / 1e9,
                "service": span["resource"]["service.name"],
                "name": span["name"],
                "rank": str(span["resource"]["rank"]),
                "step": span["attributes"]["step"],
            }
            for span in self.servers.collector.spans()
            if span["resource"]["job_id"] == scene.JOB and span["name"] == "training.step"
        ]


def gathered() -> dict[str, Any]:
    """The dashboards' answers, of a training that runs meanwhile."""
    answers = {}
    with tempfile.TemporaryDirectory() as directory, scene.servers(Path(directory)) as servers:
        start, runs = time.time(), Path(directory) / "runs"
        with scene.trained(runs, servers.collector.http_endpoint):
            time.sleep(scene.SHOWN)
            asking = Asking(servers, start, time.time())
            for name in ("run", "ranks", "hardware"):
                answers[name] = asking.dashboard(name)
            servers.collector.stop()
            time.sleep(scene.OUTAGE)
            servers.collector.start()
            time.sleep(scene.AFTER)
            answers["telemetry-health"] = Asking(servers, start, time.time()).dashboard("telemetry-health")
    return answers


def main(kept: Path | None) -> None:
    if kept is not None and kept.exists():
        answers = orjson.loads(kept.read_bytes())
    else:
        answers = orjson.loads(orjson.dumps(gathered()))
        if kept is not None:
            kept.write_bytes(orjson.dumps(answers))
    for picture in PICTURES:
        draw(picture, grafana.dashboard(picture.dashboard), answers[picture.dashboard], DIRECTORY)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
