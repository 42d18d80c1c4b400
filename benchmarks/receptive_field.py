"""Effective receptive fields, trained and untrained: results/reference/hippocampus/receptive_field.csv.

    python benchmarks/receptive_field.py [--cases 16] [--fold 0] [--systems both none ...]

Weights are not in the repository, so this belongs where the runs of the grids `tom` and `ablations` were trained: one
fold, every seed. A run that is not there is named, and only its untrained network is looked at. The field
(`srlib.receptive`) is averaged over the first held-out cases, each in the middle of a patch. Columns:

- `system`, `fold`, `seed`, `steps`, `cases`: the run, and how many cases the field is averaged over;
- `weights`: `trained`, or `untrained`: those that the same seed begins with;
- `radius_95_mm`: the radius of the ball about the output voxel that holds 95 % of the field;
- `radius_mm`, `share`: the share of the field that a ball of this radius holds.
"""

from __future__ import annotations

import argparse
import sys

import pandas as pd
from torch import nn

from srlib import data, evaluate, grid, paths, provenance, receptive, runs, train

SYSTEMS = (*grid.TOM, *grid.ABLATIONS)


def rows_of(config: runs.RunConfig, weights: str, network: nn.Module, cases: int) -> pd.DataFrame:
    """The profile of one network."""
    images = receptive.centred_images(
        config.dataset, evaluate.test_cases(config)[:cases], config.patch_size
    )
    spacing = data.get(config.dataset).spacing
    network = network.to(runs.device()).eval()
    field = receptive.effective_field(network, [image.to(runs.device()) for image in images])
    key = {"system": grid.system_of(config)}
    key |= {name: getattr(config, name) for name in ("fold", "seed", "steps")}
    key |= {"weights": weights, "cases": cases, "radius_95_mm": receptive.radius(field, spacing)}
    print(*key.values(), flush=True)
    return receptive.profile(field, spacing).assign(**key)


def main() -> None:
    """Compute the field of each run that is here; write the table when all are done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=16)
    parser.add_argument("--fold", type=int, default=0, choices=grid.FOLDS)
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, choices=SYSTEMS)
    options = parser.parse_args()
    tables = []
    for config in (*grid.configs("tom"), *grid.configs("ablations")):
        if config.fold != options.fold or grid.system_of(config) not in options.systems:
            continue
        tables.append(rows_of(config, "untrained", train.build_model(config), options.cases))
        if runs.is_done(config):
            tables.append(rows_of(config, "trained", train.load_model(config), options.cases))
        else:
            print(f"not trained here: {grid.run_name(config)}", file=sys.stderr)
    file = paths.REFERENCE / grid.DATASET / "receptive_field.csv"
    provenance.write_table(pd.concat(tables), file)


if __name__ == "__main__":
    main()
