"""Grids on several workers: the tables of the undisturbed grid, also when a worker is killed in the middle."""

import contextlib
import functools
import os
import signal
import sys
from math import nan
from pathlib import Path

import pytest

from srlib import executors, grid, paths, train
from srlib.runs import RunConfig, run_id

PLAN = [
    RunConfig(
        *("mni152", 0, seed, 8), tom="none", batch_size=1, patch_size=(36, 20, 20), test_cases=1
    )
    for seed in (0, 1)
]


@pytest.fixture
def compute(tmp_path, monkeypatch):
    """Compute the first runs of `PLAN` with an executor, results in a folder of their own; returns their tables."""

    def tables(executor, count):
        plan = [grid.Planned(config, nan) for config in PLAN[:count]]
        monkeypatch.setattr(grid, "GRIDS", {"test": lambda: plan})
        monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path / "results"))
        monkeypatch.setattr(paths, "REFERENCE", tmp_path / "reference")
        environment = dict(os.environ)
        with executor as made:
            grid.compute(["test"], made)
        assert dict(os.environ) == environment  # or what starts next may compute other runs
        return [grid.table_file(run.config).read_text() for run in plan]

    return tables


@pytest.fixture(scope="module")
def undisturbed():
    return [grid.compute_run(config)[0] for config in PLAN]


def test_a_process_pool_gives_the_undisturbed_tables(compute, undisturbed):
    assert compute(executors.executor("process", workers=1), 2) == undisturbed


def test_a_job_of_submitit_gives_the_undisturbed_table(compute, undisturbed):
    jobs = executors.jobs(1, {"timeout_min": "9"}, cluster="local")
    assert compute(jobs, 1) == undisturbed[:1]


@pytest.mark.slow
def test_a_killed_worker_of_dask_costs_nothing_but_time(
    compute, undisturbed, tmp_path, monkeypatch
):
    first = run_id(PLAN[0])

    def compute_run(config):
        """In the worker: note where the first run starts, die once before its step 5."""
        batches, rate = train._batches, train.learning_rate

        def noted(config, first_step, rank):
            Path(tmp_path, f"{run_id(config)}-{os.getpid()}").write_text(str(first_step))
            return batches(config, first_step, rank)

        def deadly(config, step):
            killed = Path(tmp_path, "killed")
            if (run_id(config), step) == (first, 5) and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return rate(config, step)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "_batches", noted)
            patch.setattr(train, "learning_rate", deadly)
            patch.setattr(grid, "train", functools.partial(train.train, checkpoint_seconds=0))
            return grid.compute_run(config)  # the worker's own

    monkeypatch.setattr(grid, "compute_run", compute_run)
    assert compute(executors.executor("dask", workers=2), 2) == undisturbed
    assert sorted(int(file.read_text()) for file in tmp_path.glob(f"{first}-*")) == [0, 5]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cloud", {}, "executor 'cloud' is not one of process, dask, slurm"),
        ("slurm", {"job": {"nodes_per_gpu": "1"}}, "a parameter of the job is wrong: .*nodes_per"),
    ],
)
def test_a_mistake_is_named(name, options, message, monkeypatch):
    monkeypatch.setattr(executors, "jobs", functools.partial(executors.jobs, cluster="local"))
    with pytest.raises(ValueError, match=message):
        executors.executor(name, 1, **options)


@pytest.mark.parametrize(("name", "module"), [("dask", "distributed"), ("slurm", "submitit")])
def test_a_missing_extra_is_named(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with (
        pytest.raises(ImportError, match=rf"pip install .srlib\[{name}\]"),
        contextlib.ExitStack() as stack,
    ):
        stack.enter_context(executors.executor(name, 1))
