"""Memory of segmenting a large CT: 512 x 512 x 600 voxels, 14 classes, in a fresh process.

    python -m srlib bench predict_memory            # some ten minutes; results/reference/cpu/predict_memory.csv
    python -m srlib bench predict_memory --quick    # a small scan; nothing is stored

The scan is made here, of random voxels, and the network is the smallest, `tiny`, with random weights: the mask
means nothing, and time and memory do not depend on what the weights are. A larger network needs more for its
windows. Columns:

- `voxels`, `spacing_mm`: the scan's grid; `working_mm`: voxels that the network works on;
- `classes` (with the background), `network` (`ToM none`: without its Mamba layers), `patch`, `overlap`: of the
  network and its windows;
- `all_scores_gib`: what the scores of all classes would take on the finer of the two grids, which are never held;
- `peak_gib`: largest resident memory of the process, with Python, PyTorch and the network;
- `seconds`: from its start to its end.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd

from srlib import data, provenance, runs, tables, train
from srlib.checkpoints import Trained, save_trained
from srlib.paths import REFERENCE

CLASSES, NETWORK = 14, "tiny"
CT, BTCV = (0.7, 0.7, 1.0), (1.5, 1.5, 2.0)  # voxel sizes, mm


class Setting(NamedTuple):
    """A scan, and the network that segments it."""

    voxels: tuple[int, int, int]
    working: tuple[float, float, float]
    patch: tuple[int, int, int]
    overlap: float
    tom: str = "both"


LARGE, CUBE = (512, 512, 600), (96, 96, 96)
SETTINGS = [
    Setting(LARGE, BTCV, CUBE, 0.5),
    # The hardest, as many voxels as the scan has; without the scans and overlap, which take time, not memory.
    Setting(LARGE, CT, CUBE, 0.0, tom="none"),
]
QUICK = [Setting((90, 80, 70), working, (40, 40, 40), 0.5) for working in (BTCV, CT)]


def write_network(path: Path, setting: Setting) -> None:
    """A network with random weights for CT."""
    names = tuple(f"organ {k}" for k in range(1, CLASSES))
    entry = replace(data.get("btcv"), classes=names, label_values=(), spacing=setting.working)
    config = runs.RunConfig("btcv", model=NETWORK, tom=setting.tom, patch_size=setting.patch)
    weights = train.build_model(config, entry).state_dict()
    save_trained(path, Trained(config, entry, weights, "random", data.Split((), ()), {}))


def write_scan(path: Path, setting: Setting) -> None:
    """Random grey values."""
    array = np.random.default_rng(0).integers(-1000, 1000, setting.voxels, dtype=np.int16)
    nib.save(nib.Nifti1Image(array, np.diag([*CT, 1.0])), path)


def measure(setting: Setting) -> dict[str, object]:
    """The row of a setting."""
    with tempfile.TemporaryDirectory() as folder:
        scan, network = Path(folder, "scan.nii"), Path(folder, "model.safetensors")
        write_scan(scan, setting)
        write_network(network, setting)
        program = [sys.executable, "-m", "srlib", "predict", str(network), str(scan)]
        program += ["--out", f"{folder}/masks", "--overlap", str(setting.overlap)]
        start = time.perf_counter()
        process = subprocess.Popen(program, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"{' '.join(program)} ended with status {status}")
        seconds = time.perf_counter() - start
    pairs = zip(setting.voxels, CT, setting.working, strict=True)
    finer = max(prod(setting.voxels), prod(n * mm / working for n, mm, working in pairs))
    kib = used.ru_maxrss / (1024 if sys.platform == "darwin" else 1)  # bytes there
    return {
        "voxels": _times(setting.voxels),
        "spacing_mm": _times(CT),
        "working_mm": _times(setting.working),
        "classes": CLASSES,
        "network": NETWORK if setting.tom == "both" else f"{NETWORK}, ToM {setting.tom}",
        "patch": _times(setting.patch),
        "overlap": setting.overlap,
        "all_scores_gib": 4 * CLASSES * finer / 2**30,
        "peak_gib": kib / 2**20,
        "seconds": seconds,
    }


def _times(numbers: Iterable[float]) -> str:
    return " x ".join(map(str, numbers))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small scan; nothing is stored")
    parser.add_argument("--out", type=Path, default=REFERENCE / "cpu" / "predict_memory.csv")
    options = parser.parse_args()
    about, rows = provenance.describe(), []
    made_with = {"device": about["device"], "torch": about["versions"]["torch"]}
    made_with["commit"] = about["commit"]
    for setting in QUICK if options.quick else SETTINGS:
        rows.append(measure(setting) | made_with)
        print(rows[-1], flush=True)
        if not options.quick:
            tables.write(pd.DataFrame(rows), options.out, digits=4)


if __name__ == "__main__":
    main()
