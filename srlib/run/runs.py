"""A run is one training. It has an identity, a folder, and is never done twice.

The identity hashes everything that the trained weights depend on: the configuration, the data, what a folder's
`dataset.json` states of it, the version `srlib.files.RECIPE` of what is computed, the kind of device and the numbers of
threads and of processes (which set the order of sums).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from srlib import data
from srlib.data import plans
from srlib.data.scans import Normalisation
from srlib.files import RECIPE, runs_root
from srlib.machine import device, processes
from srlib.net.costs import step_memory
from srlib.net.model import FEATURES
from srlib.net.peers import SMALL
from srlib.run import profiles
from srlib.scan import ORDERS

DEFAULT = profiles.get("default")
RECIPES = ("default", "authors")  # of training
MEMORY = 4.0  # GiB that a training step may take unless another budget is stated


@dataclass(frozen=True)
class RunConfig:
    """Everything that one training is asked to do.

    Attributes:
        dataset: name in `srlib.data.catalog.CATALOG`, or the whole path of a folder.
        fold: which fold is held out.
        seed: of the initial weights and of every sample.
        steps: optimizer steps; the budget of a comparison.
        model: size of SegResMamba, a name in `srlib.net.model.FEATURES`, or a peer, a name in `srlib.net.peers.SMALL`.
        variant, tom, tom_residual, scan_orders, nslices, slice_axis, recurrence, extra_conv, block: arguments of
            `SegResMamba`.
        batch_size: patches a step, of all processes together.
        patch_size: voxels of a patch (D, H, W), also the window of inference.
        learning_rate: peak of the schedule.
        weight_decay: of AdamW, for all but vectors and A.
        warmup: share of the steps with linear warm-up, 0 to below 1.
        augment: random affine, flips, intensity and noise; as the recipe has them.
        precision: Lightning Fabric's name, `32-true` or `bf16-mixed`.
        recipe: `default`, or `authors`, that of the paper's authors (`srlib.run.train`).
        test_cases: how many held-out cases are evaluated; `None` is all.
        system: key in `srlib.study.grid.SYSTEMS` of the system that these settings make, empty outside of comparisons;
            a name, and no part of the run's identity.
    """

    dataset: str
    fold: int = 0
    seed: int = 0
    steps: int = DEFAULT.steps
    model: str = DEFAULT.model
    variant: str = "paper"
    tom: str | None = None
    tom_residual: bool = False
    scan_orders: tuple[str, ...] = ORDERS
    nslices: int | None = None
    slice_axis: int = 0
    recurrence: bool = True
    extra_conv: bool = True
    block: str = "cmmb"
    batch_size: int = DEFAULT.batch_size
    patch_size: tuple[int, int, int] = DEFAULT.patch_size
    learning_rate: float = DEFAULT.learning_rate
    weight_decay: float = 1e-2
    warmup: float = 0.05
    augment: bool = True
    precision: str = "32-true"
    recipe: str = "default"
    test_cases: int | None = None
    system: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.model not in (*FEATURES, *SMALL):
            names = ", ".join((*FEATURES, *SMALL))
            raise ValueError(f"model {self.model!r} is not one of {names}")
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe {self.recipe!r} is not one of {', '.join(RECIPES)}")
        for name in ("steps", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(
                f"warmup is a share of the steps, from 0 to below 1, got {self.warmup}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ValueError(f"patch_size must be three positive numbers, got {self.patch_size}")

    def to_json(self) -> str:
        """The settings as JSON with sorted keys, without the system's name; the recipe unless it is the default one."""
        settings = dataclasses.asdict(self)
        del settings["system"]
        if self.recipe == "default":  # runs from before there was another one keep their identity
            del settings["recipe"]
        return json.dumps(settings, sort_keys=True)


def config_for(
    profile: str, dataset: str, fold: int = 0, seed: int = 0, **overrides: object
) -> RunConfig:
    """Configure the run that a profile trains on a data set; `overrides` replace single settings.

    A folder's patches are those of its plan, but for the smoke profile.
    """
    entry = data.get(dataset)
    settings = {**dataclasses.asdict(profiles.get(profile)), **overrides}
    del settings["name"]
    if entry.median_size and profile != "smoke" and "patch_size" not in overrides:
        settings["patch_size"], _ = planned_patch(entry)
    return RunConfig(dataset=entry.name, fold=fold, seed=seed, **settings)


def open_data(config: RunConfig) -> data.Dataset:
    """Open a run's data set as its recipe has it: the authors' scales what is not 0, and mirrors along every axis.

    Raises:
        ValueError, FileNotFoundError, DataError: as `srlib.data.open`.
    """
    dataset = data.open(config.dataset)
    if config.recipe == "default":
        return dataset
    theirs, entry = copy.copy(dataset), dataset.entry
    scaled: list[Normalisation] = ["nonzero"] * entry.in_channels
    theirs.entry = dataclasses.replace(entry, normalisation=tuple(scaled), flip_axes=(0, 1, 2))
    return theirs


def planned_patch(
    entry: data.Entry, model: str = DEFAULT.model, memory: float = MEMORY
) -> tuple[tuple[int, int, int], float]:
    """Plan the patch size for a folder: its voxels, and the GiB that a training step of `model` takes."""
    counted = step_memory(model, entry.in_channels, entry.out_channels)
    return plans.patch_size(entry.median_size or (), counted, memory)


def plan_in_words(folder: str, model: str = DEFAULT.model, memory: float = MEMORY) -> str:
    """Say how a folder's cases will be trained on, in lines."""
    plan = plans.load(Path(folder))
    patch, needed = planned_patch(plan.entry, model, memory)
    size = " x ".join(map(str, patch))
    step = f"patches of {size} voxels: a training step of the network {model!r} with {plans.BATCH} of them"
    return "\n".join(
        [*plan.summary, f"{step} takes {needed:.2f} GiB (counted), allowed are {memory:g}"]
    )


def run_id(config: RunConfig) -> str:
    """The identity of a run on this machine: 12 hexadecimal digits."""
    dataset = data.open(config.dataset)
    parts: dict[str, Any] = {
        "config": config.to_json(),
        "data": dataset.fingerprint,
        "recipe": RECIPE,
        "device": device().type,
        "threads": torch.get_num_threads(),
        "processes": processes(),
    }
    if stated := dataset.entry.stated:
        parts["stated"] = stated
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def run_dir(config: RunConfig) -> Path:
    """The folder of a run, which need not exist."""
    return runs_root() / run_id(config)


def is_done(config: RunConfig) -> bool:
    """Tell whether the run's training has finished here."""
    return (run_dir(config) / "run.json").is_file()
