"""Two GPUs of one host against one: the same losses at the same global batch, and what a step costs.

    python benchmarks/gpu_ddp.py OUT.csv [--processes 2]

Starts itself under torchrun with one process, then with several. Two kinds of rows:

- `losses`: `srlib.train` on hippocampus, fold 0, a short training with cuDNN's deterministic algorithms and without
  TF32. `loss_difference` is the largest one to one process's losses at the same step, absolute; for one process, to
  its own second training. In float32 rounding grows within some steps (tests/test_train_distributed.py says why).
- `time`: a step on random images, as the training does it, the loss read at its end; `ms_per_step` is the median,
  of the slowest process. `speedup` is against one process at the same global batch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from unittest.mock import patch

import pandas as pd
import torch
from monai.losses import DiceCELoss

from srlib import provenance, runs, train
from srlib.runs import RunConfig, config_for

CUBE = (96, 96, 96)
LOSSES = tuple(
    config_for("default", "hippocampus", steps=12, warmup=4, precision=precision)
    for precision in ("64-true", "32-true")
)
TIMES = (
    *(config_for("default", "hippocampus", batch_size=batch) for batch in (2, 8, 16)),
    *(
        config_for("full", "hippocampus", batch_size=2, patch_size=CUBE, precision=precision)
        for precision in ("32-true", "bf16-mixed")
    ),
)
WARM_UP, STEPS = 10, 30  # steps of a measurement: compiled and settled, then counted


def worker(folder: Path) -> None:
    """What each process of torchrun does; the first writes what was found to `folder`."""
    found: dict[str, list] = {"losses": [], "times": []}
    for config in LOSSES:
        found["losses"].append([losses(config, folder / name) for name in ("first", "second")])
    found["times"] = [milliseconds(config) for config in TIMES]
    if runs.is_first_process():
        (folder / "found.json").write_text(json.dumps(found))


def losses(config: RunConfig, results: Path) -> list[float]:
    """The losses of a short training, exact as far as sums in one order are."""
    exact = {"allow_tf32": False, "deterministic": True, "benchmark": False}
    with (
        torch.backends.cudnn.flags(enabled=True, **exact),
        patch.dict(os.environ, SRLIB_RESULTS=str(results)),
    ):
        return train.train(config).history["loss"].tolist()


def milliseconds(config: RunConfig) -> float:
    """Median time of a training step on a random batch, that of the slowest process."""
    fabric = train.launch(config)
    network = train.build_model(config)
    adamw = torch.optim.AdamW(network.parameters(), fused=True)
    model, optimizer = fabric.setup(network, adamw)
    share = config.batch_size // fabric.world_size
    image = torch.randn(share, 1, *config.patch_size, device=fabric.device)
    label = torch.randint(3, (share, 1, *config.patch_size), device=fabric.device)
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
    ends = []
    for _ in range(WARM_UP + STEPS + 1):
        loss = loss_function(model(image), label)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        float(fabric.all_reduce(loss.detach(), reduce_op="mean"))
        ends.append(time.perf_counter())
    step = median(end - start for start, end in pairwise(ends[WARM_UP:]))
    return 1000 * float(fabric.all_gather(torch.tensor(step, device=fabric.device)).max())


def torchrun(processes: int) -> dict[str, list]:
    """What `worker` finds with so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        subprocess.run([sys.executable, *launcher, __file__, "--worker", folder], check=True)
        return json.loads(Path(folder, "found.json").read_text())


def table(processes: int) -> pd.DataFrame:
    """Both kinds of rows, for one process and for several."""
    found = {number: torchrun(number) for number in (1, processes)}
    alone = found[1]
    rows = []
    for number, of in found.items():
        for config, (first, second), (before, _) in zip(
            LOSSES, of["losses"], alone["losses"], strict=True
        ):
            other = before if number > 1 else second
            difference = max(abs(a - b) for a, b in zip(first, other, strict=True))
            rows.append(
                row("losses", config, number, loss_difference=difference, steps=config.steps)
            )
    for number, of in found.items():
        for config, step, before in zip(TIMES, of["times"], alone["times"], strict=True):
            rows.append(
                row("time", config, number, ms_per_step=step, speedup=before / step, steps=STEPS)
            )
    return pd.DataFrame(rows)


def row(what: str, config: RunConfig, processes: int, **values: float) -> dict[str, object]:
    """A row of the table: what was done with how many processes."""
    settings = ("model", "patch_size", "precision", "batch_size")
    return {
        "what": what,
        **{name: getattr(config, name) for name in settings},
        "processes": processes,
        **values,
    }


def main() -> None:
    """Measure, write and show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    if options.out is None:
        parser.error("name the table: OUT.csv")
    found = table(options.processes)
    provenance.write_table(found, options.out)
    print(found.to_string(index=False, float_format="%.4g"))


if __name__ == "__main__":
    main()
