"""An evsys run whose log store is stepspan: the loop is evsys's own, the store comes from YAML.

pip install 'stepspan[yaml]'
python examples/evsys_store.py
stepspan sync stepspan-runs --endpoint http://localhost:4318
"""

from __future__ import annotations

from pathlib import Path

import yaml

from stepspan.stores import LogStore, make_log_store


def train(store: LogStore) -> None:
    """Use a log store as an evsys algorithm does."""
    store.log_hyperparams({"lr": 3e-4, "batch_size": 64})
    for step in range(20):
        store.log_metrics({"loss": 2.0 / (step + 1), "grad_norm": 1.0 / (step + 1)}, step)
        if step % 5 == 4:
            store.log_metrics({"val/accuracy": 0.5 + step / 40}, step, split="val")
    store.log_artifact("final", "checkpoints/final.pt", kind="checkpoint")


def main() -> None:
    """Make the store that the YAML file describes, and train."""
    config = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    store = make_log_store(config["log_store"])
    try:
        train(store)
    finally:
        store.close()


if __name__ == "__main__":
    main()
