"""Grids: what is in them, what is computed, what is kept, and how it is read."""

import importlib.util
import json
from concurrent.futures import Executor, Future
from contextlib import nullcontext

import pandas as pd
import pytest
from typer.testing import CliRunner

from srlib import executors, grid, paths
from srlib.__main__ import app
from srlib.runs import RunConfig


@pytest.fixture(autouse=True)
def reference(tmp_path, monkeypatch):
    """A reference folder of its own, in which the learning-rate search is done: 4e-3 is best for `none`."""
    monkeypatch.setattr(paths, "REFERENCE", tmp_path)
    table = pd.DataFrame({"system": [*grid.SYSTEMS], "step_seconds": 0.4})
    (tmp_path / "cpu").mkdir()
    table.to_csv(tmp_path / "cpu" / "systems.csv", index=False)
    for config, _ in grid.planned("rates"):
        best = 4e-3 if grid.system_of(config) == "none" else 2e-3
        keep(config, dice=0.8 + (config.learning_rate == best) / 10)
    return tmp_path


def keep(config: RunConfig, dice: float = 0.9) -> None:
    """Put down what a run would leave."""
    row = dict.fromkeys(grid.COLUMNS, 1.0) | {"case": "007", "class": "anterior", "dice": dice}
    record = {"device_name": "a device", "training_seconds": 9.5, "commit": "abc"}
    grid._keep(config, pd.DataFrame([row]).to_csv(index=False), json.dumps(record))


class Here(Executor):
    """Computes at once, in this process, what is submitted."""

    def submit(self, function, /, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("tom", 9 + 12),
        ("peers", 3 * 7),
        ("peers-time", 3 * 9),
        ("ablations", 27),
        ("long", 1),
        ("cue", 72),
    ],
)
def test_grids_hold_different_runs_with_files_of_their_own(name, count):
    configs = grid.configs(name)
    assert len(configs) == len(set(configs)) == len({grid.table_file(c) for c in configs}) == count


def test_the_order_is_that_of_importance():
    firsts = [(c.fold, c.seed) for c in grid.configs("tom")]
    assert firsts == [(0, s) for s in (0, 1, 2) for _ in grid.TOM] + [
        (f, 0) for f in (1, 2, 3, 4) for _ in grid.TOM
    ]


def test_the_search_decides_the_learning_rate():
    rates = {grid.system_of(c): c.learning_rate for c in grid.configs("tom")}
    assert rates == {"both": 2e-3, "none": 4e-3, "conv": 2e-3}
    assert {c.learning_rate for c in grid.configs("ablations")} == {2e-3}  # SegResMamba's
    grid.table_file(grid.configs("rates")[0]).unlink()
    with pytest.raises(FileNotFoundError, match="1 of 36 runs of the learning-rate search"):
        grid.configs("tom")


def test_equal_time_is_steps_by_measured_seconds(reference):
    table = pd.DataFrame({"system": [*grid.SYSTEMS], "step_seconds": 0.4})
    table.loc[table["system"] == "unet", "step_seconds"] = 0.1
    table.to_csv(reference / "cpu" / "systems.csv", index=False)
    steps = {grid.system_of(c): c.steps for c in grid.configs("peers-time")}
    assert (steps["both"], steps["unet"]) == (1800, 7200)
    assert {c.steps for c in grid.configs("peers")} == {1800}


def test_a_run_is_of_the_system_that_made_it():
    for key, system in grid.SYSTEMS.items():
        assert grid.system_of(RunConfig("hippocampus", steps=5, **system.settings)) == key
    with pytest.raises(ValueError, match="no system has the settings"):
        grid.system_of(RunConfig("hippocampus", tom="none", nslices=4))


def test_missing_runs_are_computed_and_kept_the_failing_one_reported(monkeypatch):
    first, second, *others = grid.configs("tom")
    for config in others:
        keep(config)

    def compute_run(config):
        if config == second:
            raise OSError("disk full")
        return "case,class,dice\n1,anterior,0.5\n", "{}"

    monkeypatch.setattr(grid, "compute_run", compute_run)
    monkeypatch.setattr(executors, "executor", lambda *_: nullcontext(Here()))
    ended = CliRunner().invoke(app, ["grid", "tom"])
    assert ended.exit_code == 1
    said = f"failed: hippocampus {grid.run_name(second)}; the first one said: OSError: disk full\n"
    assert ended.stderr.endswith(said)
    assert grid.is_done(first)
    assert not grid.is_done(second)


def test_what_is_interrupted_computes_nothing_more(monkeypatch):
    queued: list[Future] = []

    class Queue(Executor):
        def submit(self, function, /, *arguments):
            queued.append(Future())
            return queued[-1]

    def interrupted(futures):
        raise KeyboardInterrupt

    monkeypatch.setattr(grid, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grid.compute(["tom"], Queue())
    assert len(queued) == 21
    assert all(future.cancelled() for future in queued)


@pytest.mark.parametrize("options", [[], ["--store"]])
def test_seconds_a_step_are_stored_only_when_asked_to(reference, monkeypatch, options):
    """The steps of runs, which are in their names, come from that table."""
    file = paths.ROOT / "benchmarks" / "systems.py"
    spec = importlib.util.spec_from_file_location("systems", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "step_seconds", lambda system: [0.5])
    monkeypatch.setattr(module.grid, "cost", lambda system: {"parameters": 1})
    monkeypatch.setattr("sys.argv", ["systems", *options])
    module.main()
    assert grid.systems()["step_seconds"]["both"] == (0.5 if options else 0.4)


def test_tables_carry_the_run_s_key():
    config, minutes = grid.planned("long")[0]
    assert minutes == 60
    assert grid.cases("long").empty
    assert grid.runs("long").empty
    keep(config)
    (run,), (case,) = (t.to_dict("records") for t in (grid.runs("long"), grid.cases("long")))
    key = {"system": "both", "title": "SegResMamba", "fold": 0, "steps": 9000, "minutes": 60}
    assert key.items() <= run.items()
    assert key.items() <= case.items()
    assert (run["device"], run["seconds"]) == ("a device", 9.5)
    assert (case["case"], case["dice"]) == ("007", 0.9)
    assert grid.cases("long")["dice"].dtype == float


def test_list_says_what_is_to_do():
    keep(grid.configs("tom")[0])
    lines = CliRunner().invoke(app, ["grid", "tom", "--list"]).output.splitlines()
    assert lines[0].startswith("done   hippocampus  both-fold0-seed0-1800-steps-2e-03")
    assert all(line.startswith("to do") for line in lines[1:])


def test_unknown_grid_is_answered_with_the_known_ones():
    result = CliRunner().invoke(app, ["grid", "everything"])
    assert result.exit_code == 2
    assert "'everything' is not one of rates, tom" in result.output
