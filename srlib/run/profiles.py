"""The three sizes in which the collection runs; imported by the command line, whose help comes before torch.

What a training is not told (`srlib.run.runs.RunConfig`, `python -m srlib train`) is that of `default`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """Amount of computing.

    Attributes:
        name: `smoke` (tests the machinery, its numbers mean nothing), `default` (a laptop) or `full` (a GPU).
        model: name of the network's size in `srlib.net.model.FEATURES`.
        steps: optimizer steps of a training.
        batch_size: patches a step.
        patch_size: voxels of a patch (D, H, W).
        learning_rate: peak of the schedule.
        test_cases: how many held-out cases are evaluated; `None` is all.
    """

    name: str
    model: str
    steps: int
    batch_size: int
    patch_size: tuple[int, int, int]
    learning_rate: float
    test_cases: int | None


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("smoke", "tiny", 8, 1, (40, 48, 40), 2e-3, 3),
        Profile("default", "small", 1000, 2, (48, 64, 48), 4e-3, None),
        Profile("full", "paper", 10_000, 2, (40, 56, 40), 1e-3, None),
    )
}


def get(name: str) -> Profile:
    """The profile of that name; a ValueError names the choices."""
    if name not in PROFILES:
        raise ValueError(f"profile {name!r} is not one of {', '.join(PROFILES)}")
    return PROFILES[name]


def current() -> Profile:
    """The profile of `$SRLIB_PROFILE`, `default` when that is not set."""
    return get(os.environ.get("SRLIB_PROFILE") or "default")
