"""A training step of every network on one GPU, in one run: time, kernels, memory and energy, as one table.

    python benchmarks/step.py OUT.csv [--minutes 9] [--size 128] [--peers unet,segmamba]

The networks of `srlib.baselines` and SegResMamba with fewer ToM layers, with one random image of one channel, 14
classes; forward pass, Dice and cross-entropy, backward pass, AdamW. A row for each precision and each way to keep
activations: `recomputation` off keeps what autograd asks for; on is `recompute` of SegResMamba and SegMamba,
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
from pathlib import Path
from statistics import median

import pandas as pd
import pynvml
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from srlib import provenance
from srlib.baselines import PEERS
from srlib.captured import WARM_UP, CapturedStep
from srlib.workload import Workload, loss_function

VARIANTS = ("none", "inner", "outer")  # beside SegResMamba with both ToM layers
OURS = ("segresmamba", "segmamba")  # names of what has `recompute` begin so
EAGER, CAPTURED = 20, 50


def cases(peers: list[str], size: int) -> Iterator[tuple[str, Workload]]:
    """Each row's name of the network and its workload."""
    variants = [(f"segresmamba_{tom}", {"tom": tom}) for tom in VARIANTS if "segresmamba" in peers]
    for precision, again in (("bf16", False), ("bf16", True), ("fp32", False)):
        for name, settings in [*((peer, {}) for peer in peers), *variants]:
            ours = name.startswith(OURS)
            yield (
                name,
                Workload(
                    "segresmamba" if settings else name,
                    size,
                    precision=precision,
                    checkpointing=again and not ours,
                    settings=tuple((settings | ({"recompute": again} if ours else {})).items()),
                ),
            )


def milliseconds(function: Callable[[], object], count: int) -> float:
    """The median of `count` calls, each waited for."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return median(times)


def measure(work: Workload) -> dict[str, float]:
    """One row's numbers."""
    torch.manual_seed(0)
    network = work.network().cuda().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True, capturable=True)

    def step(image: Tensor, label: Tensor) -> Tensor:
        optimizer.zero_grad()
        with work.autocast("cuda"):
            loss = loss_function(network(image), label)
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
    for name, work in cases(options.peers, options.size):
        if time.monotonic() - start > 60 * options.minutes:
            print("out of time before", name, work)
            break
        again = work.checkpointing or ("recompute", True) in work.settings
        row = {"network": name, "size": work.size, "precision": work.precision}
        row["recomputation"] = "on" if again else "off"
        try:
            row |= measure(work)
        except (ImportError, torch.OutOfMemoryError) as error:
            row["error"] = f"{type(error).__name__}: {error}"
        gc.collect()
        torch.cuda.empty_cache()
        rows.append(row)
        provenance.write_table(pd.DataFrame(rows), options.out)
        print(f"{time.monotonic() - start:4.0f} s", row, flush=True)


if __name__ == "__main__":
    main()
