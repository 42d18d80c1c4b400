"""Memory and time of a training step of every peer on a CUDA device, each in a fresh process.

    python benchmarks/gpu_memory.py OUT.csv [--minutes 9] [--peers unet,segmamba] [--device cpu --size 48]

The settings are those of the paper's table 8 (batch 1; BTCV and BraTS 128^3, Spleen 96^3) in fp32 and in bf16
autocast, then BTCV with checkpoints. A row is written as soon as it is measured; a network that does not fit is a row
that says how far it got. No new row is begun after `--minutes`; rows that OUT.csv has already stay, so the same command
goes on where it ended.
"""

from __future__ import annotations

import argparse
import platform
import time
from itertools import product
from pathlib import Path

import pandas as pd
import torch

from srlib import provenance, tables
from srlib.baselines import PEERS
from srlib.profiling import PUBLISHED, Workload, measure_apart

KEY = ("peer", "size", "in_channels", "out_channels", "precision", "checkpointing")


def workloads(peers: list[str], size: int | None) -> dict[Workload, str]:
    """What is measured, in order of importance -> name of the setting."""
    settings = [*PUBLISHED["settings"].items()]
    if size is not None:
        settings = [(f"cube_{size}", {"size": size, "in_channels": 1, "out_channels": 14})]
    found = {}
    for checkpointing, (name, setting), precision, peer in product(
        (False, True), settings, ("fp32", "bf16"), peers
    ):
        if not checkpointing or setting is settings[0][1]:
            work = Workload(peer, **setting, precision=precision, checkpointing=checkpointing)
            found[work] = name
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--peers", type=lambda names: names.split(","), default=[*PEERS])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--size", type=int, help="one cube of this size instead of the paper's settings"
    )
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor()
    start = time.monotonic()
    rows = tables.read(options.out).to_dict("records") if options.out.exists() else []
    measured = {tuple(row[name] for name in ("setting", *KEY)) for row in rows}
    for work, setting in workloads(options.peers, options.size).items():
        key = {"setting": setting} | {name: getattr(work, name) for name in KEY}
        if tuple(key.values()) in measured:
            continue
        if time.monotonic() - start > 60 * options.minutes:
            print("out of time before", setting, work)
            break
        result = measure_apart(work, options.device, options.steps)
        made_with = {"device": device, "torch": torch.__version__}
        rows.append({**key, **result, **made_with})
        provenance.write_table(pd.DataFrame(rows), options.out)
        print(f"{time.monotonic() - start:5.0f} s", setting, work, result, flush=True)


if __name__ == "__main__":
    main()
