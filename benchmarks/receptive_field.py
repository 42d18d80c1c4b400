"""Effective receptive fields, trained and untrained: results/reference/hippocampus/receptive_field.csv.

    python benchmarks/receptive_field.py [--cases 16] [--fold 0] [--systems segresmamba none ...]

Weights are not in the repository, so this belongs where the runs of the grids `tom` and `ablations` were trained: one
fold, every seed. Of a run that is not here the rows of the table stay, if it is of the same fold; where it has none
for trained weights, the run is named. The field (`srlib.receptive`) is averaged over the first held-out cases, each in
the middle of a patch. Columns:

- `system`, `fold`, `seed`, `steps`, `cases`: the run, and how many cases the field is averaged over;
- `device`: what the field was computed on;
- `weights`: `trained`, or `untrained`: those that the same seed begins with;
- `radius_95_mm`: the radius of the ball about the output voxel that holds 95 % of the field;
- `radius_mm`, `share`: the share of the field that a ball of this radius holds.
"""

from __future__ import annotations

import argparse
import sys

import pandas as pd
from torch import nn

from srlib import data, evaluate, grid, paths, provenance, receptive, runs, tables, train

SYSTEMS = (*grid.TOM, *grid.ABLATIONS)
ORDER = {system: number for number, system in enumerate(SYSTEMS)}
KEY = ["system", "fold", "seed", "steps", "weights", "cases"]


def rows_of(config: runs.RunConfig, weights: str, network: nn.Module, cases: int) -> pd.DataFrame:
    """The profile of one network."""
    images = receptive.centred_images(
        config.dataset, evaluate.test_cases(config)[:cases], config.patch_size
    )
    spacing = data.get(config.dataset).spacing
    network = network.to(runs.device()).eval()
    field = receptive.effective_field(network, [image.to(runs.device()) for image in images])
    key = {"system": config.system}
    key |= {name: getattr(config, name) for name in ("fold", "seed", "steps")}
    key |= {"weights": weights, "cases": cases, "radius_95_mm": receptive.radius(field, spacing)}
    key |= {"device": provenance.device_name()}
    print(*key.values(), flush=True)
    return receptive.profile(field, spacing).assign(**key)


def main() -> None:
    """Compute the field of each run that is here, and write the table with what it held before."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=16)
    parser.add_argument("--fold", type=int, default=0, choices=grid.FOLDS)
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, choices=SYSTEMS)
    options = parser.parse_args()
    file = paths.REFERENCE / grid.DATASET / "receptive_field.csv"
    before = tables.read(file) if file.is_file() else pd.DataFrame(columns=KEY)
    found = []
    for config in (*grid.configs("tom"), *grid.configs("ablations")):
        if config.fold != options.fold or config.system not in options.systems:
            continue
        networks = {"untrained": train.build_model(config)}
        if runs.is_done(config):
            networks["trained"] = train.load_model(config)
        for weights, network in networks.items():
            found.append(rows_of(config, weights, network, options.cases))
    known = before[before["fold"] == options.fold]
    computed = pd.concat(found)
    kept = known[~known.set_index(KEY).index.isin(computed.set_index(KEY).index)]
    table = pd.concat([kept, computed]).sort_values(
        ["weights", "system", "seed"],
        key=lambda column: column.map(ORDER) if column.name == "system" else column,
        ascending=[False, True, True],
        kind="stable",
    )
    provenance.write_table(table, file)
    kinds = table.groupby(["system", "seed"], sort=False)["weights"].nunique()
    for system, seed in kinds.index[kinds < 2]:
        print(f"not trained here: {system}, seed {seed}", file=sys.stderr)


if __name__ == "__main__":
    main()
