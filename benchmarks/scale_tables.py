"""The tables of docs/gpu.md and docs/scale-out.md, from the tables that the repository holds. Nothing is measured.

    python benchmarks/scale_tables.py         # prints them

- `fits`: the largest cube that a training step with one image takes, by the GPU's memory, from
  `results/reference/memory/counted.csv`; a quarter of the memory is left for what is not counted;
- `cost`: each grid's runs and steps; hours on the CPU of `results/reference/cpu/systems.csv`; hours on a GPU by the
  fastest of each system's runs in the learning-rate search, ablations by SegResMamba's.
"""

from __future__ import annotations

from math import prod

import pandas as pd

from srlib import grid, paths, tables
from srlib.baselines import PEERS
from srlib.runs import config_for

MEMORY = (4, 8, 12, 24)  # GiB
LEFT = 0.75  # of the memory: the rest is for the CUDA context, work spaces and fragmentation


def fits() -> pd.DataFrame:
    """A row a system, a column a size of memory: voxels along the cube's edge in fp32 / in bf16."""
    counted = tables.read(paths.REFERENCE / "memory" / "counted.csv")
    counted = counted[~counted["checkpointing"]]
    columns = {}
    for memory in MEMORY:
        inside = counted[counted["peak"] <= LEFT * memory]
        largest = inside.groupby(["peer", "precision"])["size"].max().unstack().reindex([*PEERS])
        text = largest.map(lambda size: f"{size:.0f}", na_action="ignore").fillna("-")
        columns[f"{memory} GiB"] = text["fp32"] + " / " + text["bf16"]
    titles = [PEERS[name].title for name in columns["4 GiB"].index]
    return pd.DataFrame(columns).set_axis(titles).rename_axis("system")


def cost() -> pd.DataFrame:
    """A row a grid, then all of them, each run once: runs, steps, hours.

    A step on the volumes of the diagnostic task counts by their voxels.
    """
    seconds = {"CPU hours": grid.systems()["step_seconds"], "GPU hours": gpu_seconds()}
    of_default = prod(config_for("default", grid.DATASET).patch_size)
    grids = {name: grid.configs(name) for name in grid.GRIDS}
    grids["all"] = tuple({config: None for configs in grids.values() for config in configs})
    rows = {}
    for name, configs in grids.items():
        steps = pd.Series([config.steps for config in configs])
        sizes = pd.Series([prod(config.patch_size) / of_default for config in configs])
        systems = pd.Series([config.system for config in configs])
        rows[name] = {"runs": len(configs), "steps": steps.sum()} | {
            hours: (steps * sizes * systems.map(step)).sum() / 3600
            for hours, step in seconds.items()
        }
    return pd.DataFrame(rows).T.rename_axis("grid")


def gpu_seconds() -> pd.Series:
    """Seconds of a step of each system on the GPU of the learning-rate search."""
    runs = grid.runs("rates")
    fastest = (runs["seconds"] / runs["steps"]).groupby(runs["system"]).min()
    return fastest.reindex([*grid.SYSTEMS]).fillna(fastest["segresmamba"])


def markdown(table: pd.DataFrame) -> str:
    """A table as the pages have it: whole numbers, hours with one decimal."""
    lines = [[table.index.name, *table.columns], ["---"] * (1 + len(table.columns))]
    for index, row in table.iterrows():
        cells = [v if isinstance(v, str) else f"{v:,.1f}".removesuffix(".0") for v in row]
        lines.append([f"{index}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print both."""
    print(markdown(fits()), markdown(cost()), sep="\n\n")


if __name__ == "__main__":
    main()
