"""Write the dashboards and the recording rules: `python -m dashboards [DIRECTORY]`, by default into `stack/`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards import hardware, ranks, run, telemetry_health
from dashboards.rules import recording_rules

STACK = Path(__file__).parent.parent / "stack"
DASHBOARDS = {
    "run": run.dashboard,
    "ranks": ranks.dashboard,
    "hardware": hardware.dashboard,
    "telemetry-health": telemetry_health.dashboard,
}


def write(stack: Path) -> None:
    """Write every file below `stack`."""
    for name, dashboard in DASHBOARDS.items():
        made = json.loads(json.dumps(dashboard().build(), cls=JSONEncoder))
        for shown in (*made["links"], *made["annotations"].get("list", ())):
            del shown["placement"]  # the SDK can only hide them in a menu
        text = json.dumps(made, indent=2, ensure_ascii=False)
        _write(stack / "dashboards" / f"{name}.json", text + "\n")
    _write(stack / "prometheus" / "recording.yml", recording_rules())


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else STACK)
