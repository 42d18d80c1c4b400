"""A run is one training. It has an identity, a folder, and is never done twice.

The identity hashes everything that the trained weights depend on: the configuration, the data, the sources from
the network to the training loop, the kind of device and the number of threads (which sets the order of sums).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from srlib import data, profiles
from srlib.model import FEATURES
from srlib.paths import ROOT, runs_root
from srlib.scan import ORDERS

SOURCES = (
    "model.py",
    "recompute.py",
    "tom.py",
    "scan",
    "datasets.py",
    "data.py",
    "cohort.py",
    "train.py",
)


@dataclass(frozen=True)
class RunConfig:
    """Everything that one training is asked to do.

    Attributes:
        dataset: name in `srlib.data.REGISTRY`.
        fold: which fold is held out.
        seed: of the initial weights and of every sample.
        steps: optimizer steps; the budget of a comparison.
        model: size of the network, a name in `srlib.model.FEATURES`.
        variant, tom, tom_residual, scan_orders, nslices: arguments of `SegResMamba`.
        batch_size: patches a step.
        patch_size: voxels of a patch (D, H, W), also the window of inference.
        learning_rate: peak of the schedule.
        weight_decay: of AdamW.
        warmup: steps of linear warm-up.
        augment: random affine, flips, intensity and noise.
        precision: Lightning Fabric's name, `32-true` or `bf16-mixed`.
        test_cases: how many held-out cases are evaluated; `None` is all.
    """

    dataset: str
    fold: int = 0
    seed: int = 0
    steps: int = 1500
    model: str = "small"
    variant: str = "paper"
    tom: str | None = None
    tom_residual: bool = False
    scan_orders: tuple[str, ...] = ORDERS
    nslices: int | None = None
    batch_size: int = 2
    patch_size: tuple[int, int, int] = (48, 64, 48)
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    warmup: int = 50
    augment: bool = True
    precision: str = "32-true"
    test_cases: int | None = None

    def __post_init__(self) -> None:
        if self.model not in FEATURES:
            raise ValueError(f"model {self.model!r} is not one of {', '.join(FEATURES)}")
        for name in ("steps", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def to_json(self) -> str:
        """The configuration as JSON with sorted keys."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def config_for(
    profile: str, dataset: str, fold: int = 0, seed: int = 0, **overrides: object
) -> RunConfig:
    """The run that a profile trains on a data set; `overrides` replace single settings."""
    chosen = dataclasses.asdict(profiles.get(profile))
    del chosen["name"]
    settings = {"warmup": max(1, min(50, chosen["steps"] // 10)), **chosen, **overrides}
    return RunConfig(dataset=dataset, fold=fold, seed=seed, **settings)


def device() -> torch.device:
    """`$SRLIB_DEVICE`, else the first CUDA device, else the CPU."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(os.environ.get("SRLIB_DEVICE") or default)


def run_id(config: RunConfig) -> str:
    """The identity of a run on this machine: 12 hexadecimal digits."""
    parts = {
        "config": config.to_json(),
        "data": data.fingerprint(config.dataset),
        "sources": source_hash(SOURCES),
        "device": device().type,
        "threads": torch.get_num_threads(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def run_dir(config: RunConfig) -> Path:
    """The folder of a run (it may not exist yet)."""
    return runs_root() / run_id(config)


def is_done(config: RunConfig) -> bool:
    """Whether the run's training has finished here."""
    return (run_dir(config) / "run.json").is_file()


@cache
def source_hash(names: tuple[str, ...]) -> str:
    """Hash of source files and folders of `srlib`, by name and content."""
    package = ROOT / "srlib"
    files = [package / name for name in names]
    files = [f for path in files for f in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
