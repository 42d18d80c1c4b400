"""Does work survive `kill -9`? A training and a run of the collection, killed at random moments and started again.

    python -m srlib bench kill_test [training | collection] [--kills 10] [--seed 0]

First each runs undisturbed; its tables are what is expected and its time T is what moments are drawn from. Then it is
started in an empty folder, killed after a uniformly random time below T, started again and so on, until it ends before
it is killed; what it then leaves is compared with the undisturbed run's, byte by byte. With kills left over, it begins
again in an empty folder. Every start in a folder in which something was killed is thereby a test of resuming.

Columns: `what`, `round` (one folder), `start` within it, `moment` (s after the start; empty where it ended by itself),
`ended` (`killed` or `finished`), `kept` (what a killed start left: steps in the training's checkpoint, which is gone
when the training is done; notebooks in the collection's manifest), `same` (whether the tables agree at the end).

Only the program itself is killed, as the system does when memory runs out; the notebook's kernel then ends by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file

from srlib import provenance, tables
from srlib.paths import REFERENCE

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
        tables: a results folder -> everything that must come out the same.
    """

    command: list[str]
    kept: Callable[[Path], int]
    tables: Callable[[Path], dict[str, bytes]]


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
    """Start the work; kill it at that moment. Whether it ended by itself before."""
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
        duration, expected = time.perf_counter() - begun, work.tables(Path(folder))
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
                    row["same"] = work.tables(results) == expected
                else:
                    row |= {"ended": "killed", "kept": work.kept(results), "same": None}
                yield row


def main() -> None:
    """Disturb both, print, write; fails when a table differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", nargs="*", default=[*WORKS], help="training, collection or both")
    parser.add_argument("--kills", type=int, default=10, help="of each of the two")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=REFERENCE / "cpu" / "kill_test.csv")
    options = parser.parse_args()
    rng, about, rows = np.random.default_rng(options.seed), provenance.describe(), []
    made_with = {"device": about["device"], "commit": about["commit"]}
    if options.out.is_file():  # what was not asked for stays
        kept = tables.read(options.out)
        rows = kept[~kept["what"].isin(options.what)].to_dict("records")
    for row in chain.from_iterable(disturb(name, options.kills, rng) for name in options.what):
        print(row, flush=True)
        rows.append(row | made_with)
        table = pd.DataFrame(rows)
        tables.write(table, options.out)
    ended = table[table["ended"] == "finished"]
    print(
        f"{(table['ended'] == 'killed').sum()} kills, {len(ended)} ends, {ended['same'].sum()} same"
    )
    if not ended["same"].all():
        sys.exit("tables differ from those of the undisturbed run")


if __name__ == "__main__":
    main()
