"""Comparisons: lists of runs, computed where they are missing, their tables committed as they finish.

A *system* is a network by what is special about it, a *grid* a list of runs in the order of their importance. What a
run leaves for the repository is small: `results/reference/<dataset>/runs/<run>.csv`, its metrics per case and class,
and `<run>.json`, what it was and what it was computed with. Notebooks read these and train nothing.

Two budgets are never mixed. At *equal steps* each system takes the same number of optimizer steps. At *equal time*
a system takes as many as fit into given minutes on two cores of a CPU, by the seconds a step that
`results/reference/cpu/systems.csv` holds. Steps are the budget in both, so a run may be computed on any device.
(`python -m srlib bench systems` measures these seconds here; to store them would plan all such runs anew.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass
from functools import cache
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from srlib import cue, paths, provenance
from srlib.baselines import SMALL
from srlib.evaluate import evaluate
from srlib.runs import SOURCES, RunConfig, config_for, run_dir
from srlib.train import build_model, train

DATASET = "hippocampus"
SEEDS = (0, 1, 2)
FOLDS = (0, 1, 2, 3, 4)
RATES = (1e-3, 2e-3, 4e-3, 8e-3)  # the search that every system is given
RATE_FOLD = 1  # its held-out cases, which fold 0 trains on, decide
RATE_STEPS = 600
MINUTES = 12.0  # of one training, on two CPU cores
LONG_MINUTES = 60.0
CUE_RATE = 2e-3
CUE_STEPS = 800
CURVE_MINUTES = (1.5, 3.0, 6.0)  # Dice against minutes; MINUTES are its last point


@dataclass(frozen=True)
class System:
    """A network of the comparisons.

    Attributes:
        title: as tables and figures call it.
        settings: the fields of `RunConfig` that make it.
    """

    title: str
    settings: dict[str, Any]


SYSTEMS: dict[str, System] = {
    "both": System("SegResMamba", {}),
    "none": System("no ToM", {"tom": "none"}),
    "conv": System("convolution for ToM", {"tom": "conv"}),
    "inner": System("inner ToM only", {"tom": "inner"}),
    "outer": System("outer ToM only", {"tom": "outer"}),
    "forward": System("one scan order", {"scan_orders": ("forward",)}),
    "forward_reverse": System("two scan orders", {"scan_orders": ("forward", "reverse")}),
    "slices4": System("4 slices", {"nslices": 4}),
    "residual": System("ToM adds its input", {"tom_residual": True}),
    "no_recurrence": System("no recurrence", {"recurrence": False}),
    "no_extra_conv": System("no extra convolution", {"extra_conv": False}),
    "segmamba_block": System("SegMamba's block", {"block": "segmamba"}),
    **{name: System(peer.title, {"model": name}) for name, peer in SMALL.items()},
}
TOM = ("both", "none", "conv")
CUE_SYSTEMS = (*TOM, "no_recurrence")
ABLATIONS = tuple(name for name in SYSTEMS if name not in (*TOM, *SMALL))


class Planned(NamedTuple):
    """A run of a grid, and the minutes that are its budget; NaN at equal steps."""

    config: RunConfig
    minutes: float


def _rates() -> Iterator[Planned]:
    """The learning-rate search, as many steps for each system."""
    for system in (*TOM, *SMALL):
        for rate in RATES:
            yield Planned(_config(system, RATE_FOLD, 0, steps=RATE_STEPS, learning_rate=rate), nan)


def _tom() -> Iterator[Planned]:
    """ToM, nothing or a convolution: three seeds on fold 0, then the other folds."""
    for seed in SEEDS:
        yield from (at_equal_steps(system, seed=seed) for system in TOM)
    for fold in FOLDS[1:]:
        yield from (at_equal_steps(system, fold=fold) for system in TOM)


def _peers() -> Iterator[Planned]:
    for seed in SEEDS:
        yield from (at_equal_steps(system, seed=seed) for system in ("both", *SMALL))


def _peers_in_time() -> Iterator[Planned]:
    for seed in SEEDS:
        yield from (in_minutes(system, MINUTES, seed=seed) for system in (*TOM, *SMALL))


def _curve() -> Iterator[Planned]:
    for minutes in CURVE_MINUTES:
        yield from (in_minutes(system, minutes) for system in (*TOM, *SMALL))


def _ablations() -> Iterator[Planned]:
    for seed in SEEDS:
        yield from (at_equal_steps(system, seed=seed) for system in ABLATIONS)


def _cue() -> Iterator[Planned]:
    """The diagnostic task: whole volumes as they are, one learning rate for all."""
    for seed in SEEDS:
        for dataset, recipe in cue.RECIPES.items():
            for system in CUE_SYSTEMS:
                settings = {**SYSTEMS[system].settings, "steps": CUE_STEPS, "augment": False}
                settings |= {"patch_size": recipe.shape, "learning_rate": CUE_RATE}
                yield Planned(config_for("default", dataset, seed=seed, **settings), nan)


def _long() -> Iterator[Planned]:
    yield in_minutes("both", LONG_MINUTES)


GRIDS: dict[str, Callable[[], Iterator[Planned]]] = {
    "rates": _rates,
    "tom": _tom,
    "peers": _peers,
    "peers-time": _peers_in_time,
    "ablations": _ablations,
    "cue": _cue,
    "long": _long,
    "curve": _curve,
}


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


def at_equal_steps(system: str, fold: int = 0, seed: int = 0) -> Planned:
    """A run of as many steps as SegResMamba takes in `MINUTES`, whatever the system."""
    return Planned(_tuned(system, fold, seed, steps_in("both", MINUTES)), nan)


def in_minutes(system: str, minutes: float, seed: int = 0) -> Planned:
    """A run on fold 0 of as many steps as the system takes in these minutes."""
    return Planned(_tuned(system, 0, seed, steps_in(system, minutes)), minutes)


def _tuned(system: str, fold: int, seed: int, steps: int) -> RunConfig:
    """With the learning rate that the search chose; ablations take SegResMamba's."""
    rate = learning_rates()["both" if system in ABLATIONS else system]
    return _config(system, fold, seed, steps=steps, learning_rate=rate)


def _config(system: str, fold: int, seed: int, **settings: Any) -> RunConfig:
    return config_for("default", DATASET, fold, seed, **SYSTEMS[system].settings, **settings)


def steps_in(system: str, minutes: float) -> int:
    """How many steps of a system fit into these minutes on the CPU that `systems.csv` was measured on."""
    return round(60 * minutes / systems()["step_seconds"][system])


def systems() -> pd.DataFrame:
    """Parameters, MACs and measured seconds a step of each system, by its key."""
    return pd.read_csv(paths.REFERENCE / "cpu" / "systems.csv", index_col="system")


def learning_rates() -> dict[str, float]:
    """The rate of each system with the highest mean Dice in the search.

    Raises:
        FileNotFoundError: the search is not complete.
    """
    plan = list(_rates())
    if missing := [run for run in plan if not is_done(run.config)]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(plan)} runs of the learning-rate search are missing:"
            " python -m srlib grid rates"
        )
    return _best_rates(tuple(plan), paths.REFERENCE)


@cache
def _best_rates(plan: tuple[Planned, ...], folder: Path) -> dict[str, float]:
    """Of a search that is complete in that folder, and so does not change."""
    found = _cases(list(plan)).groupby(["system", "learning_rate"])["dice"].mean().unstack()
    return {str(system): float(rate) for system, rate in found.idxmax(axis=1).items()}


# --- What is kept of a run -----------------------------------------------------------------------


@cache
def system_of(config: RunConfig) -> str:
    """The key of the system that a run trains."""
    fields = sorted({field for system in SYSTEMS.values() for field in system.settings})
    settings = {field: getattr(config, field) for field in fields}
    plain = {field: getattr(config_for("default", config.dataset), field) for field in fields}
    for key, system in SYSTEMS.items():
        if settings == {**plain, **system.settings}:
            return key
    raise ValueError(f"no system has the settings {settings}")


def run_name(config: RunConfig) -> str:
    """The name of a run's files, such as `both-fold0-seed1-1800-steps-2e-03`."""
    rate = f"{config.learning_rate:.0e}"
    return f"{system_of(config)}-fold{config.fold}-seed{config.seed}-{config.steps}-steps-{rate}"


def table_file(config: RunConfig) -> Path:
    """Where the repository keeps a run's metrics; the record lies beside it as `.json`."""
    return paths.REFERENCE / config.dataset / "runs" / f"{run_name(config)}.csv"


def is_done(config: RunConfig) -> bool:
    """Whether the repository holds the run's table."""
    return table_file(config).is_file()


def runs(name: str) -> pd.DataFrame:
    """One row for each finished run of a grid.

    Columns: `run`, `system`, `title`, `dataset`, `fold`, `seed`, `steps`, `minutes` (NaN at equal steps),
    `learning_rate`, `device`, `seconds` (of the training there), `commit`.
    """
    rows = []
    for config, minutes in planned(name):
        if not is_done(config):
            continue
        record = json.loads(table_file(config).with_suffix(".json").read_text())
        made_with = {key: record[key] for key in ("device_name", "training_seconds", "commit")}
        rows.append(_key(config, minutes) | made_with)
    table = pd.DataFrame(rows, columns=[*KEY, "device_name", "training_seconds", "commit"])
    return table.rename(columns={"device_name": "device", "training_seconds": "seconds"})


def cases(name: str) -> pd.DataFrame:
    """One row for each finished run of a grid, case and class: a run's key and `evaluate`'s columns."""
    return _cases(planned(name))


def _cases(plan: list[Planned]) -> pd.DataFrame:
    tables = [
        pd.read_csv(table_file(config), dtype={"case": str}).assign(**_key(config, minutes))
        for config, minutes in plan
        if is_done(config)
    ]
    named = pd.concat([pd.DataFrame(columns=[*KEY, *COLUMNS]), *tables], ignore_index=True)
    return named.infer_objects()  # numbers are numbers, although the first table has no types


KEY = (
    *("run", "system", "title", "dataset", "fold", "seed"),
    *("steps", "minutes", "learning_rate"),
)
COLUMNS = ("case", "class", "dice", "nsd", "hd95", "sensitivity", "volume_ref_ml", "volume_pred_ml")


def _key(config: RunConfig, minutes: float) -> dict[str, Any]:
    system = system_of(config)
    values = (run_name(config), system, SYSTEMS[system].title, config.dataset, config.fold)
    values += (config.seed, config.steps, minutes, config.learning_rate)  # type: ignore[assignment]
    return dict(zip(KEY, values, strict=True))


# --- Computing ------------------------------------------------------------------------------------


class RunsFailed(RuntimeError):
    """Some runs of a grid could not be computed; the others are kept."""


def compute(names: Sequence[str], executor: Executor) -> None:
    """Train and score the missing runs of grids, in order; each one's table is written as it ends.

    A run that fails does not stop the others, unless its process dies and takes the pool along (`srlib.executors`).
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
    bar = tqdm(desc=f"grid {' '.join(names)}", total=len(futures))
    try:
        for future in as_completed(futures):
            bar.update()
            config = futures[future]
            if error := future.exception():
                failed[f"{config.dataset} {run_name(config)}"] = error
            else:
                _keep(config, *future.result())
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    finally:
        bar.close()
    if failed:
        first = next(iter(failed.values()))
        said = f"{type(first).__name__}: {first}"
        raise RunsFailed(f"failed: {', '.join(failed)}; the first one said: {said}") from first


def compute_run(config: RunConfig) -> tuple[str, str]:
    """Train and score one run; returns its table (CSV) and its record (JSON)."""
    train(config, progress=False)
    evaluate(config, progress=False)
    record = json.loads((run_dir(config) / "run.json").read_text())
    record |= {"system": system_of(config), "sources": paths.source_hash(SOURCES)}
    record |= {"device_name": provenance.device_name(), "commit": provenance.commit()[0]}
    table = (run_dir(config) / "metrics.csv").read_text()
    return table, json.dumps(record, indent=1, sort_keys=True) + "\n"


def _keep(config: RunConfig, table: str, record: str) -> None:
    """Write what a run leaves; the table, which says that it is done, comes last."""
    for file, text in (
        (table_file(config).with_suffix(".json"), record),
        (table_file(config), table),
    ):
        with paths.atomic_path(file) as temporary:
            temporary.write_text(text)


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
    steps = f"{cases['steps'].iloc[0]:,} steps"
    if cases["steps"].nunique() > 1:
        steps = f"the steps of {_span(cases['minutes'])} minutes"
    where = f"{'/'.join(cases['dataset'].unique())}, {cases['case'].nunique()} cases"
    seeds = f"fold {_span(cases['fold'])}, seed {_span(cases['seed'])}"
    return " | ".join((where, seeds, steps, "/".join(cases["device"].unique())))


def _span(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def cost(system: str) -> dict[str, float]:
    """Parameters of a system, and GMACs of one forward pass of one patch of the default profile."""
    config = config_for("default", DATASET, **SYSTEMS[system].settings)
    network = build_model(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 1, *config.patch_size))
    parameters = sum(p.numel() for p in network.parameters())
    return {"parameters": parameters, "gmacs": counter.get_total_flops() / 2e9}
