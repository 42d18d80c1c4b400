"""Comparisons: lists of runs, computed where they are missing by any executor, kept as they finish.

A *system* is a network by what is special about it, a *grid* a list of runs in the order of their importance. Finished
runs are rows of two files of the repository, `results/reference/<dataset>/runs.csv`, their metrics per case and class,
and `runs.jsonl`, what each was and what it was computed with. Notebooks read these and train nothing.

What is run, and how it is judged, is written down in docs/plan.md before the first run; the grids are its lists.
Fold 0 is for development, learning rates are searched on it; verdicts rest on the folds 1 to 4.

Budgets are never mixed. At *equal steps* each system takes the same number of optimizer steps. At *equal time*
a system takes as many as fit into the time that SegResMamba's take on a GPU, or (`curve`) into so many seconds of it,
by the milliseconds a captured step that the plan was made with (`results/reference/gpu/plan_steps.csv`).
Steps are the budget in all of them, so a run may be computed on any device.

Runs are computed by any `concurrent.futures.Executor`: processes of this machine, workers of Dask, jobs of SLURM;
docs/scale-out.md says how, and what becomes of a run whose worker dies.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import AbstractContextManager, contextmanager
from functools import cache, lru_cache
from itertools import product
from math import nan
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from srlib import files as paths
from srlib import machine, tables
from srlib.data import cue, mirror
from srlib.net.peers import SMALL
from srlib.run.evaluate import evaluate
from srlib.run.runs import RunConfig, config_for, run_dir
from srlib.run.train import build_model, train

DATASET = "hippocampus"
PATCH = (48, 64, 48)  # voxels; holds a whole case
BATCH = 8
STEPS = 3000
SEEDS = (0, 1, 2)
SEARCH_FOLD = 0
FOLDS = (1, 2, 3, 4)  # of the verdicts
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIRST_RATES = slice(2, 6)  # the search goes on beyond these where an end is the best
CUE_RATE = 2e-3
CUE_STEPS = 800
# Seconds of a GPU alone; the longest first, so that runs which share it end together.
SECONDS = (240, 120, 60, 30, 15)
EPOCHS = 200  # of the authors, of the 208 cases that a fold trains on
AUTHORS = {"recipe": "authors", "learning_rate": 1e-4, "weight_decay": 1e-5, "warmup": 0.0}
AUTHORS |= {"batch_size": 4, "steps": EPOCHS * 208 // 4}
MIRROR = {"steps": 3000, "batch_size": 4}
CUE = {"steps": 2000, "batch_size": 8}


class System(NamedTuple):
    """A network of the comparisons: its title in tables and figures, and the fields of `RunConfig` that make it."""

    title: str
    settings: dict[str, Any]


SYSTEMS: dict[str, System] = {
    "segresmamba": System("SegResMamba", {}),
    "none": System("no ToM", {"tom": "none"}),
    "conv": System("convolution for ToM", {"tom": "conv"}),
    "inner": System("inner ToM only", {"tom": "inner"}),
    "outer": System("outer ToM only", {"tom": "outer"}),
    "forward": System("one scan order", {"scan_orders": ("forward",)}),
    "forward_reverse": System("two scan orders", {"scan_orders": ("forward", "reverse")}),
    "slices4": System("4 slices", {"nslices": 4}),
    "front_back": System("slices from back to front", {"slice_axis": 1}),
    "up_down": System("slices from bottom to top", {"slice_axis": 2}),
    "residual": System("ToM adds its input", {"tom_residual": True}),
    "no_recurrence": System("no recurrence", {"recurrence": False}),
    "no_extra_conv": System("no extra convolution", {"extra_conv": False}),
    "segmamba_block": System("SegMamba's block", {"block": "segmamba"}),
    "neither": System(
        "SegMamba's block, no extra convolution", {"block": "segmamba", "extra_conv": False}
    ),
    "released": System("released variant", {"variant": "released"}),
    **{name: System(peer.title, {"model": name}) for name, peer in SMALL.items()},
}
TOM = ("segresmamba", "none", "conv")
CUE_SYSTEMS = (*TOM, "no_recurrence")
CURVE = (*TOM, "nnunet", "segresnet", "segmamba")
BY_AUTHORS = ("segresmamba", "released", "none")
FAR = ("segresmamba", "forward_reverse", "forward", "no_recurrence", "none", "conv")
PARTS = ("no_extra_conv", "segmamba_block", "neither")  # what table 4 leaves out
ABLATIONS = tuple(name for name in SYSTEMS if name not in (*TOM, "released", *SMALL))
# Searched for are the rates of these; each other system takes its nearest kin's.
SEARCHED = ("segresmamba", "none", "unet", "unetr")
KIN = {
    "conv": "none",
    "released": "none",
    "swin_unetr": "unetr",
    "nnunet": "unet",
    "segresnet": "unet",
}


class Planned(NamedTuple):
    """A run of a grid, and the minutes of a GPU that are its budget; NaN at equal steps."""

    config: RunConfig
    minutes: float


def _search() -> Iterator[Planned]:
    """The search for learning rates; runs beyond the first rates appear when those are done and an end is the best."""
    for system in SEARCHED:
        yield from _search_of(system)[0]


def _search_of(system: str) -> tuple[list[Planned], float | None]:
    """A system's runs of the search as far as they are decided, and the best rate if they are all done.

    A training that diverged has no Dice, so its rate is never the best.
    """
    low, high = FIRST_RATES.start, FIRST_RATES.stop
    while True:
        plan = [
            Planned(_of_plan(system, SEARCH_FOLD, 0, learning_rate=rate), nan)
            for rate in RATES[low:high]
        ]
        if not all(is_done(run.config) for run in plan):
            return plan, None
        means = _cases(plan).groupby("learning_rate")["dice"].mean()
        best = RATES[low:high][means.reindex(RATES[low:high]).argmax()]
        if best == RATES[low] and low > 0:
            low -= 1
        elif best == RATES[high - 1] and high < len(RATES):
            high += 1
        else:
            return plan, best


def _cue() -> Iterator[Planned]:
    """The diagnostic task by a former recipe; its runs are all there. `distance` asks the question anew."""
    for seed, (dataset, recipe), system in product(SEEDS, cue.RECIPES.items(), CUE_SYSTEMS):
        settings = {"steps": CUE_STEPS, "learning_rate": CUE_RATE, "augment": False}
        config = config_of(system, dataset, seed=seed, patch_size=recipe.shape, **settings)
        yield Planned(config, nan)


def _at_equal_steps(systems: Iterable[str], seeds: Iterable[int] = (0,)) -> Iterator[Planned]:
    rates = learning_rates()
    for seed, fold, system in product(seeds, FOLDS, systems):
        yield Planned(_of_plan(system, fold, seed, learning_rate=rates[system]), nan)


def _further_seeds() -> Iterator[Planned]:
    """Two more trainings a fold of SegResMamba, no ToM and the convolution, then of the best peer once it is known."""
    best = best_peer()
    return _at_equal_steps((*TOM, best) if best else TOM, SEEDS[1:])


def _at_equal_time() -> Iterator[Planned]:
    """Runs of as many steps as fit into the time that SegResMamba's take on a GPU alone."""
    step, best = plan_steps(), best_peer()
    budget, rates = STEPS * step["segresmamba"], learning_rates()
    for fold, system in product(FOLDS, (*TOM, best) if best else TOM):
        settings = {"learning_rate": rates[system], "steps": round(budget / step[system])}
        yield Planned(_of_plan(system, fold, 0, **settings), round(budget / 60_000, 2))


def _curve() -> Iterator[Planned]:
    """Runs of as many steps as fit into so many seconds on a GPU alone."""
    step, rates = plan_steps(), learning_rates()
    for seconds, fold, system in product(SECONDS, FOLDS, CURVE):
        settings = {"learning_rate": rates[system], "steps": round(1000 * seconds / step[system])}
        yield Planned(_of_plan(system, fold, 0, **settings), seconds / 60)


def _authors() -> Iterator[Planned]:
    """The recipe of the paper's authors, as long as theirs."""
    for fold, system in product(FOLDS, BY_AUTHORS):
        yield Planned(_of_plan(system, fold, 0, **AUTHORS), nan)


def _distance() -> Iterator[Planned]:
    """The diagnostic tasks: whole volumes as they are, the mark along each axis, and hippocampi with a far mark."""
    rates = learning_rates()
    tasks = [(name, recipe.size, MIRROR) for name, recipe in mirror.RECIPES.items()]
    tasks += [(name, recipe.size, CUE) for name, recipe in cue.ALONG.items()]
    for seed, (name, size, budget), system in product(SEEDS, tasks, FAR):
        settings = {"learning_rate": rates[system], "augment": False, **budget}
        yield Planned(config_of(system, name, seed=seed, patch_size=size, **settings), nan)


# The runs of each grid; those that share STEPS are EQUAL_STEPS.
GRIDS: dict[str, Callable[[], Iterable[Planned]]] = {
    "rates": _search,
    "tom": lambda: _at_equal_steps(TOM),
    "peers": lambda: _at_equal_steps(("segresmamba", *SMALL)),
    "parts": lambda: _at_equal_steps(("segresmamba", *PARTS)),
    "seeds": _further_seeds,
    "ablations": lambda: _at_equal_steps(ABLATIONS),
    "time": _at_equal_time,
    "curve": _curve,
    "authors": _authors,
    "distance": _distance,
    "cue": _cue,
}
EQUAL_STEPS = ("tom", "peers", "parts", "seeds", "ablations")


def planned(name: str) -> list[Planned]:
    """The runs of a grid with their budgets, what matters most first.

    Raises:
        ValueError: an unknown name, answered with the known ones.
        FileNotFoundError: a table that decides steps or learning rates is not there.
    """
    if name not in GRIDS:
        raise ValueError(f"grid {name!r} is not one of {', '.join(GRIDS)}")
    return list(GRIDS[name]())


def configs(name: str) -> tuple[RunConfig, ...]:
    """The runs of a grid, what matters most first."""
    return tuple(run.config for run in planned(name))


def config_of(system: str, dataset: str = DATASET, **settings: Any) -> RunConfig:
    """The default profile's run of a system, which it names."""
    return config_for("default", dataset, system=system, **SYSTEMS[system].settings, **settings)


def _of_plan(system: str, fold: int, seed: int, **settings: Any) -> RunConfig:
    """A run with the plan's patches; its steps, too, unless others are given."""
    plan: dict[str, Any] = {"patch_size": PATCH, "batch_size": BATCH, "steps": STEPS} | settings
    return config_of(system, fold=fold, seed=seed, **plan)


def best_peer() -> str | None:
    """The peer with the highest mean Dice at equal steps, seed 0; `None` until all of them are done."""
    plan = [run for run in planned("peers") if run.config.system in SMALL]
    if not all(is_done(run.config) for run in plan):
        return None
    return str(_cases(plan).groupby("system")["dice"].mean().idxmax())


def plan_steps() -> pd.Series:
    """Milliseconds of a captured step of each system, by which the plan counts; others would make another plan."""
    return tables.read(paths.REFERENCE / "gpu" / "plan_steps.csv").set_index("system")[
        "captured_ms"
    ]


def cpu_step() -> pd.Series:
    """Seconds of a step of the plan on one core of a CPU, whose name it has, of `curve`'s systems.

    Measured by `bench step small` where there is no GPU, without samples.
    """
    table = tables.read(paths.REFERENCE / "cpu" / "step.csv").query("precision == 'fp32'")
    table = table.set_index("system")
    return (table["eager_ms"] / 1000).rename(table["device"].iloc[0])


def gpu_steps() -> pd.DataFrame:
    """Milliseconds, memory and energy of a step of each system in fp32 on one GPU, by its key."""
    table = tables.read(paths.REFERENCE / "gpu" / "small.csv")
    return table[table["precision"] == "fp32"].set_index("system")


def systems() -> pd.DataFrame:
    """Title and `cost` of each system, by its key; counted, which takes some seconds."""
    rows = {key: {"title": system.title, **cost(key)} for key, system in SYSTEMS.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("system")


def learning_rates() -> dict[str, float]:
    """The rate of each system: the one with the highest mean Dice in its search, or in its nearest kin's.

    Raises:
        FileNotFoundError: the search is not complete.
    """
    best = {system: _search_of(system)[1] for system in SEARCHED}
    if missing := [system for system, rate in best.items() if rate is None]:
        raise FileNotFoundError(
            f"the learning-rate search of {', '.join(missing)} is not complete: python -m srlib grid rates"
        )
    kin = {system: KIN.get(system, "segresmamba") for system in SYSTEMS}
    return {s: float(best[s if s in best else kin[s]] or nan) for s in SYSTEMS}


# --- What is kept of a run -----------------------------------------------------------------------

RECORDS = "the records of finished runs"
KEY = ["run", "system", "title", "dataset", "fold", "seed", "steps", "minutes", "learning_rate"]
COLUMNS = ("case", "class", "dice", "nsd", "hd95", "sensitivity", "volume_ref_ml", "volume_pred_ml")


def run_name(config: RunConfig) -> str:
    """The name of a run in the files, such as `segresmamba-fold0-seed1-1800-steps-2e-03`, and of another recipe."""
    rate = f"{config.learning_rate:.0e}"
    recipe = "" if config.recipe == "default" else f"-{config.recipe}"
    return (
        f"{config.system}-fold{config.fold}-seed{config.seed}-{config.steps}-steps-{rate}{recipe}"
    )


class Kept(NamedTuple):
    """Runs of a data set that the repository holds, by their names."""

    records: dict[str, dict[str, Any]]
    tables: dict[str, pd.DataFrame]


def kept(dataset: str) -> Kept:
    """The finished runs of a data set; its files are read again only when they have changed."""
    files = [paths.REFERENCE / dataset / name for name in ("runs.jsonl", "runs.csv")]
    if not all(file.is_file() for file in files):
        return Kept({}, {})
    stats = [file.stat() for file in files]
    return _read(*files, tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in stats))


@lru_cache(maxsize=32)
def _read(records: Path, scores: Path, _state: tuple) -> Kept:
    """The content of two files in this state; the records first, since they are written last."""
    lines = paths.read_json_lines(records, RECORDS, run=str)
    by_run: dict[str, pd.DataFrame] = {}
    if not all("diverged" in line for line in lines):  # which have no rows
        scored = tables.read_scores(scores).groupby("run", sort=False)
        by_run = {str(name): rows for name, rows in scored}
    return Kept({line["run"]: line for line in lines}, by_run)


def keep(config: RunConfig, table: str, record: Mapping[str, Any]) -> None:
    """Add a finished run to its data set's files.

    Both files are whole at any time; the record, which says that the run is done, is written last. Other processes
    that keep a run meanwhile wait.

    Args:
        config: the run.
        table: its metrics as CSV, as `srlib.run.evaluate` writes them.
        record: what it was computed with.

    Raises:
        ValueError: the table has other columns than those that are there.
    """
    folder, name = paths.REFERENCE / config.dataset, run_name(config)
    header, *rows = table.splitlines()
    with paths.locked(folder):
        paths.remove_temporaries(folder)
        file = folder / "runs.csv"
        top, *others = file.read_text().splitlines() if file.is_file() else [f"run,{header}"]
        if top != f"run,{header}":
            raise ValueError(f"{file} has the columns {top}, the run {name} has {header}")
        others = [line for line in others if not line.startswith(f"{name},")]  # of a killed process
        _write(file, [top, *others, *(f"{name},{row}" for row in rows)])
        file = folder / "runs.jsonl"
        records = paths.read_json_lines(file, RECORDS, run=str) if file.is_file() else []
        records = [kept for kept in records if kept["run"] != name] + [{**record, "run": name}]
        _write(file, [json.dumps(kept, sort_keys=True) for kept in records])


def _write(file: Path, lines: Sequence[str]) -> None:
    with paths.atomic_path(file) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def is_done(config: RunConfig) -> bool:
    """Tell whether the repository holds the run."""
    return run_name(config) in kept(config.dataset).records


def runs(name: str) -> pd.DataFrame:
    """One row for each finished run of a grid.

    Columns: `run`, `system`, `title`, `dataset`, `fold`, `seed`, `steps`, `minutes` (NaN at equal steps),
    `learning_rate`, `device`, `seconds` (of the training there), `diverged`, `commit`.
    """
    rows = []
    for run in planned(name):
        if is_done(run.config):
            record = kept(run.config.dataset).records[run_name(run.config)]
            made_with = {"device": record["device_name"]}
            made_with["seconds"] = record.get("training_seconds", nan)  # of one that diverged
            made_with |= {"diverged": "diverged" in record, "commit": record["commit"]}
            rows.append(_key(run) | made_with)
    return pd.DataFrame(rows, columns=[*KEY, "device", "seconds", "diverged", "commit"])


def budgets(name: str) -> pd.DataFrame:
    """One row for each budget of a grid by its `minutes`, the shortest first; none at equal steps.

    Columns: `planned` and `ended`, trainings, and `whole`, whether all ended. One that diverged has ended, too.
    """
    minutes = pd.Series([run.minutes for run in planned(name)], name="minutes")
    table = minutes.value_counts().sort_index().to_frame("planned")
    table["ended"] = runs(name)["minutes"].value_counts().reindex(table.index, fill_value=0)
    return table.assign(whole=table["ended"] == table["planned"])


def cases(name: str) -> pd.DataFrame:
    """One row for each finished run of a grid, case and class: a run's key and `evaluate`'s columns."""
    return _cases(planned(name))


def _cases(plan: Iterable[Planned]) -> pd.DataFrame:
    found = [
        kept(run.config.dataset).tables[run_name(run.config)].assign(**_key(run))
        for run in plan
        if run_name(run.config) in kept(run.config.dataset).tables
    ]
    named = pd.concat([pd.DataFrame(columns=[*KEY, *COLUMNS]), *found], ignore_index=True)
    return named.infer_objects()  # numbers are numbers, although the first table has no types


def _key(run: Planned) -> dict[str, Any]:
    config = run.config
    names = {"run": run_name(config), "title": SYSTEMS[config.system].title, "minutes": run.minutes}
    return {key: names[key] if key in names else getattr(config, key) for key in KEY}


# --- Computing ------------------------------------------------------------------------------------


class RunsFailed(RuntimeError):
    """Some runs of a grid could not be computed; the others are kept."""


def compute(names: Sequence[str], executor: Executor) -> None:
    """Train and score the missing runs of grids, in order; each one's table is written as it ends.

    A run that fails does not stop the others, unless its process dies and takes the pool along.
    What is interrupted computes nothing more that was queued. Finished runs are kept: start it again.

    Args:
        names: of grids.
        executor: computes the runs; what they leave comes back through it, so it may be on other machines.

    Raises:
        RunsFailed: at the end, names the runs that failed and what the first one said.
    """
    wanted = dict.fromkeys(config for name in names for config in configs(name))
    missing = [config for config in wanted if not is_done(config)]
    futures = {executor.submit(compute_run, config): config for config in missing}
    failed: dict[str, BaseException] = {}
    try:
        for future in tqdm(
            _as_they_end(futures), desc=f"grid {' '.join(names)}", total=len(futures)
        ):
            config = futures[future]
            if error := future.exception():
                failed[f"{config.dataset} {run_name(config)}"] = error
            else:
                keep(config, *future.result())
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    if failed:
        first = next(iter(failed.values()))
        said = f"{type(first).__name__}: {first}"
        raise RunsFailed(f"failed: {', '.join(failed)}; the first one said: {said}") from first


def _as_they_end(futures: Iterable[Future]) -> Iterator[Future]:
    """Yield futures as they end; `concurrent.futures.as_completed` limits the whole, not the wait for the next.

    Raises:
        TimeoutError: none did for `paths.LONGEST_WAIT` seconds: a queue without workers, or one that hangs.
    """
    pending = set(futures)
    while pending:
        ended, pending = wait(pending, paths.LONGEST_WAIT, FIRST_COMPLETED)
        if not ended:
            raise TimeoutError(
                f"no run ended for {paths.LONGEST_WAIT / 3600:g} h; are there workers?"
            )
        yield from ended


def compute_run(config: RunConfig) -> tuple[str, dict[str, Any]]:
    """Train and score one run; returns its table (CSV), without rows if the training diverged, and its record."""
    try:
        train(config, progress=False)
    except FloatingPointError as error:
        table = ",".join(COLUMNS) + "\n"
        record: dict[str, Any] = {"run": run_dir(config).name, "config": dataclasses.asdict(config)}
        record["diverged"] = str(error)
    else:
        evaluate(config, progress=False)
        record = paths.read_json(run_dir(config) / "run.json", "the record of a run", run=str)
        table = (run_dir(config) / "metrics.csv").read_text()
    record |= {"id": record.pop("run"), "recipe": paths.RECIPE}
    record |= {"device_name": machine.device_name(), "commit": machine.commit()[0]}
    return table, record


# --- For the notebooks ----------------------------------------------------------------------------


def committed(*names: str) -> pd.DataFrame:
    """The finished runs of some grids of one budget: the columns of `cases`, and `device`.

    A run that two grids hold comes once. For each grid a line says how much of it is there; where that is nothing,
    there are no rows.
    """
    tables = []
    for name in names:
        try:
            found, done = cases(name), runs(name)
        except FileNotFoundError:  # what decides its steps or learning rates is not there yet
            print(f"grid {name}: the repository holds nothing of it yet")
            continue
        print(f"grid {name}: the repository holds {len(done)} of {len(planned(name))} runs")
        if len(found):
            tables.append(found.merge(done[["dataset", "run", "device"]]))
    if not tables:
        return pd.DataFrame(columns=[*KEY, *COLUMNS, "device"])
    return pd.concat(tables, ignore_index=True).drop_duplicates(
        ["dataset", "run", "minutes", "case", "class"]
    )


def made_with(cases: pd.DataFrame) -> str:
    """Cases, folds, seeds, steps and devices of a table of `committed`, for the stamp of a figure."""

    def span(column: str) -> str:
        low, high = cases[column].min(), cases[column].max()
        return f"{low:g}" if low == high else f"{low:g}-{high:g}"

    steps = f"{cases['steps'].iloc[0]:,} steps"
    if cases["steps"].nunique() > 1:
        steps = f"the steps of {span('minutes')} minutes"
    where = f"{'/'.join(cases['dataset'].unique())}, {cases['case'].nunique()} cases"
    seeds = f"fold {span('fold')}, seed {span('seed')}"
    return " | ".join((where, seeds, steps, "/".join(cases["device"].unique())))


@cache
def cost(system: str) -> Mapping[str, float]:
    """Parameters of a system, and GMACs of one forward pass of one patch."""
    config = config_of(system, patch_size=PATCH)
    network = build_model(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 1, *config.patch_size))
    parameters = sum(p.numel() for p in network.parameters())
    gmacs = counter.get_total_flops() / 2e9
    return MappingProxyType({"parameters": parameters, "gmacs": gmacs})


# --- Executors ------------------------------------------------------------------------------------


def executor(
    name: str, workers: int, scheduler: str | None = None, job: Mapping[str, str] | None = None
) -> AbstractContextManager[Executor]:
    """An executor by its name, to be used in a `with` statement.

    Args:
        name: `process`, `dask` or `slurm`.
        workers: runs computed at a time; those of a Dask scheduler are its own.
        scheduler: address of a Dask scheduler; `None` starts workers on this machine.
        job: what a SLURM job asks for, in submitit's names, such as `slurm_partition`, `gpus_per_node`, `timeout_min`.

    Raises:
        ValueError: an unknown name, or a parameter that submitit does not know.
        ImportError: the extra that it needs is not installed.
        OSError: there is no scheduler at that address.
    """
    if name == "process":
        return _processes(workers)
    if name == "dask":
        return _dask(workers, scheduler)
    if name == "slurm":
        return jobs(workers, job or {})
    raise ValueError(f"executor {name!r} is not one of process, dask, slurm")


def _processes(workers: int) -> Executor:
    """Processes of this machine; where there are CUDA devices, each worker takes the next one in turn."""
    spawn = multiprocessing.get_context("spawn")
    numbers = spawn.SimpleQueue()
    for number in range(workers):
        numbers.put(number)
    return ProcessPoolExecutor(workers, spawn, _take_device, (numbers,))


def _take_device(numbers: SimpleQueue) -> None:
    # Ctrl-C ends it; its run resumes from its checkpoint.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if torch.cuda.is_available() and "SRLIB_DEVICE" not in os.environ:
        os.environ["SRLIB_DEVICE"] = f"cuda:{numbers.get() % torch.cuda.device_count()}"


@contextmanager
def _dask(workers: int, scheduler: str | None) -> Iterator[Executor]:
    """Workers of Dask distributed; those that are started here have as many threads as this process."""
    try:
        from distributed import Client
    except ImportError as error:
        raise ImportError('the executor "dask" needs: pip install "srlib[dask]"') from error
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(torch.get_num_threads()))
    here = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None}
    before = dict(os.environ)
    try:
        with Client(scheduler) if scheduler else Client(**here, env=threads) as client:
            yield client.get_executor(pure=False)
    finally:  # Dask sets OMP_NUM_THREADS=1 and others here too, to hand them down, and leaves them
        os.environ.clear()
        os.environ.update(before)


def jobs(workers: int, parameters: Mapping[str, str], cluster: str = "slurm") -> Executor:
    """Jobs of a cluster that submitit knows; their logs are in `results/jobs`."""
    try:
        from submitit import AutoExecutor
    except ImportError as error:
        raise ImportError('the executor "slurm" needs: pip install "srlib[slurm]"') from error
    if cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise FileNotFoundError(
            "--executor slurm: sbatch and srun are not here; expected a machine that submits jobs,"
            " or --executor process"
        )
    made = AutoExecutor(paths.results_root() / "jobs", cluster)
    numbers = {k: int(v) if v.isdecimal() else v for k, v in parameters.items()}
    try:
        made.update_parameters(name="srlib", **numbers)
    except (AssertionError, NameError, TypeError) as error:  # submitit's words for a wrong name
        raise ValueError(f"a parameter of the job is wrong: {error}") from error
    return _Jobs(workers, made)


class _Jobs(ThreadPoolExecutor):
    """A cluster's jobs: each thread submits one and waits for its result."""

    def __init__(self, workers: int, cluster: Any) -> None:
        super().__init__(workers)
        self.cluster = cluster

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Submit a job once a thread is free; one that runs out of time is queued again, and its run resumes."""
        from submitit.helpers import FunctionSequence

        call = FunctionSequence()
        call.add(function, *args, **kwargs)
        return super().submit(lambda: self.cluster.submit(call).result()[0])
