"""Parameters, MACs and seconds a training step of each system of the comparisons, printed.

    python benchmarks/systems.py [--rounds 3]    # nothing else may run

The committed table, results/reference/cpu/systems.csv, is not touched: `srlib.grid` derives the steps of runs from it,
and a run's files are named by its steps. `--store` replaces it, for those who compute every grid again.

- `parameters`: of the network for the hippocampus data;
- `gmacs`: of one forward pass of one image of the default profile's patch, scan included;
- `step_seconds`: the median step of short trainings (`srlib.train`, default profile: batch 2, samples included)
  without their first steps. The systems take turns, so that what disturbs a machine for a while disturbs all.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from statistics import median
from unittest.mock import patch

import pandas as pd
import torch

from srlib import grid, paths, provenance, runs, tables, train

STEPS = 9  # of one training
WARM_UP = 3


def config_of(system: str) -> runs.RunConfig:
    """The short training of a system."""
    settings = grid.SYSTEMS[system].settings
    return runs.config_for("default", grid.DATASET, steps=STEPS, **settings)


def step_seconds(system: str) -> list[float]:
    """Seconds of each step of one short training."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, SRLIB_RESULTS=folder):
        return train.train(config_of(system)).history["seconds"].diff()[WARM_UP:].tolist()


def main() -> None:
    """Measure each system; print the table, write it when asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each system")
    parser.add_argument(
        "--store",
        action="store_true",
        help="replace the committed table: most runs of results/reference are then\nof other steps than planned, so"
        " that every grid but rates and cue begins anew",
    )
    options = parser.parse_args()
    rows = [
        {"system": key, "title": system.title, **grid.cost(key)}
        for key, system in grid.SYSTEMS.items()
    ]
    seconds: dict[str, list[float]] = {system: [] for system in grid.SYSTEMS}
    for _ in range(options.rounds):
        for system, found in seconds.items():
            found += step_seconds(system)
            print(f"{system:<16}{median(found):.3f} s a step", flush=True)
    for row, found in zip(rows, seconds.values(), strict=True):
        row |= {"step_seconds": median(found), "step_seconds_min": min(found)}
    facts = provenance.describe()
    made_with = {key: facts[key] for key in ("cpu", "threads", "commit")}
    table = pd.DataFrame(rows).assign(**made_with, torch=torch.__version__)
    print(table.to_string(index=False, float_format="%.5g"))
    if options.store:
        tables.write(table, paths.REFERENCE / "cpu" / "systems.csv", digits=5)


if __name__ == "__main__":
    main()
