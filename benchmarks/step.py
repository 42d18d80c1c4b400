"""A training step of every network on one GPU, in one run: time, kernels, memory and energy, as one table.

    python benchmarks/step.py OUT.csv [--minutes 9] [--size 128] [--peers unet,segmamba]

The networks of `srlib.baselines` and SegResMamba with fewer ToM layers, with one random image of one channel, 14
classes; forward pass, Dice and cross-entropy, backward pass, AdamW. A row for each precision and each way to keep
activations: `recomputation` off keeps what autograd asks for; on is `recomputed` for SegResMamba and SegMamba,
checkpoints around blocks for the others (`srlib.baselines.with_checkpoints`).

- `eager_ms`, `captured_ms`: medians of 20 and 50 steps, launched from Python and replayed as a CUDA graph;
- `busy_ms`, `kernels`: the sum over a step's kernels, copies and fills, and their number, by torch's profiler;
- `peak_gib`: most memory allocated in eager steps; `joules`: a captured step's, by the board's counter.

A row is written as soon as it is measured; no new one is begun after `--minutes`.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from unittest.mock import patch

import pandas as pd
import pynvml
import torch
from srlib.levers import kept
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from srlib import provenance
from srlib.baselines import PEERS
from srlib.captured import WARM_UP, CapturedStep
from srlib.model import SegResMamba
from srlib.workload import Workload

VARIANTS = ("none", "inner", "outer")  # beside SegResMamba with both ToM layers
OURS = ("segresmamba", "segresmamba_released", "segmamba")
EAGER, CAPTURED = 20, 50


def cases(peers: list[str], size: int) -> Iterator[tuple[str, str, bool]]:
    """Network, precision, recomputation."""
    names = [*peers, *(f"segresmamba_{tom}" for tom in VARIANTS if "segresmamba" in peers)]
    for precision, recomputation in (("bf16", False), ("bf16", True), ("fp32", False)):
        for name in sorted(names, key=lambda name: not name.startswith("segresmamba")):
            yield name, precision, recomputation


@contextmanager
def network_of(name: str, precision: str, recomputation: bool, size: int) -> Iterator[tuple]:
    """The workload and its network, for as long as it keeps activations that way."""
    variant = name.removeprefix("segresmamba_")
    ours = variant in VARIANTS or name in OURS
    peer = "segresmamba" if variant in VARIANTS else name
    work = Workload(peer, size, precision=precision, checkpointing=recomputation and not ours)
    with ExitStack() as stack:
        if not recomputation:
            for module in ("model", "tom", "segmamba", "scan.mixer"):
                stack.enter_context(patch(f"srlib.{module}.recomputed", kept, create=True))
        if variant in VARIANTS:
            yield work, SegResMamba(work.in_channels, work.out_channels, tom=variant)
        else:
            yield work, work.network()


def milliseconds(function: Callable[[], object], count: int) -> float:
    """The median of `count` calls, each waited for."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return median(times)


def measure(work: Workload, network: nn.Module) -> dict[str, float]:
    """One row's numbers."""
    network.cuda().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True, capturable=True)

    def step(image: Tensor, label: Tensor) -> Tensor:
        optimizer.zero_grad()
        with work.autocast("cuda"):
            loss = work.loss(network, network(image), label)
        loss.backward()
        optimizer.step()
        return loss.detach()

    batch = work.batch("cuda")
    for _ in range(WARM_UP):
        step(*batch)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    found = {"eager_ms": milliseconds(lambda: step(*batch), EAGER)}
    found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step(*batch)
        torch.cuda.synchronize()
    on_gpu = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    found |= {"busy_ms": sum(e.device_time for e in on_gpu) / 1000, "kernels": len(on_gpu)}
    captured = CapturedStep(step)
    for _ in range(WARM_UP + 2):
        captured(*batch)
    if captured.graph is None:
        print("not captured:", captured.reason)
        return found
    found["captured_ms"] = milliseconds(lambda: captured(*batch), CAPTURED)
    board = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
    start = pynvml.nvmlDeviceGetTotalEnergyConsumption(board)
    for _ in range(CAPTURED):
        captured(*batch)
    torch.cuda.synchronize()
    used = pynvml.nvmlDeviceGetTotalEnergyConsumption(board) - start
    return found | {"joules": used / 1000 / CAPTURED}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--peers", type=lambda names: names.split(","), default=[*PEERS])
    options = parser.parse_args()
    pynvml.nvmlInit()
    start, rows = time.monotonic(), []
    for name, precision, recomputation in cases(options.peers, options.size):
        if time.monotonic() - start > 60 * options.minutes:
            print("out of time before", name, precision, recomputation)
            break
        row = {"network": name, "size": options.size, "precision": precision}
        row["recomputation"] = "on" if recomputation else "off"
        try:
            with network_of(name, precision, recomputation, options.size) as (work, network):
                row |= measure(work, network)
        except (ImportError, torch.OutOfMemoryError) as error:
            row["error"] = f"{type(error).__name__}: {error}"
        network = None
        gc.collect()
        torch.cuda.empty_cache()
        rows.append(row)
        provenance.write_table(pd.DataFrame(rows), options.out)
        print(f"{time.monotonic() - start:4.0f} s", row, flush=True)


if __name__ == "__main__":
    main()
