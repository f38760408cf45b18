"""Panels of a dashboard's JSON, drawn from what its queries answered: like Grafana's, for the README's pictures."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import units
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

WIDTH = 1320
CANVAS, PANEL, EDGE, TEXT, FAINT, GRID = "#111217", "#181b1f", "#2c2e34", "#d5d6df", "#9a9ba6", "#2a2c31"
COLOURS = {"green": "#73BF69", "yellow": "#FADE2A", "red": "#F2495C", "orange": "#FF9830", "blue": "#5794F2"}
CLASSIC = ("#73BF69", "#F2CC0C", "#8AB8FF", "#FF780A", "#F2495C", "#5794F2", "#B877D9", "#A352CC", "#37872D", "#FADE2A")
OUTDATED = "#83858d"
LEVELS = {"error": "red", "info": "green", "warn": "yellow"}
"""A log line's level -> its mark; blue for others."""


@dataclass(frozen=True)
class Box:
    """Pixels from the top left corner; y goes down."""

    x: float
    y: float
    w: float
    h: float


class Canvas:
    """A picture in pixels, on which `text` and `axes` lie at places of their own."""

    def __init__(self, height: int) -> None:
        self.height = height
        self.figure = Figure(figsize=(WIDTH / 100, height / 100), dpi=100, facecolor=CANVAS)
        self._renderer = FigureCanvasAgg(self.figure).get_renderer()

    def text(self, x: float, y: float, text: str, *, size: float = 12, within: float = 0.0, **how: Any) -> float:
        """One line around height `y`, cut to a width of `within`. Its width."""
        how = {"color": TEXT, "va": "center", "family": "DejaVu Sans", **how}
        drawn = self.figure.text(x / WIDTH, 1 - y / self.height, text, fontsize=0.72 * size, parse_math=False, **how)
        while within and len(text) > 2 and drawn.get_window_extent(self._renderer).width > within:
            text = text[:-2].rstrip(" …") + "…"
            drawn.set_text(text)
        return float(drawn.get_window_extent(self._renderer).width)

    def axes(self, box: Box) -> Axes:
        x, y = box.x / WIDTH, 1 - (box.y + box.h) / self.height
        axes = self.figure.add_axes((x, y, box.w / WIDTH, box.h / self.height), facecolor="none")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=8, labelcolor=FAINT)
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        return axes

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.figure.savefig(path, facecolor=CANVAS, pil_kwargs={"optimize": True})


@dataclass
class Line:
    """A series: times and values, NaN where there is none."""

    name: str
    labels: dict[str, str]
    times: Any
    values: Any
    look: dict[str, Any] = field(default_factory=dict)

    @property
    def last(self) -> float:
        known = self.values[np.isfinite(self.values)]
        return float(known[-1]) if len(known) else math.nan


class Drawn:
    """A panel in its box."""

    def __init__(self, canvas: Canvas, box: Box, panel: dict[str, Any], answers: dict[str, Any]) -> None:
        self.canvas, self.box, self.panel, self.answers = canvas, box, panel, answers
        self.targets = answers["panels"][str(panel["id"])]
        self.field = panel["fieldConfig"]["defaults"]
        self.custom = self.field.get("custom", {})
        self.unit, self.decimals = self.field.get("unit", "none"), self.field.get("decimals")
        self.start, self.end = answers["start"], answers["end"]

    def draw(self) -> None:
        x, y = self.box.x / WIDTH, 1 - (self.box.y + self.box.h) / self.canvas.height
        place = {"facecolor": PANEL, "edgecolor": EDGE, "transform": self.canvas.figure.transFigure, "zorder": -1}
        size = self.box.w / WIDTH, self.box.h / self.canvas.height
        self.canvas.figure.add_artist(Rectangle((x, y), *size, **place))
        title = self.panel["title"]
        if any("spans" in target for target in self.targets):
            title += " (from spans, without Tempo)"
        self.canvas.text(self.box.x + 10, self.box.y + 17, title, size=14, weight="bold", within=self.box.w - 20)
        kinds = {
            "stat": self.stat, "timeseries": self.timeseries, "xychart": self.xychart, "heatmap": self.heatmap,
            "status-history": self.status, "table": self.table, "logs": self.logs,
        }  # fmt: skip
        kinds[self.panel["type"]]()

    # ------------------------------------------------------------------------------------------------- series

    def named(self, index: int, labels: dict[str, str]) -> str:
        legend = self.panel["targets"][index].get("legendFormat", "")
        return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), legend)

    def lines(self) -> list[Line]:
        found: list[Line] = []
        for index, target in enumerate(self.targets):
            if "spans" in target:
                found += self.of_spans(target["spans"])
            step = target.get("step", 1)
            times = np.arange(self.start // step * step, self.end + step, step)
            for series in target.get("range", ()):
                values = np.full(len(times), math.nan)
                for at, value in series.get("values", ()):
                    values[round((at - times[0]) / step)] = float(value)
                found.append(Line(self.named(index, series["metric"]), series["metric"], times, values))
        for number, line in enumerate(found):
            line.look = {"color": CLASSIC[number % len(CLASSIC)], **self.overridden(line.name)}
        return found

    def overridden(self, name: str) -> dict[str, Any]:
        for override in self.panel["fieldConfig"]["overrides"]:
            if override["matcher"]["id"] == "byRegexp" and re.search(override["matcher"]["options"].strip("/"), name):
                dashed = any(one["id"] == "custom.lineStyle" for one in override["properties"])
                return {"color": OUTDATED, "linestyle": "--" if dashed else "-"}
        return {}

    def of_spans(self, spans: list[dict[str, Any]]) -> Iterator[Line]:
        """The 99th percentile of each rank's durations, as TraceQL's quantile_over_time gives it."""
        times = np.arange(self.start, self.end, 5.0)
        for rank in sorted({span["rank"] for span in spans}):
            mine = [span for span in spans if span["rank"] == rank]
            each = [[span["duration"] for span in mine if at <= span["start"] < at + 5.0] for at in times]
            values = [float(np.quantile(some, 0.99)) if some else math.nan for some in each]
            yield Line(f"rank {rank}", {"rank": rank}, times, np.array(values))

    def colour(self, value: float) -> str:
        steps = self.field["thresholds"]["steps"]
        return COLOURS[[step["color"] for step in steps if step["value"] is None or value >= step["value"]][-1]]

    # --------------------------------------------------------------------------------------------------- stat

    def stat(self) -> None:
        values = [(line.name, line.last) for line in self.lines()]
        for index, target in enumerate(self.targets):
            values += [(self.named(index, one["metric"]), float(one["value"][1])) for one in target.get("instant", ())]
        known = [(name, value) for name, value in values if math.isfinite(value)]
        named = self.panel["options"].get("textMode") == "value_and_name"
        shown = [(name, units.write(self.unit, v, self.decimals), self.colour(v)) for name, v in known]
        shown = shown or [("", self.field.get("noValue", "No data"), COLOURS["green"])]
        middle, width = self.box.y + 12 + self.box.h / 2, self.box.w / len(shown)
        for number, (name, text, colour) in enumerate(shown):
            centre = self.box.x + width * (number + 0.5)
            if named:
                self.canvas.text(centre, middle - 29, name, size=14, ha="center", within=width - 12)
            size = min(44, (width - 20) / (0.62 * max(1, len(text))))
            self.canvas.text(centre, middle + 8 * named, text, size=size, color=colour, ha="center", weight="bold")

    # ------------------------------------------------------------------------------------------------- graphs

    def timeseries(self) -> None:
        lines = self.lines()
        axes = self.plot(lines)
        stacked = self.custom.get("stacking", {}).get("mode") == "normal"
        logarithmic = "scaleDistribution" in self.custom
        below: Any = 0.0
        tops = []
        for line in lines:
            values = np.nan_to_num(below) + line.values if stacked else line.values
            opacity = (
                0 if line.look.get("linestyle") == "--" or logarithmic else self.custom.get("fillOpacity", 0) / 100
            )
            dots = "." if self.custom.get("showPoints") == "always" else ""
            axes.plot(line.times, values, linewidth=1.3, marker=dots, markersize=5, zorder=3, **line.look)
            axes.fill_between(line.times, below, values, color=line.look["color"], alpha=opacity, linewidth=0)
            below = values if stacked else 0.0
            tops.append(values)
        exemplars = [one for target in self.targets for one in target.get("exemplars", ())]
        tops.append(np.array([float(one["value"]) for one in exemplars]))
        axes.plot([one["timestamp"] for one in exemplars], tops[-1], "D", color="#6a94f4", markersize=3.2, alpha=0.85)
        self.scale(axes, np.concatenate(tops), logarithmic=logarithmic)
        self.times(axes)
        if "thresholdsStyle" in self.custom:
            for step in self.field["thresholds"]["steps"][1:]:
                axes.axhline(step["value"], color=COLOURS[step["color"]], linestyle="--", linewidth=1, alpha=0.8)
        for mark in self.answers["marks"]:
            for at in mark["times"]:
                axes.axvline(at, color=COLOURS[mark["colour"]], linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.75)

    def plot(self, lines: list[Line], *, foot: float = 0.0) -> Axes:
        """The axes of a graph, with its legend at the panel's foot: each series' name, and its last value if asked."""
        options = self.panel["options"].get("legend", {})
        names = [line.name for line in lines]
        if options.get("displayMode") == "table":
            names = [f"{line.name}  {units.write(self.unit, line.last, self.decimals)}" for line in lines]
        columns = max(1, int(self.box.w // (60 + 7 * max(map(len, names), default=1))))
        rows = min(4, math.ceil(len(lines) / columns))
        foot += 17 * rows + 8
        axes = self.canvas.axes(Box(self.box.x + 62, self.box.y + 38, self.box.w - 84, self.box.h - 62 - foot))
        shown = list(zip(lines, names, strict=True))[: rows * columns]
        marks = [Line2D([], [], label=name, **line.look) for line, name in shown]
        corner = ((self.box.x + 6) / WIDTH, 1 - (self.box.y + self.box.h - 2) / self.canvas.height)
        how = {"fontsize": 8, "labelcolor": TEXT, "frameon": False, "handlelength": 1.2, "columnspacing": 1.4}
        self.canvas.figure.legend(handles=marks, loc="lower left", bbox_to_anchor=corner, ncols=columns, **how)
        return axes

    def scale(self, axes: Axes, values: Any, *, logarithmic: bool = False) -> None:
        known = values[np.isfinite(values) & ((values > 0) | (not logarithmic))]
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
        if logarithmic:
            self.logarithmic(axes, low * 0.8, high * 1.25, self.unit)
            return
        high += not high - low  # a flat line
        room = (high - low) * 0.06
        axes.set_ylim(self.field.get("min", low - room), self.field.get("max", high + room))
        unit = 1024 ** int(math.log(max(high, 1), 1024)) if self.unit == "bytes" else 1
        steps = np.array(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(*(at / unit for at in axes.get_ylim())))
        axes.yaxis.set_major_locator(FixedLocator(steps * unit))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: units.write(self.unit, value)))
        axes.set_ylim(axes.get_ylim())

    def logarithmic(self, axes: Axes, low: float, high: float, unit: str) -> None:
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: units.write(unit, value)))

    def times(self, axes: Axes) -> None:
        step = next(s for s in (5, 10, 15, 30, 60, 120, 300) if (self.end - self.start) / s <= max(3, self.box.w / 110))
        axes.set_xlim(self.start, self.end)
        axes.xaxis.set_major_locator(FixedLocator(list(np.arange(math.ceil(self.start / step) * step, self.end, step))))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: time.strftime("%H:%M:%S", time.gmtime(at))))

    def xychart(self) -> None:
        parts = next(one["options"] for one in self.panel["transformations"] if one["id"] == "partitionByValues")
        named = self.panel["options"]["series"][0]["x"]["matcher"]["options"]
        over: dict[tuple[str | None, ...], Line] = {}
        lines: list[Line] = []
        for line in self.lines():
            part = tuple(line.labels.get(label) for label in parts["fields"])
            if over.setdefault(part, line) is not line:  # the first query has what the others are drawn over
                lines.append(line)
        for number, line in enumerate(lines):
            line.look = {"color": CLASSIC[number % len(CLASSIC)], **self.overridden(line.name)}
        axes = self.plot(lines, foot=12)
        for line in lines:
            x = over[tuple(line.labels.get(label) for label in parts["fields"])]
            axes.plot(x.values, line.values, ".", color=line.look["color"], markersize=5, alpha=0.6)
        self.scale(axes, np.concatenate([line.values for line in lines]))
        axes.set_xlabel(named, fontsize=8, color=FAINT)

    # -------------------------------------------------------------------------------------------- cells, buckets

    def status(self) -> None:
        lines = self.lines()
        axes = self.plot([])
        for row, line in enumerate(reversed(lines)):
            step = line.times[1] - line.times[0]
            known = [(at, value) for at, value in zip(line.times, line.values, strict=True) if math.isfinite(value)]
            colours = [self.colour(value) for _, value in known]
            axes.broken_barh([(at, step * 1.03) for at, _ in known], (row + 0.05, 0.9), facecolors=colours, linewidth=0)
        axes.set_ylim(0, max(1, len(lines)))
        axes.set_yticks([row + 0.5 for row in range(len(lines))], [line.name for line in reversed(lines)])
        axes.grid(visible=False)
        self.times(axes)

    def heatmap(self) -> None:
        cells = [
            (at, float(low), float(high), float(count), target["step"])
            for target in self.targets
            for series in target["range"]
            for at, histogram in series.get("histograms", ())
            for _, low, high, count in histogram.get("buckets", ())
            if float(count) > 1e-9 and float(low) > 0
        ]
        if not cells:
            return
        axes, counts = self.plot([], foot=10), [cell[3] for cell in cells]
        norm, colours = LogNorm(min(counts), max(counts)), colormaps["YlOrBr_r"]
        for at, low, high, count, step in cells:
            axes.add_patch(Rectangle((at, low), step * 1.02, (high - low) * 0.97, facecolor=colours(norm(count))))
        unit = self.panel["options"]["yAxis"]["unit"]
        self.logarithmic(axes, min(cell[1] for cell in cells) * 0.95, max(cell[2] for cell in cells) * 1.05, unit)
        self.times(axes)
        brightest = f"brightest: {units.plain(max(counts))} steps/s"
        self.canvas.text(self.box.x + 12, self.box.y + self.box.h - 13, brightest, size=11.5, color=FAINT)

    # ------------------------------------------------------------------------------------------ tables and logs

    def table(self) -> None:
        of_spans = "spans" in self.targets[0]
        rows = self.spans_found(self.targets[0]["spans"]) if of_spans else self.joined()
        organise = next(one["options"] for one in self.panel["transformations"] if one["id"] == "organize")
        names, hidden = organise["renameByName"], organise["excludeByName"]
        rows = [{names.get(key, key): value for key, value in row.items() if not hidden.get(key)} for row in rows]
        for order in self.panel["options"].get("sortBy", []) if not of_spans else []:
            key = order["displayName"]
            rows.sort(key=lambda row, key=key: row.get(key, math.inf), reverse=order.get("desc", False))  # type: ignore[misc]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        overrides = [one["id"] for rule in self.panel["fieldConfig"]["overrides"] for one in rule["properties"]]
        coloured = any("cellOptions" in one for one in overrides)
        width, top = (self.box.w - 24) / max(1, len(columns)), self.box.y + 46
        for column, name in enumerate(columns):
            numeric = all(isinstance(row.get(name, 0.0), float) for row in rows)
            x, ha = self.box.x + 14 + width * column + (width - 12) * numeric, "right" if numeric else "left"
            self.canvas.text(x, top, name, color=COLOURS["blue"], ha=ha, within=width - 10)
            for number, row in enumerate(rows[: int((self.box.h - 60) // 25)], 1):
                value, colour = row.get(name, ""), TEXT
                if isinstance(value, float):
                    colour = self.colour(value) if coloured else TEXT
                    value = units.write("s" if of_spans else self.unit, value, self.decimals)
                self.canvas.text(x, top + 2 + 25 * number, str(value), color=colour, ha=ha, within=width - 10)

    def joined(self) -> list[dict[str, Any]]:
        """A row for each series, or for each value of the label that joins the queries."""
        by = next((t["options"]["byField"] for t in self.panel["transformations"] if t["id"] == "joinByField"), "")
        rows: dict[Any, dict[str, Any]] = {}
        for number, target in enumerate(self.targets):
            letter = self.panel["targets"][number]["refId"]
            for series in target["instant"]:
                row = rows.setdefault(series["metric"][by] if by else len(rows), {})
                row |= series["metric"]
                row["Value" if len(self.targets) == 1 else f"Value #{letter}"] = float(series["value"][1])
        return list(rows.values())

    def spans_found(self, spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """As Tempo's table of spans: the most recent fifty, the slowest first."""
        recent = sorted(spans, key=lambda span: -span["start"])[:50]
        return [
            {
                "traceIdHidden": span["trace"][:10] + "…",
                "Start time": time.strftime("%H:%M:%S", time.gmtime(span["start"])),
                "Name": span["name"],
                "rank": span["rank"],
                "step": str(span["step"]),
                "duration": span["duration"],
            }
            for span in sorted(recent, key=lambda span: -span["duration"])
        ]

    def logs(self) -> None:
        found = [(t, line, labels) for target in self.targets for labels, lines in target["lines"] for t, line in lines]
        room = int((self.box.h - 50) // 22)
        for number, (at, line, labels) in enumerate(sorted(found, key=lambda one: -one[0])[:room]):
            level = COLOURS[LEVELS.get(labels.get("detected_level", ""), "blue")]
            text = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(at / 1e9))}  {line.splitlines()[0]}"
            y = self.box.y + 46 + 22 * number
            self.canvas.text(self.box.x + 10, y, "▍", size=14, color=level)
            self.canvas.text(self.box.x + 22, y, text, size=11, family="DejaVu Sans Mono", within=self.box.w - 40)
