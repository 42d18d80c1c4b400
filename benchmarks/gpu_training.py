"""Accuracy that seconds of training on a GPU buy: SegResMamba with and without its Mamba layers, and two peers.

    python benchmarks/gpu_training.py OUT.csv [--seconds 90] [--seed 0] [--systems segresmamba,none,segresnet,nnunet]

Hippocampus, fold 0, the 52 held-out cases; the systems of `srlib.grid`, peers scaled to `small`'s MACs. Each is trained
by `srlib.train` with a batch that keeps a GPU busy, for as many steps as the given seconds hold: the median step of a
short run says how many. So every system goes through its whole learning-rate schedule. A row is written as soon as it
is measured:

- `steps`, `batch_size`, `patch_size`, `learning_rate`, `seed`: of the run;
- `seconds`: of the training, samples included;
- `dice`: mean over classes, then cases; `dice_<class>`, `nsd`, `hd95`: means over cases (mm where that applies).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from srlib import grid, provenance, train
from srlib.evaluate import METRICS, evaluate
from srlib.runs import RunConfig, config_for

PROBE = 60  # steps of the run that measures a step; the first half compiles and warms up


def config_of(system: str, seed: int, steps: int, batch: int, rate: float) -> RunConfig:
    """The run of a system: the default profile's but for its batch and rate."""
    settings = {"batch_size": batch, "learning_rate": rate, **grid.SYSTEMS[system].settings}
    return config_for("default", grid.DATASET, seed=seed, steps=steps, **settings)


def row_of(system: str, seconds: float, seed: int, batch: int, rate: float) -> dict[str, object]:
    """Train a system for so many seconds and score it."""
    probe = train.train(config_of(system, seed, PROBE, batch, rate))
    step = probe.history["seconds"].diff().tail(PROBE // 2).median()
    config = config_of(system, seed, max(PROBE + 1, round(seconds / step)), batch, rate)
    result = train.train(config)
    table = evaluate(config)
    by_class = table.groupby("class", sort=False)["dice"].mean().add_prefix("dice_")
    settings = ("steps", "batch_size", "patch_size", "learning_rate", "precision", "fold", "seed")
    return {
        "system": grid.SYSTEMS[system].title,
        "parameters": sum(p.numel() for p in result.model.parameters()),
        **{name: getattr(config, name) for name in settings},
        "seconds": result.history["seconds"].iloc[-1],
        "ms_per_step": 1000 * step,
        "cases": table["case"].nunique(),
        **table[list(METRICS)].mean(),
        **by_class,
    }


def main() -> None:
    """Train, score and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument(
        "--systems",
        type=lambda names: names.split(","),
        default=["segresmamba", "none", "segresnet", "nnunet"],
    )
    options = parser.parse_args()
    if unknown := set(options.systems) - set(grid.SYSTEMS):
        parser.error(f"unknown systems {', '.join(unknown)}; choose from {', '.join(grid.SYSTEMS)}")
    rows = []
    for system in options.systems:
        settings = (options.seconds, options.seed, options.batch_size, options.learning_rate)
        rows.append(row_of(system, *settings))
        provenance.write_table(pd.DataFrame(rows), options.out)
        print(pd.Series(rows[-1]).to_string(), flush=True)


if __name__ == "__main__":
    main()
