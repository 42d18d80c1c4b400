"""Makes once, from trainings and tables, what is committed: small networks, receptive fields, README's tables.

python benchmarks/publish.py network hippocampus    # results/reference/hippocampus/tiny.*; --size small: small.*
python benchmarks/publish.py field                  # results/reference/hippocampus/receptive_field.csv
python benchmarks/publish.py scale                  # prints the tables of what fits where and what it costs
"""

from __future__ import annotations

import tempfile
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from torch import nn

from srlib import data, files, machine, tables
from srlib.export.hub import card
from srlib.net.peers import PEERS, SMALL
from srlib.run import evaluate, predict, runs, train
from srlib.run.runs import RunConfig
from srlib.run.train import load_trained, save_trained
from srlib.study import grid, receptive

app = typer.Typer(help=__doc__, rich_markup_mode=None)

# --- A small trained network, and its model card --------------------------------------------------

USE = """`python -m srlib predict {file} SCAN... --out DIR`{also}. It shows what the network does; no
  result of the collection rests on it. The weights are rounded to {precision}"""
HALF = {"tiny": torch.float16, "small": torch.bfloat16}

LICENCE = "that of the data (NOTICE)"


@app.command()
def network(dataset: str, size: str = "tiny") -> None:
    """Train a size on fold 0, round its weights to two bytes each, score the rounded ones, write network and card.

    `tiny` is trained as a CPU can, in 1,500 steps of 2 patches; `small` is the best training of the plan's
    search for a rate, and asks for a GPU.
    """
    if size == "tiny":
        config = runs.config_for("default", dataset, steps=1500, model=size, learning_rate=4e-3)
    elif size == "small" and dataset == grid.DATASET:
        best = ("segresmamba", grid.learning_rates()["segresmamba"])
        (config,) = (c for c in grid.configs("rates") if (c.system, c.learning_rate) == best)
    else:
        raise typer.BadParameter(
            f"expected size tiny, or small and {grid.DATASET}; not {size}, {dataset}"
        )
    trained = load_trained(train.train(config).run_dir)
    rounded = trained._replace(weights={k: v.to(HALF[size]) for k, v in trained.weights.items()})
    with tempfile.TemporaryDirectory() as scratch:  # where the predictions go
        save_trained(Path(scratch, f"{size}.safetensors"), rounded)
        scores = evaluate.evaluate(config, checkpoint=Path(scratch, f"{size}.safetensors"))
    file = predict.provided(dataset).with_stem(size)
    save_trained(file, rounded)
    also = ", and `00_start_here`" if size == "tiny" else ""
    chosen = ". Recipe and rate were chosen on the held-out cases below" if size == "small" else ""
    precision = str(HALF[size]).removeprefix("torch.")
    use = USE.format(file=file.relative_to(files.ROOT), also=also, precision=precision)
    use += f"{chosen}. Trained on {machine.device_name()}, commit {machine.commit()[0][:7]}"
    with files.atomic_path(file.with_suffix(".md")) as temporary:
        temporary.write_text(card(rounded, scores, use, LICENCE), encoding="utf-8")
    typer.echo(file.with_suffix(".md").read_text())


# --- Effective receptive fields -------------------------------------------------------------------

FIELD_KEY = ["system", "fold", "seed", "steps", "weights", "cases"]


@app.command()
def field(
    cases: int = 16,
    fold: int = grid.FOLDS[0],
    system: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
) -> None:
    """Compute receptive fields, trained and untrained, where runs of the plan were trained, in one fold.

    Weights are not in the repository; of a run that is not here the rows of the table stay, if they are of the same
    fold. The field (`srlib.study.receptive`) is averaged over the first held-out cases, each in the middle of a patch.
    Columns: `system`, `fold`, `seed`, `steps`, `cases`: the run, and how many cases the field is averaged over;
    `device`; `weights`: `trained`, or `untrained`, those that the same seed begins with; `radius_95_mm`: of the ball
    about the output voxel that holds 95 % of the field; `radius_mm`, `share`: of it in a ball of this radius.
    """
    order = {name: number for number, name in enumerate((*grid.TOM, *grid.ABLATIONS))}
    file = files.REFERENCE / grid.DATASET / "receptive_field.csv"
    found = []
    for config in (c for name in ("tom", "seeds", "ablations") for c in grid.configs(name)):
        if config.fold != fold or config.system not in (system or order):
            continue
        found.append(rows_of(config, "untrained", train.build_model(config), cases))
        if runs.is_done(config):
            found.append(rows_of(config, "trained", train.train(config).model, cases))
    table = pd.concat(found)
    if file.is_file():
        before = tables.read(file).query("fold == @fold")
        again = before.set_index(FIELD_KEY).index.isin(table.set_index(FIELD_KEY).index)
        table = pd.concat([before[~again], table])
    table = table.sort_values(
        ["weights", "system", "seed"],
        key=lambda column: column.map(order) if column.name == "system" else column,
        ascending=[False, True, True],
        kind="stable",
    )
    machine.write_table(table, file)
    kinds = table.groupby(["system", "seed"], sort=False)["weights"].nunique()
    for name, seed in kinds.index[kinds < 2]:
        typer.echo(f"not trained here: {name}, seed {seed}", err=True)


def rows_of(config: RunConfig, weights: str, network: nn.Module, cases: int) -> pd.DataFrame:
    """The field of one network within each radius."""
    dataset, held_out = data.open(config.dataset), evaluate.test_cases(config)[:cases]
    images = receptive.centred_images(dataset, held_out, config.patch_size)
    spacing = dataset.entry.spacing
    network = network.to(machine.device()).eval()
    found = receptive.effective_field(network, [image.to(machine.device()) for image in images])
    key = {name: getattr(config, name) for name in FIELD_KEY[:4]}
    key |= {"weights": weights, "cases": cases, "radius_95_mm": receptive.radius(found, spacing)}
    key |= {"device": machine.device_name()}
    print(*key.values(), flush=True)
    return receptive.share_by_radius(found, spacing).assign(**key)


# --- What fits where, and what the comparisons cost -----------------------------------------------

MEMORY = (4, 8, 12, 24)  # GiB
STEPS_OF = ("segresmamba", "none", *SMALL)
LEFT = 0.75  # of the memory: the rest is for the CUDA context, work spaces and fragmentation


@app.command()
def scale() -> None:
    """Print the tables, which stand in the documents by hand; tests/study/test_publish.py holds them to these."""
    typer.echo("\n\n".join(map(markdown, (fits(), steps(), cost()))))


def steps() -> pd.DataFrame:
    """A row a network, a column a size and precision: milliseconds of a step, captured / launched from Python.

    Of the paper's size by `results/reference/gpu/step.csv`, activations kept; small ones by `small.csv` beside it.
    """
    paper, small = (
        tables.read(files.REFERENCE / "gpu" / f"{name}.csv") for name in ("step", "small")
    )
    paper = paper[paper["recomputation"] == "off"].rename(columns={"network": "system"})
    paper["system"] = paper["system"].replace("segresmamba_none", "none")
    columns = {}
    for (size, table), precision in product(
        {"paper": paper, "small": small}.items(), ("fp32", "bf16")
    ):
        of = table[table["precision"] == precision].set_index("system").reindex(STEPS_OF)
        text = [
            f"{a:.1f} / {b:.0f}" for a, b in zip(of["captured_ms"], of["eager_ms"], strict=True)
        ]
        columns[f"{size}, {precision}"] = text
    titles = [grid.SYSTEMS[name].title for name in STEPS_OF]
    return pd.DataFrame(columns, index=titles).rename_axis("network")


def fits() -> pd.DataFrame:
    """A row a system, a column a size of memory: voxels along the cube's edge in fp32 / in bf16.

    The largest cube that a training step with one image takes, from `results/reference/memory/counted.csv`.
    """
    counted = tables.read(files.REFERENCE / "memory" / "counted.csv")
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
    """A row a grid, then all of them, each run once: runs, steps, hours of a GPU; runs that are there, their hours.

    Hours by the captured step of `results/reference/gpu/plan_steps.csv`, without samples. A step on volumes of the
    diagnostic task counts by its voxels, one of the released variant, which was not measured, as the convolution's.
    `recorded hours` are those of the trainings where they were done, on whatever device, beside others on it.
    """
    step = grid.plan_steps()
    grids = {name: grid.configs(name) for name in grid.GRIDS}
    grids["all"] = tuple({config: None for configs in grids.values() for config in configs})
    rows = {}
    for name, configs in grids.items():
        steps = pd.Series([config.steps for config in configs])
        voxels = pd.Series([config.batch_size * prod(config.patch_size) for config in configs])
        of_plan = voxels / (grid.BATCH * prod(grid.PATCH))
        milliseconds = pd.Series([step.get(config.system, step["conv"]) for config in configs])
        hours = (steps * of_plan * milliseconds).sum() / 3.6e6
        rows[name] = {"runs": len(configs), "steps": steps.sum(), "GPU hours": hours}
        there = [grid.kept(c.dataset).records.get(grid.run_name(c)) for c in configs]
        taken = [record.get("training_seconds", 0) / 3600 for record in there if record]
        rows[name] |= {"kept": len(taken), "recorded hours": sum(taken)}
    return pd.DataFrame(rows).T.rename_axis("grid")


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown: whole numbers, hours with two decimals."""
    lines = [[table.index.name, *table.columns], ["---"] * (1 + len(table.columns))]
    for index, row in table.iterrows():
        cells = [v if isinstance(v, str) else f"{v:,.2f}".removesuffix(".00") for v in row]
        lines.append([f"{index}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    app()
