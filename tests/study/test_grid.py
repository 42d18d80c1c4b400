"""Grids: their runs, computing them, also when a worker is killed in the middle, keeping and reading them."""

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import shutil
import signal
import sys
import threading
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import case_tables
import nbformat
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

from srlib import data, files
from srlib.cli import app
from srlib.data import cue, mirror
from srlib.data.catalog import maker
from srlib.run import train
from srlib.run.runs import RunConfig, run_id
from srlib.show import plots
from srlib.study import grid, statistics

RECORD = {"device_name": "a device", "training_seconds": 9.5, "commit": "abc"}


def keep(config: RunConfig, dice: float = 0.9) -> None:
    """Put down what a run would leave."""
    row = dict.fromkeys(grid.COLUMNS, 1.0) | {"case": "007", "class": "anterior", "dice": dice}
    grid.keep(config, pd.DataFrame([row]).to_csv(index=False), RECORD)


def write_steps(reference: Path, **milliseconds: float) -> None:
    """Put down what a step of each system takes on a GPU: 10 ms unless told otherwise."""
    table = pd.DataFrame({"system": [*grid.SYSTEMS]})
    table["captured_ms"] = [milliseconds.get(system, 10.0) for system in table["system"]]
    (reference / "gpu").mkdir(exist_ok=True)
    table.to_csv(reference / "gpu" / "plan_steps.csv", index=False)


BEST = {"none": 9e-3, "unetr": 3e-4}  # not tried: 1e-2 is nearest, then 3e-3


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A reference folder in which the learning-rate search is done: 1e-2 is best for `none`, 3e-4 for `unetr`."""
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "REFERENCE", folder)
        write_steps(folder)
        while missing := [c for c in grid.configs("rates") if not grid.is_done(c)]:
            for config in missing:
                best = BEST.get(config.system, 3e-3)
                keep(config, dice=0.9 - abs(math.log(config.learning_rate / best)) / 20)
    return folder


@pytest.fixture(autouse=True)
def reference(searched, tmp_path, monkeypatch):
    """A copy of it for each test."""
    shutil.copytree(searched, tmp_path / "reference")
    monkeypatch.setattr(files, "REFERENCE", tmp_path / "reference")
    return tmp_path / "reference"


class Here(Executor):
    """Computes at once, in this process, what is submitted."""

    def submit(self, function, /, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def in_the_plan() -> pd.DataFrame:
    """The tables of runs in docs/plan.md, the first plan's and the second one's."""
    lines = (files.ROOT / "docs" / "plan.md").read_text().splitlines()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    table = pd.DataFrame(rows, columns=rows[0]).set_index("grid")
    return table.drop(index=["grid", "---"])


def dotted(number: float) -> str:
    """A number below 1 as prose writes it."""
    return f"{number:.4f}".strip("0")


def keep_peers(best: str) -> None:
    """Finish the grid of peers."""
    for config in grid.configs("peers"):
        keep(config, dice=0.9 if config.system == best else 0.8)


@pytest.mark.parametrize("name", grid.GRIDS)
def test_grids_hold_different_runs_with_names_of_their_own(name):
    keep_peers("unet")
    configs = grid.configs(name)
    names = {(config.dataset, grid.run_name(config)) for config in configs}
    assert len(configs) == len(set(configs)) == len(names)
    if name in in_the_plan().index:
        assert len(configs) == int(in_the_plan().loc[name, "runs"])
        folds = {"1 to 4": {1, 2, 3, 4}, "0": {0}}[in_the_plan()["folds"][name]]
        assert {config.fold for config in configs} == folds
        assert {*map(str, {c.seed for c in configs})} == {*in_the_plan()["seeds"][name].split(", ")}
    elif name == "rates":
        assert len(configs) == 4 * 4 + 2  # unetr's first end, then the one beyond it
        assert {config.fold for config in configs} == {0}
    else:
        assert len(configs) == 3 * 6 * 4


def test_the_plan_says_what_the_code_does():
    assert in_the_plan().index.tolist() == [n for n in grid.GRIDS if n not in ("rates", "cue")]
    text = " ".join((files.ROOT / "docs" / "plan.md").read_text().split())
    text, _ = text.split("# The second plan")
    recipe = f"{grid.STEPS:,} steps of {grid.BATCH} patches of {' x '.join(map(str, grid.PATCH))}"
    assert recipe in text
    first = ", ".join(map(dotted, grid.RATES[grid.FIRST_RATES]))
    assert f"{first};" in text
    assert f"(from {dotted(grid.RATES[0])} to {dotted(grid.RATES[-1])})" in text
    config = grid.configs("tom")[0]
    assert f"over {config.warmup:.0%} of the steps".replace("%", " %") in text
    assert f"weight decay {config.weight_decay:g}".replace("0.", ".") in text
    assert f"norm of {train.CLIP:g}" in text


def test_the_second_plan_says_what_the_code_does(reference):
    text = " ".join((files.ROOT / "docs" / "plan.md").read_text().split())
    _, text = text.split("# The second plan")
    *seconds, last = (f"{seconds}" for seconds in grid.SECONDS)
    assert f"{', '.join(seconds)} and {last} s of a GPU alone" in text
    theirs = grid.configs("authors")[0]
    assert f"Adam at {dotted(theirs.learning_rate)}, weight decay .00001," in text
    assert theirs.weight_decay == 0.00001
    assert (
        f"{grid.EPOCHS} epochs of 208 cases: {theirs.steps:,} steps of {theirs.batch_size}" in text
    )
    for task, module, axes in (("cue", cue, "axis 0, 1 or 2"), ("mirror", mirror, "axis 2")):
        configs = [c for c in grid.configs("distance") if c.dataset.startswith(task)]
        (budget,) = {(c.steps, c.batch_size) for c in configs}
        assert "{:,} steps of {} whole".format(*budget) in text
        recipes = {maker(data.get(config.dataset)) for config in configs}
        assert {of for of, _ in recipes} == {module}
        *near, far = sorted({recipe.distance for _, recipe in recipes})
        words = (f"{', '.join(map(str, near))} {and_or} {far} voxels" for and_or in ("and", "or"))
        assert any(found in text for found in words)
        assert f"away along {axes}" in text
        assert len(recipes) == 3 * (3 if task == "cue" else 1)
        (volumes,) = {recipe.volumes for _, recipe in recipes}
        assert (
            f"{volumes - module.HELD_OUT} training volumes a task, {module.HELD_OUT} held" in text
        )
    assert f"its mean accuracy there is at least {dotted(statistics.CARRIES)}." in text


def test_the_curve_is_steps_by_measured_milliseconds(reference):
    write_steps(reference, segmamba=40.0)
    plan = grid.planned("curve")
    of = {run.config.steps: run.minutes for run in plan if run.config.system == "segmamba"}
    assert of == {6000: 4.0, 3000: 2.0, 1500: 1.0, 750: 0.5, 375: 0.25}
    assert {run.config.steps for run in plan if run.config.system == "conv"} == {
        1500, 3000, 6000, 12000, 24000,
    }  # fmt: skip


def test_the_cpu_s_step_is_known_of_all_systems_of_the_curve(monkeypatch):
    monkeypatch.undo()  # the repository's own
    step = grid.cpu_step()
    assert {*grid.CURVE} <= {*step.index}
    assert step.between(0.1, 100).all()
    assert "1 thread" in str(step.name)  # hours of a core


def test_runs_by_the_authors_recipe_have_names_of_their_own():
    names = {grid.run_name(config) for config in grid.configs("authors")}
    assert "released-fold1-seed0-10400-steps-1e-04-authors" in names
    assert all(config.patch_size == grid.PATCH for config in grid.configs("authors"))


def test_volumes_of_the_diagnostic_tasks_are_trained_on_whole():
    for config in grid.configs("distance"):
        _, recipe = maker(data.get(config.dataset))
        assert config.patch_size == recipe.size
        assert not config.augment
        assert config.recipe == "default"


def test_the_search_goes_on_until_its_ends_lose():
    rates = [c.learning_rate for c in grid.configs("rates") if c.system == "unetr"]
    assert rates == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    assert [c.learning_rate for c in grid.configs("rates") if c.system == "none"] == rates[2:]


def test_a_rate_at_which_the_training_diverged_is_not_the_best(monkeypatch):
    def train(config, progress):
        raise FloatingPointError("step 7: the loss rose")

    best = next(c for c in grid.configs("rates") if c.system == "none" and c.learning_rate == 1e-2)
    monkeypatch.setattr(grid, "train", train)
    monkeypatch.setattr(grid, "run_dir", lambda config: Path("0123456789ab"))
    table, record = grid.compute_run(best)
    assert record["diverged"] == "step 7: the loss rose"
    grid.keep(best, table, record)
    assert grid.is_done(best)
    assert grid.learning_rates()["none"] == 3e-3
    row = grid.runs("rates").set_index("run").loc[grid.run_name(best)]
    assert math.isnan(row["seconds"])


def test_runs_that_all_diverged_are_read(reference):
    table = pd.DataFrame(columns=[*grid.COLUMNS]).to_csv(index=False)
    for name in ("runs.csv", "runs.jsonl"):
        (reference / "hippocampus" / name).unlink()
    (config,) = grid.configs("rates")[:1]
    grid.keep(config, table, RECORD | {"diverged": "step 7"})
    assert grid.is_done(config)
    assert grid.cases("rates").empty


def test_the_search_decides_the_learning_rate():
    rates = grid.learning_rates()
    assert rates == dict.fromkeys(grid.SYSTEMS, 3e-3) | dict.fromkeys(
        ("none", "conv", "released"), 1e-2
    ) | (dict.fromkeys(("unetr", "swin_unetr"), 3e-4))
    assert all(c.learning_rate == rates[c.system] for c in grid.configs("tom"))
    records = files.REFERENCE / "hippocampus" / "runs.jsonl"
    records.write_text("".join(records.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(FileNotFoundError, match="search of segresmamba is not complete"):
        grid.configs("tom")


def test_the_best_peer_is_known_when_all_are_done():
    assert {config.system for config in grid.configs("seeds")} == {*grid.TOM}
    keep_peers("segresnet")
    assert {config.system for config in grid.configs("seeds")} == {*grid.TOM, "segresnet"}
    assert {config.system for config in grid.configs("time")} == {*grid.TOM, "segresnet"}


def test_equal_time_is_steps_by_measured_milliseconds(reference):
    write_steps(reference, segresmamba=12.0, none=6.0)
    found = {run.config.system: (run.config.steps, run.minutes) for run in grid.planned("time")}
    assert found == {"segresmamba": (3000, 0.6), "none": (6000, 0.6), "conv": (3600, 0.6)}
    assert {c.steps for c in grid.configs("peers")} == {3000}


def test_a_run_says_which_system_it_is_and_is_the_same_run_without():
    for key, system in grid.SYSTEMS.items():
        # of the virtual cohort, which needs no files
        config = dataclasses.replace(grid.config_of(key, steps=5), dataset="mni152")
        assert config.system == key
        assert all(getattr(config, name) == value for name, value in system.settings.items())
    unnamed = RunConfig(**{**vars(config), "system": ""})
    assert unnamed == config
    assert run_id(unnamed) == run_id(config)


def test_runs_kept_at_once_do_not_lose_each_other():
    configs = [grid.config_of("none", seed=seed, steps=5) for seed in range(24)]
    before = len(grid.kept(grid.DATASET).records)
    start = threading.Barrier(6)

    def keep_some(first):
        start.wait(timeout=60)
        for config in configs[first::6]:
            keep(config)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(keep_some, range(6)))
    kept = grid.kept(grid.DATASET)
    assert len(kept.records) == len(kept.tables) == before + 24


def test_a_process_killed_while_it_keeps_a_run_loses_nothing(monkeypatch):
    first, second = grid.configs("time")[0], grid.config_of("none", steps=5)
    keep(first)
    write = grid._write

    def killed(file, lines):
        if file.suffix == ".jsonl":
            raise KeyboardInterrupt
        write(file, lines)

    monkeypatch.setattr(grid, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        keep(second, dice=0.1)
    monkeypatch.setattr(grid, "_write", write)
    assert not grid.is_done(second)
    assert len(grid.cases("time")) == 1
    keep(second, dice=0.2)
    assert grid.kept(grid.DATASET).tables[grid.run_name(second)]["dice"].tolist() == [0.2]


def test_a_run_with_other_columns_is_not_kept_among_the_others():
    with pytest.raises(ValueError, match=r"runs\.csv has the columns run,case.*has case,iou"):
        grid.keep(grid.configs("time")[0], "case,iou\n1,0.5\n", RECORD)


def test_committed_runs_are_those_of_the_plan(monkeypatch):
    """They are not any more if plan_steps.csv, which says the steps of equal time, is changed."""
    monkeypatch.undo()
    planned = {(c.dataset, grid.run_name(c)) for name in grid.GRIDS for c in grid.configs(name)}
    for file in files.REFERENCE.glob("*/runs.jsonl"):
        dataset = file.parent.name
        assert {(dataset, name) for name in grid.kept(dataset).records} <= planned


def test_committed_runs_agree_with_their_records(monkeypatch):
    """Each name is that of the configuration beside it, and no case and class comes twice."""
    monkeypatch.undo()
    for file in files.REFERENCE.glob("*/runs.jsonl"):
        kept = grid.kept(file.parent.name)
        scored = [name for name, record in kept.records.items() if "diverged" not in record]
        assert {*scored} == {*kept.tables}
        for name, record in kept.records.items():
            config = RunConfig(**record["config"] | {"warmup": 0})  # was in steps once
            assert grid.run_name(config) == name
            settings = grid.SYSTEMS[config.system].settings
            assert json.loads(json.dumps(settings)).items() <= record["config"].items()
            if name in scored:
                assert not kept.tables[name].duplicated(["case", "class"]).any()


def test_missing_runs_are_computed_and_kept_the_failing_one_reported(monkeypatch):
    first, second, *others = grid.configs("tom")
    for config in others:
        keep(config)

    def compute_run(config):
        if config == second:
            raise OSError("disk full")
        return ",".join(grid.COLUMNS) + "\n1,anterior,1,1,1,1,1,1\n", RECORD

    monkeypatch.setattr(grid, "compute_run", compute_run)
    monkeypatch.setattr(grid, "executor", lambda *_: contextlib.nullcontext(Here()))
    ended = CliRunner().invoke(app, ["grid", "tom"])
    assert ended.exit_code == 2
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

    monkeypatch.setattr(grid, "_as_they_end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grid.compute(["tom"], Queue())
    assert len(queued) == 12
    assert all(future.cancelled() for future in queued)


def test_a_queue_that_computes_nothing_is_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(files, "LONGEST_WAIT", 0.1)
    with pytest.raises(TimeoutError, match="are there workers"):
        list(grid._as_they_end([Future()]))


def test_tables_carry_the_run_s_key():
    config, minutes = grid.planned("time")[0]
    assert minutes == 0.5
    assert grid.cases("time").empty
    assert grid.runs("time").empty
    keep(config)
    (run,), (case,) = (t.to_dict("records") for t in (grid.runs("time"), grid.cases("time")))
    key = {
        "system": "segresmamba",
        "title": "SegResMamba",
        "fold": 1,
        "steps": 3000,
        "minutes": 0.5,
    }
    assert key.items() <= run.items()
    assert key.items() <= case.items()
    assert (run["device"], run["seconds"]) == ("a device", 9.5)
    assert (case["case"], case["dice"]) == ("007", 0.9)
    assert grid.cases("time")["dice"].dtype == float


def test_list_says_what_is_to_do():
    keep(grid.configs("tom")[0])
    lines = CliRunner().invoke(app, ["grid", "tom", "--list"]).output.splitlines()
    assert lines[0].startswith("done   hippocampus  segresmamba-fold1-seed0-3000-steps-3e-03")
    assert all(line.startswith("to do") for line in lines[1:])


def test_unknown_grid_is_answered_with_the_known_ones():
    result = CliRunner().invoke(app, ["grid", "everything"])
    assert result.exit_code == 2
    assert "'everything' is not one of rates, tom" in result.output


# --- For the notebooks ----------------------------------------------------------------------------


def keep_cases(config: RunConfig, shift: float = 0.0) -> None:
    """Put down what a run on six cases would leave."""
    table = case_tables.cases({"any": shift}, (config.fold,), (config.seed,), n=6)
    grid.keep(config, table[[*grid.COLUMNS]].to_csv(index=False), RECORD)


def test_nothing_is_there_yet(reference, monkeypatch, capsys):
    monkeypatch.setattr(files, "REFERENCE", reference / "empty")
    table = grid.committed("tom", "peers")
    assert table.empty
    assert {"system", "title", "dice", "device"} <= set(table)
    assert capsys.readouterr().out.splitlines() == [
        "grid tom: the repository holds nothing of it yet",
        "grid peers: the repository holds nothing of it yet",
    ]


def test_a_run_of_two_grids_comes_once(capsys):
    assert grid.committed("tom").empty
    both = grid.configs("tom")[0]
    assert both in grid.configs("peers")
    others = grid.configs("tom")[1], grid.configs("peers")[1]
    for config in (both, *others):
        keep_cases(config)
    table = grid.committed("tom", "peers")
    assert len(table) == 3 * 6 * 2
    assert table["system"].unique().tolist() == [
        "segresmamba",
        *(config.system for config in others),
    ]
    assert "grid peers: the repository holds 2 of 28 runs" in capsys.readouterr().out
    assert grid.made_with(table) == (
        "hippocampus, 6 cases | fold 1, seed 0 | 3,000 steps | a device"
    )


def test_a_table_of_equal_time_says_so():
    table = pd.concat(
        case_tables.cases(minutes=minutes).assign(steps=steps, fold=fold)
        for fold, (minutes, steps) in enumerate(((3.0, 100), (12.0, 400)))
    )
    expected = "made up, 20 cases | fold 0-1, seed 0-2 | the steps of 3-12 minutes | no device"
    assert grid.made_with(table) == expected


def keep_diverged(config: RunConfig) -> None:
    """Put down what a training that diverged would leave."""
    nothing = pd.DataFrame(columns=[*grid.COLUMNS]).to_csv(index=False)
    grid.keep(config, nothing, {**RECORD, "diverged": "the loss rose"})


def test_a_budget_is_whole_when_all_its_trainings_ended_diverged_ones_too():
    first, *others, last = grid.configs("curve")[:24]  # of the longest budget
    keep_diverged(first)
    for config in others:
        keep(config)
    assert grid.budgets("curve").loc[4].tolist() == [24, 23, False]
    keep(last)
    table = grid.budgets("curve")
    assert table["planned"].to_dict() == dict.fromkeys((0.25, 0.5, 1, 2, 4), 24)
    assert table["ended"].tolist() == [0, 0, 0, 0, 24]
    assert table["whole"].tolist() == [False] * 4 + [True]
    assert grid.budgets("tom").empty


def execute_committed(monkeypatch) -> list[tuple[str, str]]:
    """Execute 04's cells that read the repository's runs.

    Returns the name of each figure and table that they show, and a figure's alternative text.
    """
    monkeypatch.setattr(grid, "cost", lambda _: {"parameters": 1, "gmacs": 1.5})
    monkeypatch.setattr(statistics, "RESAMPLES", 99)
    step = pd.Series(2.0, [*grid.SYSTEMS], name="a CPU")
    monkeypatch.setattr(grid, "cpu_step", lambda: step)
    shown: list[tuple[str, str]] = []

    def show(_, what, name, alt="", **__):
        shown.append((name, alt))

    for method in ("show", "table"):
        monkeypatch.setattr(plots.Record, method, show)
    names = {"PROFILE": "smoke", "DATASET": "mni152", "SEED": 0, "pd": pd}
    names |= vars(grid) | {"plots": plots, "statistics": statistics, "stats": stats}
    for cell in nbformat.read(files.NOTEBOOKS / "04_evaluation.ipynb", as_version=4).cells:
        if "committed" in cell.metadata.get("tags", []):
            exec(cell.source, names)
    return shown


READ = ("tom", "peers", "parts", "seeds", "time", "curve")


@pytest.mark.parametrize(
    ("kept", "drawn"),
    [
        (0, set()),
        (1, {"04-folds", "04-error-volume", "04-hippocampus-volumes", "04-curve"}),
        (99, {"04-equal-steps", "04-paired", "04-spread", "04-equal-time", "04-folds", "04-curve"}),
    ],
)
def test_notebook_needs_no_number_of_committed_runs(kept, drawn, reference, monkeypatch, capsys):
    """Its cells that read the repository's runs, with none, the first of each grid, or all."""
    for name in READ:  # the later ones ask for the best of the peers
        for config in grid.configs(name)[:kept]:
            if not grid.is_done(config):
                keep_cases(config)
    shown = [name for name, _ in execute_committed(monkeypatch)]
    assert drawn <= set(shown)
    assert kept or not shown
    assert ("04-equal-time" in shown) == (kept == 99)
    said = capsys.readouterr().out
    assert said.count("trainings are missing, nothing is decided") == {0: 5, 1: 5, 99: 1}[kept]
    assert shown.count("04-curve") == {0: 0, 1: 1, 99: 2}[kept]  # figure; figure and table


def test_the_curve_names_who_is_ahead_and_whose_training_diverged(monkeypatch, capsys):
    for config in grid.configs("curve")[:24]:  # of the longest budget
        if (config.system, config.fold) == ("segmamba", 1):
            keep_diverged(config)
        else:
            keep_cases(config, {"segresnet": 0.05, "none": -0.05}.get(config.system, 0.0))
    for config in grid.configs("curve")[24:29]:  # of 120 s all but one network's
        keep_cases(config)
    (alt,) = (alt for name, alt in execute_committed(monkeypatch) if name == "04-curve" and alt)
    # over the folds that all have, without that of the diverged one
    assert "; SegResNet, 240 s: 0.930 (3)" in alt
    assert "; no such fold at 120 s." in alt
    said = capsys.readouterr().out
    assert "diverged: segmamba-fold1" in said
    ahead = "240 s: ahead of SegResMamba: SegResNet; behind: no ToM; not compared: SegMamba"
    assert ahead in said


def test_costs_are_counted_for_the_plan_s_patch():
    found = grid.systems().loc["nnunet"]
    assert found["title"] == "U-Net of nnU-Net's shape"
    assert found["parameters"] == 268_663
    assert found["gmacs"] == pytest.approx(1.5316, abs=1e-4)


# --- Executors: the tables of the undisturbed grid ---------------------------------------------

SHORT = {"steps": 8, "batch_size": 1, "patch_size": (36, 20, 20), "test_cases": 1}
PLAN = [RunConfig("mni152", seed=seed, tom="none", system="none", **SHORT) for seed in (0, 1)]


@pytest.fixture
def compute(tmp_path, monkeypatch):
    """Compute the first runs of `PLAN` with an executor, results in a folder of their own; returns their tables."""

    def tables(executor, count):
        plan = [grid.Planned(config, math.nan) for config in PLAN[:count]]
        monkeypatch.setattr(grid, "GRIDS", {"test": lambda: plan})
        monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path / "results"))
        monkeypatch.setattr(files, "REFERENCE", tmp_path / "reference")
        environment = dict(os.environ)
        with executor as made:
            grid.compute(["test"], made)
        assert dict(os.environ) == environment  # or what starts next may compute other runs
        tables = [grid.kept("mni152").tables[grid.run_name(run.config)] for run in plan]
        return [table.drop(columns="run").to_csv(index=False) for table in tables]

    return tables


@pytest.fixture(scope="module")
def undisturbed():
    tables = [pd.read_csv(io.StringIO(grid.compute_run(config)[0])) for config in PLAN]
    return [table.to_csv(index=False) for table in tables]


def test_a_process_pool_gives_the_undisturbed_tables(compute, undisturbed):
    assert compute(grid.executor("process", workers=1), 2) == undisturbed


def test_a_job_of_submitit_gives_the_undisturbed_table(compute, undisturbed):
    jobs = grid.jobs(1, {"timeout_min": "9"}, cluster="local")
    assert compute(jobs, 1) == undisturbed[:1]


@pytest.mark.slow
def test_a_killed_worker_of_dask_costs_nothing_but_time(
    compute, undisturbed, tmp_path, monkeypatch
):
    first = run_id(PLAN[0])

    def compute_run(config):
        """In the worker: note where the first run starts, die once before its step 5."""
        batches, rate = train._batches, train.learning_rate

        def noted(config, dataset, first_step, rank):
            Path(tmp_path, f"{run_id(config)}-{os.getpid()}").write_text(str(first_step))
            return batches(config, dataset, first_step, rank)

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
    assert compute(grid.executor("dask", workers=2), 2) == undisturbed
    assert sorted(int(file.read_text()) for file in tmp_path.glob(f"{first}-*")) == [0, 5]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cloud", {}, "executor 'cloud' is not one of process, dask, slurm"),
        ("slurm", {"job": {"nodes_per_gpu": "1"}}, "a parameter of the job is wrong: .*nodes_per"),
    ],
)
def test_a_mistake_is_named(name, options, message, monkeypatch):
    monkeypatch.setattr(grid, "jobs", functools.partial(grid.jobs, cluster="local"))
    with pytest.raises(ValueError, match=message):
        grid.executor(name, 1, **options)


@pytest.mark.parametrize(("name", "module"), [("dask", "distributed"), ("slurm", "submitit")])
def test_a_missing_extra_is_named(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with (
        pytest.raises(ImportError, match=rf"pip install .srlib\[{name}\]"),
        contextlib.ExitStack() as stack,
    ):
        stack.enter_context(grid.executor(name, 1))
