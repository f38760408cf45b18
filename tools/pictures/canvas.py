"""A picture in pixels: text, boxes, axes and their ticks."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

WIDTH, GAP = 1320, 8
CANVAS, PANEL, EDGE, TEXT, FAINT, GRID = "#111217", "#181b1f", "#2c2e34", "#d5d6df", "#9a9ba6", "#2a2c31"


@dataclass(frozen=True)
class Box:
    """Pixels; y goes down."""

    x: float
    y: float
    w: float
    h: float


class Canvas:
    """A picture in pixels from its top left corner."""

    def __init__(self, height: int) -> None:
        self.height = height
        self.figure = Figure(figsize=(WIDTH / 100, height / 100), dpi=100, facecolor=CANVAS)
        self.agg = FigureCanvasAgg(self.figure)

    def text(
        self, x: float, y: float, text: str, *, size: float = 12, colour: str = TEXT, right: bool = False,
        centre: bool = False, weight: str = "normal", within: float = 0.0, mono: bool = False,
    ) -> float:  # fmt: skip
        """One line around height `y`, cut to `within`. Its width."""
        how = {"fontsize": size * 0.72, "family": "DejaVu Sans Mono" if mono else "DejaVu Sans", "weight": weight}
        text = text.replace("$", r"\$")
        drawn = self.figure.text(
            x / WIDTH, 1 - y / self.height, text, color=colour, va="center",
            ha="right" if right else "center" if centre else "left", **how,
        )  # fmt: skip
        width = drawn.get_window_extent(self.agg.get_renderer()).width
        while within and width > within and len(text) > 2:
            text = text[: max(1, min(len(text) - 2, int(len(text) * within / width)))].rstrip(" …") + "…"
            drawn.set_text(text)
            width = drawn.get_window_extent(self.agg.get_renderer()).width
        return float(width)

    def patch(self, box: Box, colour: str, *, edge: str = "none", round_: float = 0.0) -> None:
        x, y = box.x / WIDTH, 1 - (box.y + box.h) / self.height
        w, h = box.w / WIDTH, box.h / self.height
        how = {
            "facecolor": colour,
            "edgecolor": edge,
            "transform": self.figure.transFigure,
            "linewidth": 0.8,
            "zorder": -1,
        }
        shape: Any = Rectangle((x, y), w, h, **how)
        if round_:
            style = f"round,pad=0,rounding_size={round_ / WIDTH}"
            shape = FancyBboxPatch((x, y), w, h, boxstyle=style, mutation_aspect=WIDTH / self.height, **how)
        self.figure.add_artist(shape)

    def axes(self, box: Box) -> Axes:
        x, y = box.x / WIDTH, 1 - (box.y + box.h) / self.height
        axes = self.figure.add_axes((x, y, box.w / WIDTH, box.h / self.height), facecolor="none")
        for side in axes.spines.values():
            side.set_visible(False)
        axes.tick_params(length=0, labelsize=11 * 0.72, labelcolor=FAINT, pad=4)
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        return axes

    def save(self, path: Path) -> None:
        raw = io.BytesIO()
        self.figure.savefig(raw, format="png", facecolor=CANVAS)
        image = Image.open(raw).convert("RGB").point([value & 0xFC | value >> 6 for value in range(256)] * 3)
        image.save(path, optimize=True)  # with six bits a colour, much smaller, and no palette that bends them


class Binary(MaxNLocator):
    """Ticks at round numbers of KiB, MiB or GiB."""

    def tick_values(self, vmin: float, vmax: float) -> Any:
        power = 0 if vmax < 1024 else int(math.log(vmax, 1024))
        return MaxNLocator(5).tick_values(vmin / 1024**power, vmax / 1024**power) * 1024**power
