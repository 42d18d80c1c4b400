"""One training by two processes of torchrun: the losses of one process, also when a worker was killed between."""

import dataclasses
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from srlib.run import runs, train
from srlib.run.runs import RunConfig

# In float64, for rounding grows: InstanceNorm over the few voxels of the deepest maps turns float32's into a thousandth
# of the gradient, and Adam's first steps take no more of a gradient than its sign.
SHARED = RunConfig(
    "mni152", steps=6, model="tiny", tom="inner", batch_size=2, patch_size=(36, 20, 20), warmup=1 / 3,
    precision="64-true",
)  # fmt: skip

# Each worker notes the step that it starts at, and its run; the second one kills itself before step 3 when told to.
WORKER = """
import os, signal, sys
from pathlib import Path
from srlib.run import train
from srlib.run.runs import RunConfig

rank = os.environ["RANK"]
batches, rate = train._batches, train.learning_rate

def noted(config, dataset, first_step, rank):
    Path(f"start-{sys.argv[1]}-{rank}").write_text(str(first_step))
    return batches(config, dataset, first_step, rank)

def deadly(config, step):
    if (sys.argv[1], rank, step) == ("killed", "1", 3):
        os.kill(os.getpid(), signal.SIGKILL)
    return rate(config, step)

train._batches, train.learning_rate = noted, deadly
done = train.train(CONFIG, progress=True, checkpoint_seconds=0).run_dir
Path(f"run-{sys.argv[1]}-{rank}").write_text(str(done))
"""


def torchrun(folder, what):
    """Train `SHARED` with two processes in a folder, where they find and leave their notes and results."""
    (folder / "worker.py").write_text(WORKER.replace("CONFIG", repr(SHARED)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "worker.py", what]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.mark.slow
def test_two_processes_train_as_one_although_one_was_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path))
    assert torchrun(tmp_path, "killed").returncode != 0
    assert len(list(tmp_path.rglob("checkpoint.pt"))) == 1
    done = torchrun(tmp_path, "resumed")
    assert done.returncode == 0, done.stderr
    starts = {file.name: int(file.read_text()) for file in tmp_path.glob("start-*")}
    assert starts["start-killed-0"] == starts["start-killed-1"] == 0
    assert starts["start-resumed-0"] == starts["start-resumed-1"] > 0

    (folder,) = {file.read_text() for file in tmp_path.glob("run-resumed-*")}
    assert [str(file.parent) for file in tmp_path.rglob("run.json")] == [folder]
    assert not list(tmp_path.rglob("checkpoint.pt"))

    alone = train.train(SHARED)
    assert str(alone.run_dir) != folder
    losses = pd.read_csv(f"{folder}/history.csv")["loss"]
    np.testing.assert_allclose(losses, alone.history["loss"], rtol=0, atol=1e-6)


def test_a_batch_that_cannot_be_shared_equally_is_refused(monkeypatch):
    monkeypatch.setattr(train, "processes", lambda: 2)
    with pytest.raises(ValueError, match="batch_size 3 cannot be shared equally by 2 processes"):
        train.train(dataclasses.replace(SHARED, batch_size=3))


def test_the_number_of_processes_is_part_of_a_run(monkeypatch):
    alone = runs.run_id(SHARED)
    monkeypatch.setattr(runs, "processes", lambda: 2)
    assert runs.run_id(SHARED) != alone


def test_processes_that_prepare_samples_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path / "here"))
    here = train.train(SHARED).history
    monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path / "beside"))
    monkeypatch.setattr(train, "_loading_processes", lambda: 2)
    beside = train.train(SHARED).history
    assert here["loss"].tolist() == beside["loss"].tolist()
