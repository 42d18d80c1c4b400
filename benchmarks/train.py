"""Trainings: the accuracy that seconds on a GPU buy, and whether work survives `kill -9`.

python benchmarks/train.py seconds OUT.csv      # results/reference/gpu/training.csv
python benchmarks/train.py kill --kills 10      # results/reference/cpu/kill_test.csv
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pandas as pd
import torch
import typer
from safetensors.torch import load_file

from srlib import grid, provenance, tables, train
from srlib.evaluate import METRICS, evaluate
from srlib.paths import REFERENCE

app = typer.Typer(help=__doc__, rich_markup_mode=None)

# --- Seconds of a GPU -----------------------------------------------------------------------------

PROBE = 60  # steps of the run that measures a step; the first half compiles and warms up


@app.command()
def seconds(
    out: Path,
    limit: Annotated[float, typer.Option("--seconds", help="Of each training.")] = 90,
    system: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    seed: int = 0,
    batch_size: int = 8,
    learning_rate: float = 4e-3,
) -> None:
    """Train systems of `srlib.grid` on hippocampus, fold 0, for so many seconds, and score them.

    With a batch that keeps a GPU busy, and for as many steps as the seconds hold by the median step of a short run, so
    that every system goes through its whole learning-rate schedule. A row is written as soon as it is measured:
    settings of the run; `seconds` of the training, samples included; `dice` (mean over classes, then cases),
    `dice_<class>`, `nsd`, `hd95` (mm): means over the held-out cases.
    """
    rows = []
    for key in system or ("segresmamba", "none", "segresnet", "nnunet"):
        options = {"seed": seed, "batch_size": batch_size, "learning_rate": learning_rate}
        probe = train.train(grid.config_of(key, steps=PROBE, **options))
        step = probe.history["seconds"].diff().tail(PROBE // 2).median()
        config = grid.config_of(key, steps=max(PROBE + 1, round(limit / step)), **options)
        result, table = train.train(config), evaluate(config)
        by_class = table.groupby("class", sort=False)["dice"].mean().add_prefix("dice_")
        settings = ("steps", "batch_size", "patch_size", "learning_rate", "precision")
        rows.append(
            {
                "system": grid.SYSTEMS[key].title,
                "parameters": sum(p.numel() for p in result.model.parameters()),
                **{name: getattr(config, name) for name in (*settings, "fold", "seed")},
                "seconds": result.history["seconds"].iloc[-1],
                "ms_per_step": 1000 * step,
                "cases": table["case"].nunique(),
                **table[list(METRICS)].mean(),
                **by_class,
            }
        )
        provenance.write_table(pd.DataFrame(rows), out)
        print(pd.Series(rows[-1]).to_string(), flush=True)


# --- kill -9 --------------------------------------------------------------------------------------

TRAINING = (
    "from srlib import train, runs; "
    "config = runs.config_for('smoke', 'mni152', steps=30); "
    "train.train(config, progress=False, checkpoint_seconds=0.2)"
)
NOTEBOOKS = ("00", "03")  # train, segment, train again from a state; write figures and tables


class Work(NamedTuple):
    """Something that is killed.

    Attributes:
        command: what is started.
        kept: a results folder -> what is there already.
        result: a results folder -> everything that must come out the same.
    """

    command: list[str]
    kept: Callable[[Path], int]
    result: Callable[[Path], dict[str, bytes]]


def steps(results: Path) -> int:
    """Steps of the training that its checkpoint holds."""
    for file in results.glob("runs/*/checkpoint.pt"):
        return len(torch.load(file, weights_only=True)["history"])
    return 0


def weights_and_losses(results: Path) -> dict[str, bytes]:
    """The trained weights, and loss and learning rate of every step."""
    (run,) = results.glob("runs/*")
    weights = load_file(run / "model.safetensors")
    found = {name: tensor.numpy().tobytes() for name, tensor in weights.items()}
    history = tables.read(run / "history.csv").drop(columns="seconds")
    return found | {"history": history.to_numpy().tobytes()}


def finished_notebooks(results: Path) -> int:
    """Notebooks that the manifest lists."""
    for file in results.glob("smoke/mni152/manifest.json"):
        return len(json.loads(file.read_text())["notebooks"])
    return 0


def notebook_tables(results: Path) -> dict[str, bytes]:
    """The tables of the collection."""
    return {file.name: file.read_bytes() for file in results.glob("smoke/mni152/tables/*.csv")}


WORKS = {
    "training": Work([sys.executable, "-c", TRAINING], steps, weights_and_losses),
    "collection": Work(
        [sys.executable, "-m", "srlib", "collection", "--profile", "smoke"]
        + [word for name in NOTEBOOKS for word in ("--only", name)],
        finished_notebooks,
        notebook_tables,
    ),
}


def run(work: Work, results: Path, moment: float | None) -> bool:
    """Start the work and kill it at that moment; returns whether it ended by itself before."""
    process = subprocess.Popen(
        work.command,
        env=os.environ | {"SRLIB_RESULTS": str(results)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        _, errors = process.communicate(timeout=moment)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return False
    if process.returncode:
        raise RuntimeError(f"ended with status {process.returncode}: {errors.decode()}")
    return True


def disturb(name: str, kills: int, rng: np.random.Generator) -> Iterator[dict]:
    """One row for each start of the work, until it was killed so often and has finished."""
    work, left, round_ = WORKS[name], kills, 0
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        run(work, Path(folder), None)
        duration, expected = time.perf_counter() - begun, work.result(Path(folder))
    print(f"{name}: {duration:.1f} s undisturbed, {len(expected)} tables", flush=True)
    while left:
        round_ += 1
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            results, start, finished = Path(folder), 0, False
            while not finished:
                start += 1
                moment = rng.uniform(0, duration) if left else None
                finished = run(work, results, moment)
                left -= not finished
                row = {"what": name, "round": round_, "start": start, "moment": moment}
                if finished:
                    row |= {"moment": None, "ended": "finished", "kept": None}
                    row["same"] = work.result(results) == expected
                else:
                    row |= {"ended": "killed", "kept": work.kept(results), "same": None}
                yield row


@app.command()
def kill(
    kills: Annotated[int, typer.Option(help="Of each of the two.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    out: Path = REFERENCE / "cpu" / "kill_test.csv",
) -> None:
    """Kill a training and a run of the collection at random moments, start them again, compare what comes out.

    First each runs undisturbed; its results are what is expected and its time T is what moments are drawn from. Then it
    is started in an empty folder, killed after a uniformly random time below T, started again and so on, until it ends
    before it is killed; what it then leaves is compared with the undisturbed run's, byte by byte. With kills left over,
    it begins again in an empty folder. Only the program itself is killed, as the system does when memory runs out; the
    notebook's kernel then ends by itself.

    Columns: `what`, `round` (one folder), `start` within it, `moment` (s after the start; empty where it ended by
    itself), `ended` (`killed` or `finished`), `kept` (what a killed start left: steps in the training's checkpoint,
    which is gone when the training is done; notebooks in the collection's manifest), `same` (whether all agrees).
    """
    rng, rows = np.random.default_rng(seed), []
    for name in WORKS:
        for row in disturb(name, kills, rng):
            print(row, flush=True)
            rows.append(row)
            provenance.write_table(pd.DataFrame(rows), out)
    ended = [row["same"] for row in rows if row["ended"] == "finished"]
    print(f"{len(rows) - len(ended)} kills, {len(ended)} ends, {sum(ended)} same")
    if not all(ended):
        sys.exit("results differ from those of the undisturbed run")


if __name__ == "__main__":
    app()
