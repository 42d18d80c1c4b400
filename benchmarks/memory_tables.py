"""The reference tables of 05_memory: every system counted at every size, and the levers on SegResMamba measured.

    python benchmarks/memory_tables.py count    # results/reference/memory/counted.csv and levers.csv; no device is used
    python benchmarks/memory_tables.py time     # results/reference/memory/levers_cpu.csv; nothing else may run
    python benchmarks/memory_tables.py time --device cuda --size 128

A row is written as soon as it is there. `time` measures each arrangement in a fresh process.
"""

from __future__ import annotations

import argparse
from itertools import product

import pandas as pd
import torch

from srlib import levers, paths, provenance
from srlib.baselines import PEERS
from srlib.profiling import Workload, count, measure_apart

FOLDER = paths.REFERENCE / "memory"
SIZES = (64, 96, 128, 160)


def write(rows: list[dict], name: str, device: str) -> None:
    """Write the rows so far, with what they were made with."""
    commit, changed = provenance.commit()
    made_with = {"device": device, "torch": torch.__version__}
    made_with["commit"] = commit[:8] + "+changes" * changed
    with paths.atomic_path(FOLDER / f"{name}.csv") as file:
        pd.DataFrame(rows).assign(**made_with).to_csv(file, index=False, float_format="%.6g")


def count_all() -> None:
    """Every system, size and precision; with checkpoints at the paper's size; then the levers."""
    levers_table = levers.table()
    write(levers_table.to_dict("records"), "levers", "counted")
    rows: list[dict] = []
    for checkpointing, size, precision, peer in product(
        (False, True), SIZES, ("fp32", "bf16"), PEERS
    ):
        if checkpointing and size != 128:
            continue
        work = Workload(peer, size, precision=precision, checkpointing=checkpointing)
        key = {"peer": peer, "size": size, "precision": precision, "checkpointing": checkpointing}
        rows.append(key | count(work).totals)
        write(rows, "counted", "counted")
        print(*key.values(), flush=True)


def time_levers(device: str, size: int, steps: int) -> None:
    """The steps of `levers.steps`: fp32 on the CPU, where bf16 is emulated by most processors, both on CUDA."""
    named = torch.cuda.get_device_name() if device == "cuda" else provenance.cpu_name()
    precisions = ("fp32", "bf16") if device == "cuda" else ("fp32",)
    rows = []
    for work, lever in levers.steps(precisions, size).items():
        found = measure_apart(work, device, steps)
        key = {"precision": work.precision, "lever": lever, "size": size}
        rows.append(key | {"threads": torch.get_num_threads()} | found)
        write(rows, f"levers_{device}", named)
        print(*key.values(), found, flush=True)


def main() -> None:
    """Count or measure, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("count", "time"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if options.what == "count":
        count_all()
    else:
        time_levers(options.device, options.size, options.steps)


if __name__ == "__main__":
    main()
