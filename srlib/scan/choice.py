"""Which back end does the work: what can run is found once, the automatic choice logged once."""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import NamedTuple

import torch

from . import chunked, cpu, mamba_ssm, triton

logger = logging.getLogger("srlib.scan")

# Back ends of the operator; `auto` takes the first of a device's list that can run.
WORKERS: dict[str, ModuleType] = {
    "chunked": chunked,
    "cpu": cpu,
    "mamba_ssm": mamba_ssm,
    "triton": triton,
}
PREFERRED = {"cpu": ("cpu", "chunked"), "cuda": ("triton", "mamba_ssm", "chunked")}
PREFERRED_ELSEWHERE = ("chunked",)


class BackendState(NamedTuple):
    """Whether a back end can run on this machine and, when it cannot, why."""

    available: bool
    reason: str


@functools.cache
def backends() -> dict[str, BackendState]:
    """The back ends by name with their state, found once: `reference`, then the operator's."""
    reasons = {name: worker.unavailable() for name, worker in WORKERS.items()}
    states = {name: BackendState(not reason, reason) for name, reason in reasons.items()}
    return {"reference": BackendState(True, ""), **states}


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module that does the work of `backend` for tensors on `device`.

    Raises:
        ValueError: `backend` is no back end's name, or it cannot take such tensors.
        RuntimeError: it cannot run on this machine.
    """
    if backend == "auto":
        return WORKERS[_automatic(device.type, dtype)]
    if backend not in WORKERS:
        names = ", ".join(["auto", *backends()])
        raise ValueError(f"backend: expected one of {names}, got {backend!r}")
    if not backends()[backend].available:
        raise RuntimeError(f"backend {backend!r} cannot run here: {backends()[backend].reason}")
    if reason := WORKERS[backend].refuses(device, dtype):
        raise ValueError(f"backend {backend!r}: {reason}")
    return WORKERS[backend]


@functools.cache
def _automatic(device: str, dtype: torch.dtype) -> str:
    for name in PREFERRED.get(device, PREFERRED_ELSEWHERE):
        reason = backends()[name].reason or WORKERS[name].refuses(torch.device(device), dtype)
        if not reason:
            logger.info("selective scan on %s, %s: %s", device, dtype, name)
            return name
        logger.info("selective scan on %s, %s: not %s (%s)", device, dtype, name, reason)
    raise AssertionError("chunked takes any tensor")
