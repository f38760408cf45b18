"""Values as Grafana writes them, by a panel's unit."""

from __future__ import annotations

import math
from collections.abc import Callable

SI = ("", "k", "M", "G", "T", "P")
IEC = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
SHORT = ("", " K", " Mil", " Bil", " Tri")
DURATIONS = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))


def plain(value: float, decimals: int | None = None) -> str:
    """With `decimals`, else three digits that count."""
    if decimals is not None:
        return f"{value:.{decimals}f}"
    digits = 0 if value == 0 or abs(value) >= 100 else max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{min(digits, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def scaled(base: int, names: tuple[str, ...], gap: str = "", unit: str = "") -> Callable[[float, int | None], str]:
    def written(value: float, decimals: int | None = None) -> str:
        power = 0 if abs(value) < base else min(len(names) - 1, int(math.log(abs(value), base) + 1e-9))
        return f"{plain(value / base**power, decimals)}{gap}{names[power]}{unit}"

    return written


def seconds(value: float, decimals: int | None = None) -> str:
    size = abs(value)
    for least, divisor, name in ((3600, 3600, "hours"), (60, 60, "mins"), (1, 1, "s"), (1e-3, 1e-3, "ms")):
        if size >= least:
            return f"{plain(value / divisor, decimals)} {name}"
    return "0 s" if value == 0 else f"{plain(value * 1e6, decimals)} µs"


def duration(value: float) -> str:
    """In words, to the second."""
    parts: list[str] = []
    rest = abs(value)
    for name, size in DURATIONS:
        count, begun = int(rest // size), bool(parts)
        if count or begun:
            parts.append(f"{count} {name}{'' if count == 1 else 's'}")
            rest -= count * size
    return ", ".join(parts) or "0 seconds"


WRITTEN: dict[str, Callable[[float, int | None], str]] = {
    "none": plain,
    "short": scaled(1000, SHORT),
    "s": seconds,
    "percentunit": lambda value, decimals: plain(round(100 * value, 2), decimals) + "%",
    "bytes": scaled(1024, IEC, " "),
    "Bps": scaled(1000, SI, " ", "B/s"),
    "watt": scaled(1000, SI, " ", "W"),
    "celsius": lambda value, decimals: plain(value, decimals) + " °C",
    "hertz": scaled(1000, SI, " ", "Hz"),
}


def write(unit: str, value: float, decimals: int | None = None) -> str:
    """A value with its unit."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞"
    if unit.startswith("suffix:"):
        return plain(value, decimals) + unit.removeprefix("suffix:")
    return WRITTEN[unit](value, decimals)
