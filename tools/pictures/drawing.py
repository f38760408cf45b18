"""Panels of a dashboard's JSON, drawn from what its queries answered: like Grafana's, for the README's pictures."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import units
from canvas import EDGE, FAINT, GRID, PANEL, TEXT, Binary, Box, Canvas
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

COLOURS = {"green": "#73BF69", "yellow": "#FADE2A", "red": "#F2495C", "orange": "#FF9830", "blue": "#5794F2"}
CLASSIC = ("#73BF69", "#F2CC0C", "#8AB8FF", "#FF780A", "#F2495C", "#5794F2", "#B877D9", "#A352CC", "#37872D", "#FADE2A")
ORANGES = LinearSegmentedColormap.from_list("oranges", ["#3a2416", "#a84a12", "#f58231", "#ffd9a8"])
CALCS = {"min": "Min", "mean": "Mean", "max": "Max", "lastNotNull": "Last *"}


@dataclass
class Line:
    """A series: times and values, NaN where there is none."""

    name: str
    labels: dict[str, str]
    times: Any
    values: Any
    look: dict[str, Any]

    def calc(self, which: str) -> float:
        known = self.values[np.isfinite(self.values)]
        if not len(known):
            return math.nan
        calcs: dict[str, Any] = {"min": np.min, "mean": np.mean, "max": np.max, "lastNotNull": lambda v: v[-1]}
        return float(calcs[which](known))


class Drawn:
    """A panel."""

    def __init__(self, canvas: Canvas, box: Box, panel: dict[str, Any], answers: dict[str, Any]) -> None:
        self.canvas, self.box, self.panel, self.answers = canvas, box, panel, answers
        self.targets = answers["panels"][str(panel["id"])]
        self.field = panel["fieldConfig"]["defaults"]
        self.custom = self.field.get("custom", {})
        self.unit, self.decimals = self.field.get("unit", "none"), self.field.get("decimals")
        self.start, self.end = answers["start"], answers["end"]

    def draw(self) -> None:
        self.canvas.patch(self.box, PANEL, edge=EDGE, round_=4)
        title = self.canvas.text(self.box.x + 10, self.box.y + 17, self.panel["title"], size=14, weight="bold",
                                 within=self.box.w - 20)  # fmt: skip
        if any("spans" in target for target in self.targets):
            self.canvas.text(
                self.box.x + 20 + title, self.box.y + 18, "from spans, without Tempo", size=11, colour=FAINT
            )
        kinds = {
            "stat": self.stat, "timeseries": self.timeseries, "table": self.table, "logs": self.logs,
            "status-history": self.status, "heatmap": self.heatmap, "xychart": self.xychart,
        }  # fmt: skip
        kinds[self.panel["type"]]()

    # ------------------------------------------------------------------------------------------------- series

    def named(self, index: int, labels: dict[str, str]) -> str:
        legend = self.panel["targets"][index].get("legendFormat", "")
        return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), legend)

    def lines(self) -> list[Line]:
        found = []
        for index, target in enumerate(self.targets):
            if "spans" in target:
                found += self.of_spans(target["spans"])
            step = target.get("step", 1)
            times = np.arange(self.start // step * step, self.end + step, step)
            for series in target.get("range", ()):
                values = np.full(len(times), math.nan)
                for at, value in series.get("values", ()):
                    values[round((at - times[0]) / step)] = float(value)
                found.append(Line(self.named(index, series["metric"]), series["metric"], times, values, {}))
        for number, line in enumerate(found):
            line.look = {"color": CLASSIC[number % len(CLASSIC)], **self.overridden(line.name)}
        return found

    def overridden(self, name: str) -> dict[str, Any]:
        for override in self.panel["fieldConfig"]["overrides"]:
            if override["matcher"]["id"] == "byRegexp" and re.search(override["matcher"]["options"].strip("/"), name):
                looks = {one["id"]: one["value"] for one in override["properties"]}
                return {"color": "#83858d", "dashed": "custom.lineStyle" in looks}
        return {}

    def of_spans(self, spans: list[dict[str, Any]]) -> list[Line]:
        """The 99th percentile of each rank's durations, as TraceQL's quantile_over_time gives it."""
        step = 5.0
        times = np.arange(self.start, self.end, step)
        found = []
        for rank in sorted({span["rank"] for span in spans}):
            values = []
            for at in times:
                some = [s["duration"] for s in spans if s["rank"] == rank and at <= s["start"] < at + step]
                values.append(float(np.quantile(some, 0.99)) if some else math.nan)
            found.append(Line(f"rank {rank}", {"rank": rank}, times, np.array(values), {}))
        return found

    def colour(self, value: float) -> str:
        name = "green"
        for step in self.field["thresholds"]["steps"]:
            if step["value"] is None or value >= step["value"]:
                name = step["color"]
        return COLOURS[name]

    # --------------------------------------------------------------------------------------------------- stat

    def stat(self) -> None:
        values = [(line.name, line.calc("lastNotNull")) for line in self.lines()]
        for index, target in enumerate(self.targets):
            values += [(self.named(index, one["metric"]), float(one["value"][1])) for one in target.get("instant", ())]
        values = [(name, value) for name, value in values if math.isfinite(value)]
        named = self.panel["options"].get("textMode") == "value_and_name"
        middle, width = self.box.y + 30 + (self.box.h - 36) / 2, self.box.w / max(1, len(values))
        if not values:
            self.fitted(self.box.x + self.box.w / 2, middle, self.field["noValue"], COLOURS["green"], self.box.w - 20)
        for number, (name, value) in enumerate(values):
            centre = self.box.x + width * (number + 0.5)
            if named:
                self.canvas.text(centre, middle - 29, name, size=14, centre=True, colour=TEXT, within=width - 12)
            written = units.write(self.unit, value, self.decimals)
            self.fitted(centre, middle + 8 * named, written, self.colour(value), width - 20)

    def fitted(self, x: float, y: float, text: str, colour: str, width: float) -> None:
        size = min(44, width / (0.62 * max(1, len(text))))
        self.canvas.text(x, y, text, size=size, colour=colour, centre=True, weight="bold")

    # ------------------------------------------------------------------------------------------------- graphs

    def timeseries(self) -> None:
        lines = self.lines()
        axes = self.plot(self.legend(lines))
        stacked = "stacking" in self.custom and self.custom["stacking"].get("mode") == "normal"
        below: Any = 0.0
        low = 0.0 if "scaleDistribution" not in self.custom else None
        for line in lines:
            values = line.values + below if stacked else line.values
            style = (0, (4, 4)) if line.look.get("dashed") else "-"
            axes.plot(line.times, values, color=line.look["color"], linewidth=1.3, linestyle=style, zorder=3)
            alone = (
                np.isfinite(values)
                & ~np.isfinite(np.r_[math.nan, values[:-1]])
                & ~np.isfinite(np.r_[values[1:], math.nan])
            )
            dots = np.isfinite(values) if self.custom.get("showPoints") == "always" else alone
            axes.plot(line.times[dots], values[dots], "o", color=line.look["color"], markersize=2.6, zorder=4)
            opacity = 0 if line.look.get("dashed") else self.custom.get("fillOpacity", 0) / 100
            if stacked:
                axes.fill_between(line.times, below, values, color=line.look["color"], alpha=opacity, linewidth=0)
                below = np.nan_to_num(values)
            elif low is not None:
                axes.fill_between(line.times, low, values, color=line.look["color"], alpha=opacity, linewidth=0)
        self.exemplars(axes, lines)
        self.scale(axes, [line.values for line in lines] + ([below] if stacked else []))
        self.times(axes)
        self.thresholds(axes)
        self.marks(axes)

    def plot(self, legend: float) -> Axes:
        box = Box(self.box.x + 62, self.box.y + 38, self.box.w - 76, self.box.h - 38 - 26 - legend)
        return self.canvas.axes(box)

    def scale(self, axes: Axes, values: list[Any]) -> None:
        known = np.concatenate([v[np.isfinite(v)] for v in values]) if values else np.array([0.0, 1.0])
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
        if "scaleDistribution" in self.custom:
            axes.set_yscale("log")
            known = known[known > 0]
            low, high = float(known.min()), float(known.max())
            bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
            ticks = [m * 10.0**p for p in range(bottom, top + 1) for m in ((1, 2, 5) if top - bottom < 3 else (1,))]
            axes.set_ylim(low * 0.8, high * 1.25)
            axes.yaxis.set_major_locator(FixedLocator(ticks))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            high += not high - low  # a flat line
            room = (high - low) * 0.06
            axes.set_ylim(self.field.get("min", low - room), self.field.get("max", high + room))
            locator = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
            axes.yaxis.set_major_locator(Binary() if self.unit == "bytes" else locator)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: units.write(self.unit, value)))

    def times(self, axes: Axes) -> None:
        span = self.end - self.start
        step = next(s for s in (5, 10, 15, 30, 60, 120, 300) if span / s <= max(3, self.box.w / 110))
        axes.set_xlim(self.start, self.end)
        axes.xaxis.set_major_locator(FixedLocator(list(np.arange(math.ceil(self.start / step) * step, self.end, step))))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: time.strftime("%H:%M:%S", time.gmtime(at))))

    def thresholds(self, axes: Axes) -> None:
        if "thresholdsStyle" not in self.custom:
            return
        low, high = axes.get_ylim()
        for step in self.field["thresholds"]["steps"]:
            if step["value"] is not None and low < step["value"] < high:
                axes.axhline(step["value"], color=COLOURS[step["color"]], linestyle=(0, (6, 4)), linewidth=1, alpha=0.8)

    def marks(self, axes: Axes) -> None:
        for mark in self.answers["marks"]:
            for at in mark["times"]:
                axes.axvline(at, color=COLOURS[mark["colour"]], linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.75)
                axes.plot([at], [0], "^", color=COLOURS[mark["colour"]], markersize=5, clip_on=False,
                          transform=axes.get_xaxis_transform())  # fmt: skip

    def exemplars(self, axes: Axes, lines: list[Line]) -> None:
        dots = [one for target in self.targets for one in target.get("exemplars", ())]
        times, values = [d["timestamp"] for d in dots], np.array([float(d["value"]) for d in dots])
        axes.plot(times, values, "D", color="#6a94f4", markersize=3.2, zorder=5, alpha=0.85, markeredgewidth=0)
        if dots:
            lines.append(Line("", {}, np.array(times), values, {"hidden": True}))

    def legend(self, lines: list[Line]) -> float:
        """Drawn at the panel's foot; its height."""
        options = self.panel["options"].get("legend", {})
        if options.get("displayMode") != "table":
            return self.names(lines)
        shown = min(len(lines), 5 if self.box.w < 600 else 6)
        height = 20 + 17 * shown
        top = self.box.y + self.box.h - height - 2
        column = 66
        columns = [
            (calc, self.box.x + self.box.w - 10 - column * n) for n, calc in enumerate(reversed(options["calcs"]))
        ]
        self.canvas.text(self.box.x + 28, top + 8, "Name", size=11, colour=COLOURS["blue"])
        for calc, x in columns:
            self.canvas.text(x, top + 8, CALCS[calc], size=11, colour=COLOURS["blue"], right=True)
        for number, line in enumerate(lines[:shown]):
            y = top + 26 + 17 * number
            more = len(lines) - shown
            if more and number == shown - 1:
                self.canvas.text(self.box.x + 28, y, f"… {more + 1} more", size=11.5, colour=FAINT)
                break
            self.canvas.patch(Box(self.box.x + 10, y - 2, 12, 3), line.look["color"])
            self.canvas.text(self.box.x + 28, y, line.name, size=11.5, within=columns[-1][1] - 48 - self.box.x - 28)
            for calc, x in columns:
                value = line.calc(calc)
                self.canvas.text(x, y, units.write(self.unit, value, self.decimals), size=11.5, right=True)
        return height

    def names(self, lines: list[Line]) -> float:
        x = self.box.x + 12
        for line in lines:
            self.canvas.patch(Box(x, self.box.y + self.box.h - 15, 12, 3), line.look["color"])
            x += 34 + self.canvas.text(x + 17, self.box.y + self.box.h - 13, line.name, size=11.5)
        return 20

    def xychart(self) -> None:
        axis, *lines = self.lines()
        for number, line in enumerate(lines):
            line.look = {"color": CLASSIC[number], **self.overridden(line.name)}
        axes = self.plot(self.names(lines) + 12)
        for line in lines:
            axes.plot(
                axis.values, line.values, "o", color=line.look["color"], markersize=3, alpha=0.6, markeredgewidth=0
            )
        self.scale(axes, [line.values for line in lines])
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        self.canvas.text(self.box.x + self.box.w / 2, self.box.y + self.box.h - 30, axis.name, size=11.5, colour=FAINT)

    # -------------------------------------------------------------------------------------------- cells, buckets

    def status(self) -> None:
        lines = self.lines()
        axes = self.plot(22)
        for row, line in enumerate(lines):
            step = line.times[1] - line.times[0]
            for at, value in zip(line.times, line.values, strict=True):
                if math.isfinite(value):
                    spot = (at, len(lines) - 1 - row + 0.05)
                    cell = Rectangle(spot, step * 1.03, 0.9, facecolor=self.colour(value), linewidth=0)
                    axes.add_patch(cell)
        axes.set_ylim(0, max(1, len(lines)))
        axes.grid(visible=False)
        axes.yaxis.set_major_locator(FixedLocator([len(lines) - row - 0.5 for row in range(len(lines))]))
        names = [line.name for line in lines]
        axes.yaxis.set_major_formatter(FuncFormatter(lambda at, _: names[round(len(lines) - at - 0.5)]))
        self.times(axes)
        steps, x = self.field["thresholds"]["steps"], self.box.x + 12
        for number, step in enumerate(steps):
            name = f"{step['value']:g}+" if step["value"] is not None else f"< {steps[number + 1]['value']:g}"
            self.canvas.patch(Box(x, self.box.y + self.box.h - 15, 12, 3), COLOURS[step["color"]])
            x += 34 + self.canvas.text(x + 17, self.box.y + self.box.h - 13, name, size=11.5)

    def heatmap(self) -> None:
        axes = self.plot(18)
        cells = []
        for target in self.targets:
            for series in target["range"]:
                for at, histogram in series.get("histograms", ()):
                    for _, low, high, count in histogram.get("buckets", ()):
                        if float(count) > 1e-9 and float(low) > 0:
                            cells.append((at, float(low), float(high), float(count), target["step"]))
        if not cells:
            return
        norm = LogNorm(min(c[3] for c in cells), max(c[3] for c in cells))
        for at, low, high, count, step in cells:
            colour = ORANGES(norm(count))
            axes.add_patch(Rectangle((at, low), step * 1.02, (high - low) * 0.97, facecolor=colour, linewidth=0))
        lowest, highest = min(c[1] for c in cells), max(c[2] for c in cells)
        axes.set_yscale("log")
        axes.set_ylim(lowest * 0.95, highest * 1.05)
        ticks = [m * 10.0**p for p in range(-5, 4) for m in (1, 2, 5)]
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda v, _: units.write(self.panel["options"]["yAxis"]["unit"], v))
        )
        self.times(axes)
        self.canvas.text(self.box.x + 12, self.box.y + self.box.h - 13, "steps/s", size=11.5, colour=FAINT)
        for n in range(60):
            self.canvas.patch(Box(self.box.x + 70 + 3 * n, self.box.y + self.box.h - 18, 3, 9), ORANGES(n / 59))
        for n, value in ((0, norm.vmin), (60, norm.vmax)):
            x = self.box.x + 70 + 3 * n + (6 if n else 0)
            if n:
                self.canvas.text(x, self.box.y + self.box.h - 13, units.plain(value), size=11, colour=FAINT)

    # ------------------------------------------------------------------------------------------ tables and logs

    def table(self) -> None:
        if "spans" in self.targets[0]:
            rows, order = self.spans_found(self.targets[0]["spans"]), None
        else:
            rows, order = self.joined(), self.panel["options"].get("sortBy")
        organise = next(t["options"] for t in self.panel["transformations"] if t["id"] == "organize")
        rows = [
            {organise["renameByName"].get(k, k): v for k, v in row.items() if not organise["excludeByName"].get(k)}
            for row in rows
        ]
        if order:
            key = order[0]["displayName"]
            rows.sort(key=lambda row: row.get(key, math.inf), reverse=order[0].get("desc", False))
        names = list(dict.fromkeys(name for row in rows for name in row))
        width, top = (self.box.w - 24) / max(1, len(names)), self.box.y + 46
        coloured = any(
            "cellOptions" in p["id"] for o in self.panel["fieldConfig"]["overrides"] for p in o["properties"]
        )
        for column, name in enumerate(names):
            numeric = all(isinstance(row.get(name, 0.0), float) for row in rows)
            x = self.box.x + 14 + width * column + (width - 12) * numeric
            self.canvas.text(x, top, name, size=12, colour=COLOURS["blue"], right=numeric, within=width - 10)
            for number, row in enumerate(rows[: int((self.box.h - 60) // 25)]):
                y = top + 27 + 25 * number
                if not column:
                    self.canvas.patch(Box(self.box.x + 8, y - 13, self.box.w - 16, 1), GRID)
                value = row.get(name, "")
                unit = "s" if "spans" in self.targets[0] else self.unit
                text = units.write(unit, value, self.decimals) if isinstance(value, float) else str(value)
                colour = self.colour(value) if coloured and isinstance(value, float) else TEXT
                self.canvas.text(x, y, text, size=12.5, colour=colour, right=numeric, within=width - 10)

    def joined(self) -> list[dict[str, Any]]:
        """A row for each series, or for each value of the label that joins the queries."""
        by = next((t["options"]["byField"] for t in self.panel["transformations"] if t["id"] == "joinByField"), "")
        rows: dict[Any, dict[str, Any]] = {}
        for number, target in enumerate(self.targets):
            letter = self.panel["targets"][number]["refId"]
            for series in target["instant"]:
                key = series["metric"][by] if by else len(rows)
                row = rows.setdefault(key, {by: series["metric"][by]} if by else {})
                row |= {k: v for k, v in series["metric"].items() if k != by}
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
        y = self.box.y + 46
        for at, line, labels in sorted(found, key=lambda one: -one[0]):
            if y > self.box.y + self.box.h - 12:
                break
            level = {"error": "red", "info": "green", "warn": "yellow"}.get(labels.get("detected_level", ""), "blue")
            self.canvas.patch(Box(self.box.x + 10, y - 9, 3, 18), COLOURS[level])
            stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at / 1e9))
            width = self.canvas.text(self.box.x + 20, y, stamp, size=11, colour=FAINT, mono=True)
            self.canvas.text(
                self.box.x + 32 + width, y, line.splitlines()[0], size=11, mono=True, within=self.box.w - width - 44
            )
            y += 22
