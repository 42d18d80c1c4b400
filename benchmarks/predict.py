"""Memory of segmenting a large CT, of training on and segmenting ever more cases, and of ONNX; each in a fresh process.

    python benchmarks/predict.py ct       # results/reference/cpu/predict_memory.csv; some ten minutes
    python benchmarks/predict.py cases    # results/reference/cpu/cases_memory.csv; some ten minutes
    python benchmarks/predict.py onnx     # results/reference/cpu/onnx.csv; some five minutes

With `--quick` they take small scans, few cases and one form, and nothing is stored.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Annotated, NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd
import torch
import typer
from scipy.ndimage import gaussian_filter

from srlib import data, machine
from srlib.export import onnx as exported
from srlib.files import REFERENCE
from srlib.run import predict, runs, train
from srlib.run.train import Trained, save_trained

app = typer.Typer(help=__doc__, rich_markup_mode=None)
Quick = Annotated[bool, typer.Option("--quick")]
SRLIB = [sys.executable, "-m", "srlib"]


def peak_and_time(command: list[str], **environment: str) -> tuple[float, float]:
    """Largest resident memory (GiB) of a command's process, libraries included, and seconds until its end."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | environment)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with status {status}")
    kib = used.ru_maxrss / (1024 if sys.platform == "darwin" else 1)  # bytes there
    return kib / 2**20, time.perf_counter() - start


# --- A large CT -----------------------------------------------------------------------------------

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
SMALL = [Setting((90, 80, 70), working, (40, 40, 40), 0.5) for working in (BTCV, CT)]


@app.command()
def ct(quick: Quick = False) -> None:
    """Segment a scan of 512 x 512 x 600 random voxels into 14 classes with the smallest network and random weights.

    The mask means nothing, and time and memory do not depend on what the weights are; a larger network needs more for
    its windows. Columns: `voxels`, `spacing_mm`: the scan's grid; `working_mm`: voxels that the network works on;
    `classes` (with the background), `network` (`ToM none`: without its Mamba layers), `patch`, `overlap`: of network
    and windows; `all_scores_gib`: what the scores of all classes would take on the finer of the two grids, which
    are never held; `peak_gib`, `seconds`: of the process, with Python, PyTorch and the network.
    """
    rows = []
    for setting in SMALL if quick else SETTINGS:
        rows.append(segment(setting))
        print(rows[-1], flush=True)
        if not quick:
            machine.write_table(pd.DataFrame(rows), REFERENCE / "cpu" / "predict_memory.csv")


def segment(setting: Setting) -> dict[str, object]:
    """The row of a setting."""
    names = tuple(f"organ {k}" for k in range(1, CLASSES))
    entry = replace(data.get("btcv"), classes=names, label_values=(), spacing=setting.working)
    config = runs.RunConfig("btcv", model=NETWORK, tom=setting.tom, patch_size=setting.patch)
    array = np.random.default_rng(0).integers(-1000, 1000, setting.voxels, dtype=np.int16)
    with tempfile.TemporaryDirectory() as folder:
        scan, network = Path(folder, "scan.nii"), Path(folder, "model.safetensors")
        nib.save(nib.Nifti1Image(array, np.diag([*CT, 1.0])), scan)
        weights = train.build_model(config, entry).state_dict()
        untrained = Trained(config, entry, weights, "no data", data.Split((), ()), {})
        save_trained(network, untrained)
        options = ["--out", f"{folder}/masks", "--overlap", str(setting.overlap)]
        peak, seconds = peak_and_time([*SRLIB, "predict", str(network), str(scan), *options])
    pairs = zip(setting.voxels, CT, setting.working, strict=True)
    finer = max(prod(setting.voxels), prod(n * mm / working for n, mm, working in pairs))
    return {
        "voxels": times(setting.voxels),
        "spacing_mm": times(CT),
        "working_mm": times(setting.working),
        "classes": CLASSES,
        "network": NETWORK if setting.tom == "both" else f"{NETWORK}, ToM {setting.tom}",
        "patch": times(setting.patch),
        "overlap": setting.overlap,
        "all_scores_gib": 4 * CLASSES * finer / 2**30,
        "peak_gib": peak,
        "seconds": seconds,
    }


def times(numbers: Iterable[float]) -> str:
    """Numbers as `a x b x c`."""
    return " x ".join(map(str, numbers))


# --- Many cases -----------------------------------------------------------------------------------

NUMBERS = (10, 100, 1000)
STEPS, EDGE = 20, 40


@app.command()
def cases(quick: Quick = False) -> None:
    """Train on 10, 100 and 1,000 cases and segment them: does memory grow with their number?

    The cases are links to four small virtual ones (40 voxels along each edge, two classes), each with a name of its
    own, so that each is looked at, checked, preprocessed and cached by itself. `train` goes from folder to network
    (plan, checks, preprocessing, the same number of steps), `predict` segments every case.
    """
    steps, rows = 3 if quick else STEPS, []
    for number in (10, 20) if quick else NUMBERS:
        with tempfile.TemporaryDirectory() as place:
            folder = make_folder(Path(place).resolve(), number)
            home = {"SRLIB_CACHE": f"{folder}/cache", "SRLIB_RESULTS": f"{folder}/results"}
            options = ["--model", "tiny", "--steps", str(steps), "--batch-size", "1"]
            found = peak_and_time([*SRLIB, "train", "--data", str(folder), *options], **home)
            (run,) = folder.glob("results/runs/*/model.safetensors")
            inputs = [str(run), f"{folder}/images", "--out", f"{folder}/masks"]
            for phase, (peak, seconds) in {
                "train": found,
                "predict": peak_and_time([*SRLIB, "predict", *inputs], **home),
            }.items():
                row = {"cases": number, "phase": phase, "peak_mib": 1024 * peak}
                rows.append(row | {"seconds": seconds, "steps": steps})
                print(rows[-1], flush=True)
    if not quick:
        machine.write_table(pd.DataFrame(rows), REFERENCE / "cpu" / "cases_memory.csv")


def make_folder(folder: Path, number: int) -> Path:
    """`images/` and `labels/` with links to four cases: smooth blobs, the bright and the dark ones labelled."""
    for kind in range(4):
        noise = np.random.default_rng(kind).standard_normal((EDGE, EDGE, EDGE))
        field = gaussian_filter(noise, 4)
        field /= field.std()
        label = (field > 1).astype(np.uint8) + 2 * (field < -1).astype(np.uint8)
        for name, array in (("images", (field + noise).astype(np.float32)), ("labels", label)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / f"{name}-{kind}.nii.gz")
    for case in range(number):
        for name in ("images", "labels"):
            link = folder / name / f"case{case:04d}.nii.gz"
            link.symlink_to(folder / f"{name}-{case % 4}.nii.gz")
    return folder


# --- onnxruntime against torch --------------------------------------------------------------------

DATASET, REPEATS = "hippocampus", 7
# Children that print the least of the processor's seconds that a window takes, and the most KiB that were resident; the
# second does without torch. Linux counts to a child's `ru_maxrss` what its parent had, so that is not asked for.
TORCH = """
import sys, time, numpy, torch
from pathlib import Path
from srlib.run.predict import load
x = torch.from_numpy(numpy.load(sys.argv[2]))
network = load(Path(sys.argv[1])).model.cpu()
def run():
    with torch.inference_mode():
        network(x)
"""
ONNX = """
import os, sys, time, numpy, onnxruntime
x = numpy.load(sys.argv[2])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
def run():
    session.run(None, {"image": x})
"""
TIMED = f"""
found = []
for _ in range({REPEATS}):
    start = time.process_time()
    run()
    found.append(time.process_time() - start)
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(min(found), peak)
"""


@app.command()
def onnx(quick: Quick = False) -> None:
    """Logits of one hippocampus case (a window) and of 96 x 96 x 96 voxels, by torch and in the forms of ONNX.

    Columns: `engine`; `states`: of all segments of a scan together (`srlib.export.onnx.ELEMENTS`), 1 for ONNX's Scan
    over the tokens; `window`; `cpu_seconds`: of the processor with one thread, the least of seven; `peak_gib`: of the
    process, of onnxruntime without torch; `largest_error`: of the logits against torch's.
    """
    network = predict.provided(DATASET)
    segmenter = predict.load(network)
    case = data.open(DATASET).load(train.load_trained(network).split.test[0])["image"][None]
    margins = [
        n
        for have, want in zip(case.shape[:1:-1], segmenter.patch_size[::-1], strict=True)
        for n in (0, want - have)
    ]
    windows = {"case": torch.nn.functional.pad(case, margins)}
    if not quick:
        windows["cube"] = torch.randn(1, 1, *CUBE, generator=torch.Generator().manual_seed(0))
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for states in (
            (None, exported.ELEMENTS) if quick else (None, 1, *(4**k for k in range(6, 11)))
        ):
            file = network if states is None else Path(place, "model.onnx")
            if states is not None:
                exported.program(segmenter.model, states).save(file, external_data=False)
            for name, window in windows.items():
                np.save(Path(place, name), window.numpy())
                with torch.inference_mode():
                    expected = segmenter.model(window)
                    found = expected if states is None else exported.Session(file)(window)
                code = (TORCH if states is None else ONNX) + TIMED
                command = [sys.executable, "-c", code, str(file), f"{place}/{name}.npy"]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
                seconds, kib = map(float, done.stdout.split())
                row = {"engine": "torch" if states is None else "onnxruntime", "states": states}
                row |= {
                    "window": times(window.shape[2:]),
                    "cpu_seconds": seconds,
                    "peak_gib": kib / 2**20,
                }
                rows.append(row | {"largest_error": float((found - expected).abs().max())})
                print(rows[-1], flush=True)
    if not quick:
        table = pd.DataFrame(rows).astype({"states": "Int64"})
        machine.write_table(table, REFERENCE / "cpu" / "onnx.csv")


if __name__ == "__main__":
    app()
