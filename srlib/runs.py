"""A run is one training. It has an identity, a folder, and is never done twice.

The identity hashes everything that the trained weights depend on: the configuration, the data, the sources from
the network to the training loop, the kind of device and the numbers of threads and of processes (which set the
order of sums).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from srlib import data, profiles
from srlib.baselines import SMALL
from srlib.model import FEATURES
from srlib.paths import runs_root, source_hash
from srlib.scan import ORDERS

SOURCES = (
    "model.py",
    "baselines.py",
    "tom.py",
    "scan",
    "images.py",
    "layouts.py",
    "registry.py",
    "labels.py",
    "plans.py",
    "datasets.py",
    "data.py",
    "cohort.py",
    "cue.py",
    "train.py",
)


DEFAULT = profiles.get("default")


@dataclass(frozen=True)
class RunConfig:
    """Everything that one training is asked to do.

    Attributes:
        dataset: name in `srlib.data.REGISTRY`, or the whole path of a folder (`srlib.plans`).
        fold: which fold is held out.
        seed: of the initial weights and of every sample.
        steps: optimizer steps; the budget of a comparison.
        model: size of SegResMamba, a name in `srlib.model.FEATURES`, or a peer, a name in `srlib.baselines.SMALL`.
        variant, tom, tom_residual, scan_orders, nslices, recurrence, extra_conv, block: arguments of `SegResMamba`.
        batch_size: patches a step, of all processes together.
        patch_size: voxels of a patch (D, H, W), also the window of inference.
        learning_rate: peak of the schedule.
        weight_decay: of AdamW.
        warmup: steps of linear warm-up.
        augment: random affine, flips, intensity and noise.
        precision: Lightning Fabric's name, `32-true` or `bf16-mixed`.
        test_cases: how many held-out cases are evaluated; `None` is all.
        system: key of the system in `srlib.grid.SYSTEMS` that these settings make, empty outside of comparisons; a
            name, and no part of the run's identity.
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
    recurrence: bool = True
    extra_conv: bool = True
    block: str = "cmmb"
    batch_size: int = DEFAULT.batch_size
    patch_size: tuple[int, int, int] = DEFAULT.patch_size
    learning_rate: float = DEFAULT.learning_rate
    weight_decay: float = 1e-2
    warmup: int = 50
    augment: bool = True
    precision: str = "32-true"
    test_cases: int | None = None
    system: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.model not in (*FEATURES, *SMALL):
            names = ", ".join((*FEATURES, *SMALL))
            raise ValueError(f"model {self.model!r} is not one of {names}")
        for name in ("steps", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ValueError(f"patch_size must be three positive numbers, got {self.patch_size}")

    def to_json(self) -> str:
        """The settings as JSON with sorted keys, without the system's name."""
        settings = dataclasses.asdict(self)
        del settings["system"]
        return json.dumps(settings, sort_keys=True)


def config_for(
    profile: str, dataset: str, fold: int = 0, seed: int = 0, **overrides: object
) -> RunConfig:
    """The run that a profile trains on a data set; `overrides` replace single settings.

    A folder's patches are those of its plan, but for the smoke profile.
    """
    chosen, entry = dataclasses.asdict(profiles.get(profile)), data.get(dataset)
    if entry.patch_size and profile != "smoke":
        chosen["patch_size"] = entry.patch_size
    del chosen["name"]
    settings = {"warmup": max(1, min(50, chosen["steps"] // 10)), **chosen, **overrides}
    return RunConfig(dataset=entry.name, fold=fold, seed=seed, **settings)


def device() -> torch.device:
    """`$SRLIB_DEVICE`, else the first CUDA device, else the CPU.

    Raises:
        ValueError: it names no device of this machine.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    asked = os.environ.get("SRLIB_DEVICE") or ("cuda" if count else "cpu")
    if asked not in ("cpu", *["cuda"][:count], *(f"cuda:{number}" for number in range(count))):
        here = f"{count} CUDA device(s), with PyTorch {torch.__version__}"
        raise ValueError(f"SRLIB_DEVICE={asked}: expected cpu, cuda or cuda:N; here: {here}")
    return torch.device(asked)


def processes() -> int:
    """How many processes train one run together: as many as torchrun started, else 1."""
    return int(os.environ["WORLD_SIZE"]) if torch.distributed.is_torchelastic_launched() else 1


def is_first_process() -> bool:
    """Whether this process is the one that writes; the others of torchrun only compute."""
    return processes() == 1 or os.environ["RANK"] == "0"


def run_id(config: RunConfig) -> str:
    """The identity of a run on this machine: 12 hexadecimal digits."""
    parts = {
        "config": config.to_json(),
        "data": data.fingerprint(config.dataset),
        "sources": source_hash(SOURCES),
        "device": device().type,
        "threads": torch.get_num_threads(),
        "processes": processes(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def run_dir(config: RunConfig) -> Path:
    """The folder of a run (it may not exist yet)."""
    return runs_root() / run_id(config)


def is_done(config: RunConfig) -> bool:
    """Whether the run's training has finished here."""
    return (run_dir(config) / "run.json").is_file()
