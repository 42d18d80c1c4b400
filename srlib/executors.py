"""What computes the runs of a grid: any `concurrent.futures.Executor`; three of them by name.

| name | where the runs are computed | needs |
|---|---|---|
| `process` | processes of this machine, which share its GPUs in turn | - |
| `dask` | workers of Dask distributed, here or at a scheduler's address | the extra `dask` |
| `slurm` | jobs of a SLURM cluster, through submitit | the extra `slurm` |

With `dask`, a run whose worker dies is computed by another one; a job of `slurm` that runs out of time is queued again;
either goes on from the last checkpoint where both see one results folder. When a process of `process` dies, as one
that is killed for its memory, Python gives up the whole pool: finished runs are kept, and the same command started
again computes the others.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch

from srlib import paths


def executor(
    name: str, workers: int, scheduler: str | None = None, job: Mapping[str, str] | None = None
) -> AbstractContextManager[Executor]:
    """An executor by its name, to be used in a `with` statement.

    Args:
        name: `process`, `dask` or `slurm`.
        workers: runs computed at a time; those of a Dask scheduler are its own.
        scheduler: address of a Dask scheduler; `None` starts workers on this machine.
        job: what a SLURM job asks for, in submitit's names, such as `slurm_partition`, `gpus_per_node`, `timeout_min`.

    Raises:
        ValueError: an unknown name, or a parameter that submitit does not know.
        ImportError: the extra that it needs is not installed.
        OSError: there is no scheduler at that address.
    """
    if name == "process":
        return process_pool(workers)
    if name == "dask":
        return dask(workers, scheduler)
    if name == "slurm":
        return jobs(workers, job or {})
    raise ValueError(f"executor {name!r} is not one of process, dask, slurm")


def process_pool(workers: int) -> Executor:
    """Processes of this machine; where there are CUDA devices, each worker takes the next one in turn."""
    spawn = multiprocessing.get_context("spawn")
    numbers = spawn.SimpleQueue()
    for number in range(workers):
        numbers.put(number)
    return ProcessPoolExecutor(workers, spawn, _take_device, (numbers,))


def _take_device(numbers: SimpleQueue) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # Ctrl-C ends it; its run resumes from its checkpoint
    if torch.cuda.is_available() and "SRLIB_DEVICE" not in os.environ:
        os.environ["SRLIB_DEVICE"] = f"cuda:{numbers.get() % torch.cuda.device_count()}"


@contextmanager
def dask(workers: int, scheduler: str | None = None) -> Iterator[Executor]:
    """Workers of Dask distributed; those that are started here have as many threads as this process."""
    try:
        from distributed import Client
    except ImportError as error:
        raise ImportError('the executor "dask" needs: pip install "srlib[dask]"') from error
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(torch.get_num_threads()))
    here = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None}
    before = dict(os.environ)
    try:
        with Client(scheduler) if scheduler else Client(**here, env=threads) as client:
            yield client.get_executor(pure=False)
    finally:  # Dask sets OMP_NUM_THREADS=1 and others here too, to hand them down, and leaves them
        os.environ.clear()
        os.environ.update(before)


class _Jobs(ThreadPoolExecutor):
    """A cluster's jobs: each thread submits one and waits for its result."""

    def __init__(self, workers: int, cluster: Any) -> None:
        super().__init__(workers)
        self.cluster = cluster

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Submit a job once a thread is free; one that runs out of time is queued again, and its run resumes."""
        from submitit.helpers import FunctionSequence

        call = FunctionSequence()
        call.add(function, *args, **kwargs)
        return super().submit(lambda: self.cluster.submit(call).result()[0])


def jobs(workers: int, parameters: Mapping[str, str], cluster: str = "slurm") -> Executor:
    """Jobs of a cluster that submitit knows; their logs are in `results/jobs`."""
    try:
        from submitit import AutoExecutor
    except ImportError as error:
        raise ImportError('the executor "slurm" needs: pip install "srlib[slurm]"') from error
    made = AutoExecutor(paths.results_root() / "jobs", cluster)
    numbers = {k: int(v) if v.isdecimal() else v for k, v in parameters.items()}
    try:
        made.update_parameters(name="srlib", **numbers)
    except (AssertionError, NameError, TypeError) as error:  # submitit's words for a wrong name
        raise ValueError(f"a parameter of the job is wrong: {error}") from error
    return _Jobs(workers, made)
