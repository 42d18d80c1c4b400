"""How long the volume explorer takes to draw a case of 64 x 64 x 64 voxels again when its slice is moved.

    python benchmarks/redraw.py

Prints the median and the fastest of 20 redraws in milliseconds. The aim is 100 ms: then a slider feels immediate.
"""

from __future__ import annotations

import time
from statistics import median

import numpy as np
from scipy.ndimage import gaussian_filter

from srlib import explore, plots, provenance

SIZE, REDRAWS = 64, 20


def main() -> None:
    """Move the slice, one voxel a time."""
    image = gaussian_filter(np.random.default_rng(0).normal(size=(SIZE,) * 3), 3)
    labels = np.digitize(image, np.array([0.5, 1.2]) * image.std())
    scan = plots.Scan(image, {"reference": labels, "prediction": np.roll(labels, 1, axis=0)})
    cases = explore.explore_cases(lambda _: scan, ["one"], ("first", "second"), (1.0, 1.0, 1.0))
    seconds = []
    for at in range(20, 20 + REDRAWS):
        start = time.perf_counter()
        cases.controls["at"].value = at
        seconds.append(time.perf_counter() - start)
    print(
        f"a redraw at {SIZE}^3, {provenance.device_name()}: median {1000 * median(seconds):.0f} ms,"
        f" fastest {1000 * min(seconds):.0f} ms"
    )


if __name__ == "__main__":
    main()
