"""The threads that the CPU kernels run on: torch's own, where they can be had.

After an operation torch's OpenMP threads spin for some milliseconds, to be there for the next one. Threads of
another pool have to share the cores with them: between two matrix products, a scan on two threads of its own
gained nothing over one on two cores. So the tasks go to the team of torch's own OpenMP runtime, by the entry
point that compilers call for `#pragma omp parallel`. Where torch has another runtime than GNU's (macOS, conda),
and in a process that was forked, where GNU's hangs, a pool of Python's threads takes them.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

_Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_PROCESS = os.getpid()  # that imported this; a fork of it has another


def run(task: Callable[..., None], shares: Sequence[tuple]) -> None:
    """Call `task(*share)` for each of the shares, on as many threads as torch uses.

    The first exception that a task raises is raised here, when all have ended.
    """
    threads = min(torch.get_num_threads(), len(shares))
    if threads == 1:
        for share in shares:
            task(*share)
    elif os.getpid() == _PROCESS and (parallel := _gnu_openmp()):
        _in_team(parallel, threads, task, shares)
    else:
        pending = [_pool(os.getpid(), threads).submit(task, *share) for share in shares]
        for result in pending:
            result.result()


@functools.cache
def _gnu_openmp() -> Callable[..., None] | None:
    """GOMP_parallel(function, data, threads, flags) of the library that torch brings; None without it."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        parallel = ctypes.CDLL(str(path)).GOMP_parallel
        parallel.argtypes = [_Region, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return parallel
    return None


def _in_team(
    parallel: Callable[..., Any], threads: int, task: Callable[..., None], shares: Sequence[tuple]
) -> None:
    remaining = iter(shares)
    errors: list[BaseException] = []

    @_Region
    def region(_: Any) -> None:
        try:
            for share in remaining:  # the interpreter's lock lets one thread at a time take one
                task(*share)
        except BaseException as error:  # an interrupt too: nothing can pass through the C code
            errors.append(error)

    parallel(region, None, threads, 0)
    if errors:
        raise errors[0]


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of one process: what a fork leaves of its parent's pool is not used."""
    return ThreadPoolExecutor(threads, thread_name_prefix="selective-scan")
