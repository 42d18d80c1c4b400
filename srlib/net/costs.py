"""Costs of one training step: parameters, arithmetic, memory and time, counted or measured.

A *MAC* is one multiplication with its addition: two FLOP. torch's flop counter counts those of convolutions,
matrix products and attention, and by its own formula the selective scan; norms, activations and interpolation are
not counted. Memory is in GiB (2^30 bytes) and has these parts:

| part | holds |
|---|---|
| weights | parameters and buffers |
| gradients | of the parameters |
| optimizer | Adam's two moments |
| activations | what forward pass and loss keep for the backward pass, or compute again for it; autocast's weights |
| temporary | the backward pass's own tensors, gradients of activations among them |
| input | image and label |

It is *counted* (`count`) with fake tensors: every tensor, without the scratch inside an operator. It is *measured*
(`measure`) on the CPU by torch's allocator, scratch included, and as the process's resident memory; on CUDA by
torch's caching allocator, as what is allocated, scratch included, and what is reserved.
Where much is kept the peak comes early in the backward pass, before the gradients of parameters; where most is
computed again it comes where a single layer needs most, and these gradients may be there already.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, chain
from multiprocessing import get_context
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import pandas as pd
import psutil
import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed._tools.mod_tracker import ModTracker
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from srlib.net.model import FEATURES
from srlib.net.peers import Padded, build, with_checkpoints

GIB = 2**30
TRACKED = {  # what torch's memory tracker calls them -> part
    "Parameter": "weights",
    "Buffer": "weights",
    "Gradient": "gradients",
    "Optstate": "optimizer",
    "Activation": "activations",
    "Temp": "temporary",
    "Other": "input",
}
PARTS = tuple(dict.fromkeys(TRACKED.values()))
SILENCE = 3600.0  # seconds that a process apart may take from one report to the next: of one step, at most
loss_function = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)


@dataclass(frozen=True)
class Workload:
    """A training step with one image: forward, loss (Dice and cross-entropy), backward, Adam.

    Attributes:
        peer: name in `srlib.net.peers.PEERS`.
        size: voxels along each edge of the image.
        in_channels, out_channels: modalities and classes; the defaults are BTCV's.
        precision: `fp32`, or `bf16` under autocast.
        checkpointing: keep only the inputs of the network's blocks and compute the rest again.
        settings: (name, value) of arguments that replace single ones of the peer's network.
    """

    peer: str
    size: int = 128
    in_channels: int = 1
    out_channels: int = 14
    precision: str = "fp32"
    checkpointing: bool = False
    settings: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be fp32 or bf16, got {self.precision!r}")

    def network(self) -> nn.Module:
        """Make the network with random weights."""
        channels = self.in_channels, self.out_channels
        network = build(self.peer, *channels, self.size, **dict(self.settings))
        return with_checkpoints(network) if self.checkpointing else network

    def batch(self, device: str) -> tuple[Tensor, Tensor]:
        """Draw a random image (1, C_in, D, H, W) and label (1, 1, D, H, W)."""
        cube = (self.size,) * 3
        image = torch.randn(1, self.in_channels, *cube, device=device)
        return image, torch.randint(self.out_channels, (1, 1, *cube), device=device)

    def autocast(self, device: str) -> AbstractContextManager:
        """Make the context of forward pass and loss."""
        return torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16")


# Levers on SegResMamba's memory by title, each beside those before it: arguments of `Workload`.
LEVERS: dict[str, dict[str, Any]] = {
    "straightforward": {"settings": (("recompute", False), ("fused", False))},
    "mixers fused (CPU, fp32)": {"settings": (("recompute", False),)},
    "cheap steps computed again": {},
    "each block checkpointed": {"checkpointing": True},
}


class _RealRanges(TorchFunctionMode):
    """Ranges of numbers stay real where all else is fake: MONAI reads the values of some."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func not in (torch.arange, torch.linspace):
            return func(*args, **(kwargs or {}))
        with unset_fake_temporarily():
            return func(*args, **{**(kwargs or {}), "device": "cpu"})


@contextmanager
def fake(work: Workload) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    """A context with a workload's network, image and label of tensors without data that claim to be on the CPU."""
    with torch.device("meta"), _RealRanges():
        network = work.network()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in network.modules():  # each once, also where a network holds it under two names
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty_like(weight, device="cpu")))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer, device="cpu"))
        yield network, *work.batch("cpu")


class _Tracker(MemTracker):
    """torch's memory tracker without a peak for each module, which would take three quarters of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.timeline: list[float] = []

    def _update_peak_stats(self, _state: Any) -> None:
        for device, now in self._curr_mem_snap.items():
            self.timeline.append(now["Total"] / GIB)
            if now["Total"] > self._peak_mem.get(device, 0):
                self._peak_mem[device], self._peak_mem_snap[device] = now["Total"], dict(now)

    def parts(self, moment: str = "current") -> dict[str, float]:
        """GiB of each part now, or at the `peak`."""
        found = dict.fromkeys(PARTS, 0.0)
        for snapshot in self.get_tracker_snapshot(moment).values():
            for name, part in TRACKED.items():
                found[part] += snapshot[name] / GIB
        return found


class Count(NamedTuple):
    """Findings of `count`.

    Attributes:
        totals: `parameters`, `trained` (those that receive a gradient), `gmacs` of a forward pass, `step_gmacs` of
            forward and backward, `kept` (activations after the network, its logits included), `kept_by_loss`
            (what the loss adds to them), the parts at the peak, and their sum `peak`; memory in GiB.
        operators: GMACs of the forward pass by operator.
        stages: `stage`, `parameters`, `gmacs`, `kept` of the forward pass, a row for each of the network's parts.
        timeline: GiB in use after each operator of the step.
    """

    totals: dict[str, float]
    operators: dict[str, float]
    stages: pd.DataFrame
    timeline: list[float]


def count(work: Workload) -> Count:
    """Count a training step without running it, in seconds, whatever the size.

    Adam's moments are there from the start, as in all steps but the first. Operators keep what they keep on the CPU.
    """
    with fake(work) as (network, image, label):
        adam = torch.optim.Adam(network.parameters(), fused=True)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        adam.step()
        adam.zero_grad()
        tracker, flops = _Tracker(), FlopCounterMode(display=False)
        # The counter's own tracker of modules hangs hooks onto what is computed again, which thereby outlives its use.
        flops.mod_tracker = ModTracker()  # type: ignore[assignment]
        tracker.track_external(network, adam, image, label)
        stages = _Stages(network, tracker)
        with tracker, flops:
            with work.autocast("cpu"):
                output = network(image)
                gmacs = {k: dict(v) for k, v in flops.get_flop_counts().items()}
                kept = tracker.parts()["activations"]
                with _RealRanges():
                    loss = loss_function(output, label)
            del output
            kept_by_loss = tracker.parts()["activations"] - kept
            loss.backward()
            adam.step()
    peak = tracker.parts("peak")
    operators = {str(k).split(".")[-1]: v / 2e9 for k, v in gmacs["Global"].items()}
    totals = {
        "parameters": sum(p.numel() for p in network.parameters()),
        "trained": sum(p.numel() for p in network.parameters() if p.grad is not None),
        "gmacs": sum(operators.values()),
        "step_gmacs": flops.get_total_flops() / 2e9,
        "kept": kept,
        "kept_by_loss": kept_by_loss,
    }
    totals |= {**peak, "peak": sum(peak.values())}
    return Count(totals, operators, stages.table(gmacs), tracker.timeline)


class _Stages:
    """Parameters, arithmetic and kept activations of the modules that a network's `forward` calls, by hooks."""

    def __init__(self, network: nn.Module, tracker: _Tracker) -> None:
        inner = network.network if isinstance(network, Padded) else network
        lists = (c if isinstance(c, nn.ModuleList) else [c] for c in inner.children())
        called = set(chain.from_iterable(lists))
        self.modules = {name: m for name, m in network.named_modules() if m in called}
        self.root, self.tracker = type(network).__name__, tracker
        self.kept = dict.fromkeys(self.modules, 0.0)
        for name, module in self.modules.items():
            module.register_forward_pre_hook(lambda *_, name=name: self._note(name, -1))
            module.register_forward_hook(lambda *_, name=name: self._note(name, 1))

    def _note(self, name: str, sign: int) -> None:
        if torch._C._current_graph_task_id() == -1:  # not in a backward pass that computes again
            self.kept[name] += sign * self.tracker.parts()["activations"]

    def table(self, flops: dict[str, dict]) -> pd.DataFrame:
        """A row for each module."""
        rows = []
        for name, module in self.modules.items():
            parameters = sum(p.numel() for p in module.parameters())
            gmacs = sum(flops.get(f"{self.root}.{name}", {}).values()) / 2e9
            rows.append((name.removeprefix("network."), parameters, gmacs, self.kept[name]))
        return pd.DataFrame(rows, columns=["stage", "parameters", "gmacs", "kept"])


def measure(
    work: Workload, device: str = "cpu", steps: int = 3, report: Callable = lambda phase: None
) -> dict[str, float]:
    """Run training steps and inferences on a device, in this process, and measure them.

    Args:
        work: what to run.
        device: `cpu` or `cuda`.
        steps: of either kind that are timed, after one that warms up; the median counts.
        report: is told the phase, when it begins and after each of its steps.

    Returns:
        `step_s`, `inference_s`; in GiB `weights`, `optimizer`, `input`, `activations` after the loss, `rest` (what
        else there is at the peak: gradients, temporary), the peak `allocated`, and what the process took from the
        system meanwhile: `resident` on the CPU, `reserved` on CUDA.
    """
    report("building")
    with process_memory(device) as process:
        network = work.network().to(device)
        adam = torch.optim.Adam(network.parameters(), fused=True)
        image, label = work.batch(device)

        def forward() -> Tensor:
            with work.autocast(device):
                return loss_function(network(image), label)

        def step() -> None:
            adam.zero_grad()
            forward().backward()
            adam.step()

        report("first step")
        step()
        adam.zero_grad()
        report("measured step")
        with _allocations(device) as ahead:
            loss = forward()
        with _allocations(device) as back:
            loss.backward()
            adam.step()
        report("timed steps")
        seconds = _median_seconds(step, device, steps, partial(report, "timed steps"))
        network.eval()
        report("timed inference")
        with torch.inference_mode(), work.autocast(device):
            timed = partial(report, "timed inference")
            inference = _median_seconds(lambda: network(image), device, steps, timed)
    parts = {
        "weights": _gib([*network.parameters(), *network.buffers()]),
        "optimizer": _gib(t for state in adam.state.values() for t in state.values()),
        "input": _gib([image, label]),
        "activations": ahead["end"],
    }
    rest = max(ahead["peak"] - ahead["end"], back["peak"])
    times = {"step_s": seconds, "inference_s": inference}
    return times | parts | {"rest": rest, "allocated": sum(parts.values()) + rest} | process


def _gib(tensors: Iterable[Tensor]) -> float:
    return sum(t.untyped_storage().nbytes() for t in tensors) / GIB


def _median_seconds(
    run: Callable[[], Any], device: str, repeats: int, report: Callable[[], None]
) -> float:
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        report()
    return median(seconds[1:])


@contextmanager
def _allocations(device: str) -> Iterator[dict[str, float]]:
    """Fills in GiB allocated more than before: the `peak` meanwhile and what is left at the `end`."""
    found: dict[str, float] = {}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found["end"] = (torch.cuda.memory_allocated() - before) / GIB
        found["peak"] = (torch.cuda.max_memory_allocated() - before) / GIB
        return
    with profile(profile_memory=True) as profiler:
        yield found
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    totals = [0, *accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))]
    found["end"], found["peak"] = totals[-1] / GIB, max(totals) / GIB


@contextmanager
def process_memory(device: str) -> Iterator[dict[str, float]]:
    """Fills in GiB that the process takes meanwhile: `reserved` on CUDA, else `resident`, sampled each 2 ms.

    Raises:
        MemoryError: at the end, when there was not enough for the samples.
    """
    found: dict[str, float] = {}
    if device == "cuda":
        yield found
        found["reserved"] = torch.cuda.max_memory_reserved() / GIB
        return
    process, done = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def sample() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
        if not thread.is_alive():
            raise MemoryError("the process's memory could not be sampled to the end")
    finally:
        done.set()
    found["resident"] = (highest - before) / GIB


def measure_apart(
    work: Workload, device: str = "cpu", steps: int = 3, limit: float | None = None
) -> dict[str, Any]:
    """`measure` in a fresh process, so that no network finds what another left, and a failure ends only that.

    Args:
        work, device, steps: as in `measure`.
        limit: GiB that the process may take for data beyond what Python, torch and their threads hold at its start,
            where the system enforces it (Linux), so that a network which does not fit fails instead of driving the
            machine into its swap.

    Returns:
        What `measure` does or, when it failed, `failed`: how far it got, why, and under which limit; a library
        short of memory does not always say so (oneDNN: "could not create a primitive"). A process that says nothing
        for `SILENCE` seconds is ended, and has failed.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once for all
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, device, steps, limit, sender))
    with patch.dict(os.environ, KINETO_LOG_LEVEL="99", TORCH_CPP_LOG_LEVEL="ERROR"):
        process.start()  # with torch's profiler quiet
    sender.close()
    phase, result = "starting", None
    try:
        with suppress(EOFError):  # raised when the child has ended
            while receiver.poll(SILENCE):
                message = receiver.recv()
                phase, result = (message, None) if isinstance(message, str) else (phase, message)
            result = {"failed": f"nothing was heard of it for {SILENCE:g} s"}
            process.kill()
        process.join(60)
        if result is None:
            result = {"failed": f"killed with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join(60)
    return {"failed": f"{phase}: {result['failed']}"} if "failed" in result else result


def _child(
    work: Workload, device: str, steps: int, limit: float | None, sender: Connection
) -> None:
    """Run in the fresh process of `measure_apart`."""
    if limit is not None:
        import resource

        held = getattr(psutil.Process().memory_info(), "data", 0)  # Linux's, which has a limit
        resource.setrlimit(resource.RLIMIT_DATA, (held + int(limit * GIB),) * 2)
    try:
        sender.send(measure(work, device, steps, sender.send))
    except Exception as error:  # short of memory torch raises a RuntimeError
        reason = f"{type(error).__name__}: " + str(error).partition("\n")[0]
        allowed = "" if limit is None else f" (at most {limit:g} GiB of data)"
        sender.send({"failed": reason + allowed})


@lru_cache
def step_memory(network: str, in_channels: int, out_channels: int) -> tuple[float, float]:
    """Count the GiB of a training step of SegResMamba: whatever the patch, and for each voxel of it.

    The first part is weights, twice since their average is kept, gradients and the optimizer's state.

    Args:
        network: its size, a name in `srlib.net.model.FEATURES`.
        in_channels: of the images.
        out_channels: of the network.

    Raises:
        ValueError: an unknown size; it lists the names.
    """
    if network not in FEATURES:
        raise ValueError(f"network {network!r} is not one of {', '.join(FEATURES)}")
    edge, size = 48, (("features", FEATURES[network]),)
    totals = count(Workload("segresmamba", edge, in_channels, out_channels, settings=size)).totals
    counted = totals["weights"] + totals["gradients"] + totals["optimizer"]
    return counted + totals["weights"], (totals["peak"] - counted) / edge**3
