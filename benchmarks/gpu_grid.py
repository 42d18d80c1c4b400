"""Missing runs of the comparisons on one GPU that many processes share, within a given time.

    python benchmarks/gpu_grid.py OUT.tar GRID[:SYSTEM,...[:SEED,...]] ... [--processes 16] [--minutes 9]

The kernels of a small network wait for Python, so that one training leaves most of a GPU idle; many at once fill it
(start NVIDIA's MPS before). Runs are begun in the order given. What has no time left is stopped, and goes on from its
checkpoint when the command is started again with the same `SRLIB_RESULTS`.

OUT.tar holds the tables and records of the runs that ended, by their paths in the repository; unpack it there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from srlib import grid, paths
from srlib.runs import RunConfig


def wanted(choice: str) -> list[RunConfig]:
    """The missing runs of `GRID[:SYSTEM,...[:SEED,...]]`; an empty list of names takes all."""
    name, systems, seeds = (*choice.split(":"), "", "")[:3]
    return [
        config
        for config in grid.configs(name)
        if not grid.is_done(config)
        and (not systems or config.system in systems.split(","))
        and (not seeds or str(config.seed) in seeds.split(","))
    ]


def compute(configs: list[RunConfig], processes: int, seconds: float, out: Path) -> None:
    """Compute runs side by side; after these seconds the unfinished ones are stopped."""
    start = time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, spawn)
    futures = {pool.submit(grid.compute_run, config): config for config in configs}
    done: list[Path] = []
    try:
        for future in as_completed(futures, timeout=seconds):
            config = futures[future]
            says = f"{time.monotonic() - start:5.0f} s {config.dataset} {grid.run_name(config)}"
            if error := future.exception():
                print(says, "failed:", repr(error), flush=True)
                continue
            grid._keep(config, *future.result())
            table = grid.table_file(config)
            done += [table.with_suffix(".json"), table]
            pack(done, out)
            print(says, flush=True)
    except TimeoutError:
        print(f"out of time: {sum(not future.done() for future in futures)} runs are left")
    pool.shutdown(wait=False, cancel_futures=True)
    for process in multiprocessing.active_children():
        process.kill()


def pack(files: list[Path], out: Path) -> None:
    """Write the files' archive anew, whole at any time."""
    with paths.atomic_path(out) as temporary, tarfile.open(temporary, "w") as archive:
        for file in files:
            archive.add(file, file.relative_to(paths.REFERENCE.parents[1]))


def main() -> None:
    """Choose and compute."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("choices", nargs="+", metavar="GRID[:SYSTEM,...[:SEED,...]]")
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=9)
    options = parser.parse_args()
    configs = list(dict.fromkeys(c for choice in options.choices for c in wanted(choice)))
    print(f"{len(configs)} runs", flush=True)
    compute(configs, options.processes, 60 * options.minutes, options.out)


if __name__ == "__main__":
    main()
