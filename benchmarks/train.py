"""Trainings: several GPUs, the same bits again, and work after `kill -9`.

python benchmarks/train.py gpus OUT.csv         # results/reference/gpu/ddp.csv
python benchmarks/train.py determinism OUT.csv  # results/reference/gpu/determinism.csv
python benchmarks/train.py default OUT.csv      # results/reference/cpu/default.csv
python benchmarks/train.py kill --kills 10      # results/reference/cpu/kill_test.csv
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from itertools import pairwise
from math import nan
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
import typer
from safetensors.torch import load_file

from srlib import data, machine, tables
from srlib.files import REFERENCE
from srlib.run import train
from srlib.run.captured import CapturedStep, capturable
from srlib.run.runs import RunConfig, config_for, run_dir
from srlib.study import grid

app = typer.Typer(help=__doc__, rich_markup_mode=None)

# --- Several GPUs of one host ---------------------------------------------------------------------

SETTINGS = ("model", "patch_size", "precision", "batch_size")
CUBE = (96, 96, 96)
LOSSES = tuple(
    config_for("default", "hippocampus", steps=12, warmup=1 / 3, precision=precision)
    for precision in ("64-true", "32-true")
)
TIMES = tuple(
    config_for(profile, "hippocampus", batch_size=batch, patch_size=patch_size, precision=precision)
    for precision in ("32-true", "bf16-mixed")
    for profile, batch, patch_size in (("default", 16, grid.PATCH), ("full", 2, CUBE))
)
WARM_UP, STEPS = 10, 30  # steps of a measurement: compiled and settled, then counted


@app.command()
def gpus(out: Path, processes: int = 2) -> None:
    """Compare several GPUs with one: the same losses at the same global batch, and what a step costs.

    Starts itself under torchrun with one process, then with several. Two kinds of rows:

    `losses`: `srlib.run.train` on hippocampus, fold 0, a short training with cuDNN's deterministic algorithms and
    without TF32. `first_losses` are those of five steps; `loss_difference` is the largest one to one process's losses
    at the same step, absolute; for one process, to its own second training. In float32 rounding grows within some
    steps (`tests/run/` says why).

    `time`: a step on random images, as the training does it, the loss read at its end; `eager_ms`, `captured_ms`: the
    medians, of the slowest process, launched from Python and as a CUDA graph; `speedup` is against one process at the
    same global batch, both captured. `error`: why there is nothing.
    """
    alone, several = (torchrun(number) for number in (1, processes))
    table = compared(alone, several)
    machine.write_table(table, out)
    print(table.to_string(index=False, float_format="%.6g"))


def torchrun(processes: int) -> list[dict[str, Any]]:
    """The rows of `worker` with so many processes, as far as it got."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        subprocess.run([sys.executable, *launcher, __file__, "worker", folder], check=False)
        found = Path(folder, "found.json")
        return json.loads(found.read_text()) if found.exists() else []


@app.command(hidden=True)
def worker(folder: Path) -> None:
    """Do what each process of torchrun does; the first writes what was found to `folder`."""
    rows = []
    for what, config in [*(("time", c) for c in TIMES), *(("losses", c) for c in LOSSES)]:
        row: dict[str, Any] = {"what": what, "processes": machine.processes()}
        row |= {name: getattr(config, name) for name in SETTINGS}
        try:
            row |= times(config) if what == "time" else losses(config, folder)
        except Exception as error:  # the others are measured all the same
            row["error"] = " ".join(f"{type(error).__name__}: {error}".split())
        rows.append(row)
        if machine.is_first_process():
            print(row, flush=True)
            (folder / "found.json").write_text(json.dumps(rows))


def losses(config: RunConfig, folder: Path) -> dict[str, list[list[float]]]:
    """The losses of a short training, exact as far as sums in one order are, done twice."""
    exact, found = {"allow_tf32": False, "deterministic": True, "benchmark": False}, []
    for name in ("first", "second"):
        with (
            torch.backends.cudnn.flags(enabled=True, **exact),
            patch.dict(os.environ, SRLIB_RESULTS=str(folder / name)),
        ):
            found.append(train.train(config).history["loss"].tolist())
    return {"losses": found}


@train.same_bits()
def times(config: RunConfig) -> dict[str, float]:
    """Median times of a training step on a random batch, those of the slowest process."""
    fabric, entry = train.launch(config), data.get(config.dataset)
    _, adamw, step = train.training_step(fabric, config, entry)
    if fabric.device.type == "cuda":
        capturable(adamw)
    share = (config.batch_size // fabric.world_size, 1, *config.patch_size)
    image = torch.randn(share, device=fabric.device)
    label = torch.randint(entry.out_channels, share, device=fabric.device)
    found = {}
    for name, refusal in (("eager_ms", "measured as they are"), ("captured_ms", "")):
        take_step, ends = CapturedStep(step, refusal), []
        for _ in range(WARM_UP + STEPS + 1):
            float(take_step(image, label))
            ends.append(time.perf_counter())
        if name == "eager_ms" or take_step.graph:
            taken = median(end - start for start, end in pairwise(ends[WARM_UP:]))
            slowest = fabric.all_gather(torch.tensor(taken, device=fabric.device)).max()
            found[name] = 1000 * float(slowest)
    return found


def compared(alone: list[dict[str, Any]], several: list[dict[str, Any]]) -> pd.DataFrame:
    """The rows of one process, then of several, each beside the same one of one process."""
    kinds = [str([row[k] for k in ("what", *SETTINGS)]) for row in [*alone, *several]]
    first = dict(zip(kinds, alone, strict=False))
    for kind, row in zip(kinds, [*alone, *several], strict=True):
        base = first[kind]
        if "captured_ms" in row and "captured_ms" in base:
            row["speedup"] = base["captured_ms"] / row["captured_ms"]
        if "losses" in row and "losses" in base:
            mine, other = row["losses"][0], base["losses"][row is base]
            row["first_losses"] = " ".join(f"{loss:.6f}" for loss in mine[:5])
            row["loss_difference"] = max(abs(a - b) for a, b in zip(mine, other, strict=True))
    return pd.DataFrame([*alone, *several]).drop(columns="losses", errors="ignore")


# --- The same bits again --------------------------------------------------------------------------


@app.command()
def determinism(out: Path, steps: int = 100) -> None:
    """Train `small` on hippocampus in three ways, each twice, in fresh processes.

    Columns: `algorithms` (`usual`, cuDNN chooses among all; `cudnn`, among its deterministic ones, as `train` has it;
    `deterministic`, all of torch's), `steps` of 8 patches, `ms_per_step` (the median of the second half, samples
    included), `sha256` of the weights, `same` (as the first row of its kind), `nondeterministic` (the operators that
    have no deterministic implementation, by torch's warnings).
    """
    config = config_for("default", "hippocampus", steps=steps, batch_size=8)
    rows, first = [], {}
    for algorithms in ("usual", "usual", "cudnn", "cudnn", "deterministic", "deterministic"):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            found = process.submit(train_once, config, algorithms).result()
        same = found["sha256"] == first.setdefault(algorithms, found["sha256"])
        rows.append({"algorithms": algorithms, "steps": steps, **found, "same": same})
        machine.write_table(pd.DataFrame(rows), out)
        print(rows[-1], flush=True)


def train_once(config: RunConfig, algorithms: str) -> dict[str, Any]:
    """Time and weights of a training; what is `deterministic` stays so in this process."""
    flags = train.same_bits if algorithms == "cudnn" else nullcontext
    if algorithms == "deterministic":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # is read when CUDA starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, changes no result
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ, SRLIB_RESULTS=folder),
        patch.object(train, "same_bits", flags),
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        times = train.train(config).history["seconds"].diff()
        found = weights_and_losses(Path(folder))
    del found["history"]
    named = {str(w.message).split()[0] for w in said if "deterministic impl" in str(w.message)}
    return {
        "ms_per_step": 1000 * float(times.tail(config.steps // 2).median()),
        "sha256": hashlib.sha256(b"".join(found[name] for name in sorted(found))).hexdigest(),
        "nondeterministic": " ".join(sorted(named)),
    }


# --- The default profile on real data --------------------------------------------------------------


@app.command()
def default(out: Path, dataset: str = grid.DATASET, seeds: int = 3) -> None:
    """Train and score the default profile on a data set's fold 0 with some seeds, one after the other.

    Columns: `dataset`, `fold`, `seed`, `steps`, `cases` (held out), `dice` (mean over classes, then cases),
    `cpu_minutes` (processor time of the training and of scoring it; empty where that was begun before).
    """
    rows: list[dict] = []
    for seed in range(seeds):
        config, begun = config_for("default", dataset, seed=seed), time.process_time()
        begun_before = run_dir(config).exists()
        _, record = grid.compute_run(config)
        cases = tables.read(run_dir(config) / "metrics.csv").groupby("case")["dice"].mean()
        row = {"dataset": dataset, "fold": config.fold, "seed": seed, "steps": config.steps}
        row |= {"cases": len(cases), "dice": cases.mean(), "device": record["device_name"]}
        row["cpu_minutes"] = nan if begun_before else (time.process_time() - begun) / 60
        rows.append(row)
        machine.write_table(pd.DataFrame(rows), out)
        print(row, flush=True)


# --- kill -9 --------------------------------------------------------------------------------------

TRAINING = (
    "from srlib.run import runs, train; "
    "config = runs.config_for('smoke', 'mni152', steps=30); "
    "train.train(config, progress=False, checkpoint_seconds=0.2)"
)
NOTEBOOKS = ("00", "03")  # train, segment, train again from a state; write figures and tables


class Work(NamedTuple):
    """Something that is killed.

    Attributes:
        command: what is started.
        kept: a results folder -> how much it holds already.
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
            machine.write_table(pd.DataFrame(rows), out)
    ended = [row["same"] for row in rows if row["ended"] == "finished"]
    print(f"{len(rows) - len(ended)} kills, {len(ended)} ends, {sum(ended)} same")
    if not all(ended):
        sys.exit("results differ from those of the undisturbed run")


if __name__ == "__main__":
    app()
