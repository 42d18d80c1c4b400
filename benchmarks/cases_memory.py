"""Does memory grow with the number of cases? Peak memory of training on 10, 100 and 1,000, and of segmenting them.

    python benchmarks/cases_memory.py           # results/reference/cpu/cases_memory.csv; some ten minutes
    python benchmarks/cases_memory.py --quick   # 10 and 20 cases; nothing is stored

The cases are links to four small virtual ones (40 voxels along each edge, two classes), each with a name of its
own, so that each is looked at, checked, preprocessed and cached by itself. Every figure is a process of its own:
`train` goes from the folder to a trained network (plan, checks, preprocessing, the same number of steps), `predict`
segments every case. Peak memory is what the system says the process held at most, libraries included.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter

from srlib import paths, provenance

TABLE = paths.REFERENCE / "cpu" / "cases_memory.csv"
SIZES = (10, 100, 1000)
STEPS = 20
EDGE = 40


def make_folder(folder: Path, cases: int) -> Path:
    """`images/` and `labels/` with links to four cases: smooth blobs, the bright and the dark ones labelled."""
    for number in range(4):
        noise = np.random.default_rng(number).standard_normal((EDGE, EDGE, EDGE))
        field = gaussian_filter(noise, 4)
        field /= field.std()
        label = (field > 1).astype(np.uint8) + 2 * (field < -1).astype(np.uint8)
        for name, array in (("images", (field + noise).astype(np.float32)), ("labels", label)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / f"{name}-{number}.nii.gz")
    for number in range(cases):
        for name in ("images", "labels"):
            link = folder / name / f"case{number:04d}.nii.gz"
            link.symlink_to(folder / f"{name}-{number % 4}.nii.gz")
    return folder


def train_on(folder: Path, steps: int) -> None:
    """Train the smallest network on the folder; what it computes has no part in the question."""
    from srlib import runs, train

    settings = {"model": "tiny", "tom": "none", "steps": steps, "batch_size": 1}
    config = runs.config_for("default", str(folder), **settings)
    trained = train.train(config, progress=False)
    (folder / "run").symlink_to(trained.run_dir)


def predict_all(folder: Path) -> None:
    """Segment every case of the folder with the network that `train_on` has trained."""
    from srlib import predict

    segmenter = predict.load(folder / "run" / "model.safetensors")
    for name, files in predict.find_cases([folder / "images"], 1).items():
        mask = predict.segment(segmenter, files, progress=False)
        predict.write_mask(mask, files[0], folder / "masks" / f"{name}.nii.gz")


def measure(phase: str, folder: Path, steps: int) -> dict[str, float]:
    """Run a phase in a process of its own; its peak memory (MiB) and time (s)."""
    start = time.perf_counter()
    home = {"SRLIB_CACHE": str(folder / "cache"), "SRLIB_RESULTS": str(folder / "results")}
    command = [sys.executable, __file__, "--phase", phase, "--folder", str(folder)]
    done = subprocess.run(
        [*command, "--steps", str(steps)],
        env=os.environ | home,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return {
        "peak_mib": float(done.stdout.split()[-1]),
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    """Measure all, print and store; or, in the processes that this starts, run one phase."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--phase", choices=("train", "predict"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phase:
        if options.phase == "train":
            train_on(options.folder, options.steps)
        else:
            predict_all(options.folder)
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(kib / 1024)  # Linux counts in KiB
        return
    rows = []
    steps = 3 if options.quick else STEPS
    for cases in (10, 20) if options.quick else SIZES:
        with tempfile.TemporaryDirectory() as place:
            folder = make_folder(Path(place).resolve(), cases)
            for phase in ("train", "predict"):
                found = measure(phase, folder, steps)
                rows.append({"cases": cases, "phase": phase, **found, "steps": steps})
                print(rows[-1], flush=True)
    if not options.quick:
        provenance.write_table(pd.DataFrame(rows), TABLE)


if __name__ == "__main__":
    main()
