"""The reference tables of 05_memory, in results/reference/memory/, each with a record of what it was made with.

    python benchmarks/memory_tables.py count     # counted.csv, levers.csv: all systems and sizes; no device is used
    python benchmarks/memory_tables.py measure   # measured_cpu.csv: all systems run on the CPU; memory, no times
    python benchmarks/memory_tables.py time      # levers_cpu.csv: the levers' step times; nothing else may run
    python benchmarks/memory_tables.py time --device cuda --sizes 128

A row is written as soon as it is there. `measure` and `time` run each network in a fresh process.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product

import pandas as pd
import psutil
import torch

from srlib import paths, provenance
from srlib.baselines import PEERS
from srlib.profiling import GIB, Workload, count, measure_apart
from srlib.workload import LEVERS

FOLDER = paths.REFERENCE / "memory"
SIZES = (64, 96, 128, 160)  # counted


def write(rows: list[dict], name: str) -> None:
    """Write the rows so far."""
    provenance.write_table(pd.DataFrame(rows), FOLDER / f"{name}.csv")


def count_all() -> None:
    """Every system, size and precision; with checkpoints at the paper's size; then the levers."""
    count_levers()
    rows: list[dict] = []
    for checkpointing, size, precision, peer in product(
        (False, True), SIZES, ("fp32", "bf16"), PEERS
    ):
        if checkpointing and size != 128:
            continue
        work = Workload(peer, size, precision=precision, checkpointing=checkpointing)
        key = {"peer": peer, "size": size, "precision": precision, "checkpointing": checkpointing}
        rows.append(key | count(work).totals)
        write(rows, "counted")
        print(*key.values(), flush=True)


def count_levers() -> None:
    """GiB of activations after the loss and of the peak; `share` and `arithmetic` are of the first row's."""
    rows: list[dict] = []
    for precision, (lever, options) in product(("fp32", "bf16"), LEVERS.items()):
        totals = count(Workload("segresmamba", precision=precision, **options)).totals
        kept, gmacs = totals["kept"] + totals["kept_by_loss"], totals["step_gmacs"]
        if not rows:
            all_kept, plain = kept, gmacs
        row = {"precision": precision, "lever": lever, "activations": kept, "peak": totals["peak"]}
        rows.append(row | {"share": kept / all_kept, "arithmetic": gmacs / plain})
        write(rows, "levers")


def measure_all(device: str, sizes: Sequence[int]) -> None:
    """Memory of every system in fp32; one that does not fit into what is free says how far it got."""
    free = psutil.virtual_memory().available / GIB
    rows = []
    for size, peer in product(sizes, PEERS):
        limit = free if device == "cpu" else None
        found = measure_apart(Workload(peer, size), device, steps=1, limit=limit)
        memory = {name: value for name, value in found.items() if not name.endswith("_s")}
        key = {"device": named(device), "peer": peer, "size": size, "limit": limit}
        rows.append(key | memory)
        write(rows, f"measured_{device}")
        print(*key.values(), found, flush=True)


def time_levers(device: str, sizes: Sequence[int], steps: int) -> None:
    """Steps with the levers: fp32 on the CPU, where bf16 is emulated by most processors, both on CUDA."""
    precisions = ("fp32", "bf16") if device == "cuda" else ("fp32",)
    rows = []
    for size, precision, (lever, options) in product(sizes, precisions, LEVERS.items()):
        work = Workload("segresmamba", size, precision=precision, **options)
        key = {"device": named(device), "precision": precision, "lever": lever, "size": size}
        rows.append(key | measure_apart(work, device, steps))
        write(rows, f"levers_{device}")
        print(*rows[-1].values(), flush=True)


def named(device: str) -> str:
    """The device as a row names it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{provenance.cpu_name()}, {torch.get_num_threads()} threads"


def main() -> None:
    """Count or measure, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("count", "measure", "time"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[64], help="voxels along an edge")
    parser.add_argument("--steps", type=int, default=3, help="that are timed; the median counts")
    options = parser.parse_args()
    if options.what == "count":
        count_all()
    elif options.what == "measure":
        measure_all(options.device, options.sizes)
    else:
        time_levers(options.device, options.sizes, options.steps)


if __name__ == "__main__":
    main()
