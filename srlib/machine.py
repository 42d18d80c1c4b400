"""Circumstances of a result: versions, device, threads and commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from srlib import tables
from srlib.files import ROOT, atomic_path

PACKAGES = ("torch", "monai", "numpy", "scipy", "pandas", "nibabel", "nilearn", "numba")
OPTIONAL_PACKAGES = ("mamba-ssm", "causal-conv1d", "nnunetv2", "onnx", "onnxruntime")


def device() -> torch.device:
    """`$SRLIB_DEVICE`, else the first CUDA device, else the CPU.

    Raises:
        ValueError: it names no device of this machine.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    asked = os.environ.get("SRLIB_DEVICE") or ("cuda" if count else "cpu")
    if asked not in ("cpu", *["cuda"][:count], *(f"cuda:{number}" for number in range(count))):
        here = f"{count} CUDA device(s), with PyTorch {torch.__version__}"
        raise ValueError(f"SRLIB_DEVICE={asked}: expected cpu, cuda or cuda:N; here: {here}")
    return torch.device(asked)


def processes() -> int:
    """Number of processes that train one run together: as many as torchrun started, else 1."""
    return int(os.environ["WORLD_SIZE"]) if torch.distributed.is_torchelastic_launched() else 1


def is_first_process() -> bool:
    """Tell whether this process is the one that writes; the others of torchrun only compute."""
    return processes() == 1 or os.environ["RANK"] == "0"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on, of those that are there."""
    found = {"python": platform.python_version()}
    for package in PACKAGES + OPTIONAL_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name(name: str = "") -> str:
    """A device, `device()` unless one is named: the GPU's name, or the processor's and the number of threads."""
    chosen = torch.device(name) if name else device()
    if chosen.type == "cuda":
        return torch.cuda.get_device_name(chosen)
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' * (threads > 1)}"


def cpu_name() -> str:
    """The processor's model name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> tuple[str, bool]:
    """The checkout's commit and whether tracked files, results apart, differ from it.

    A copy without `.git` names the commit that it was given in `$SRLIB_COMMIT`; where nothing tells, it is `unknown`.
    """
    if not (ROOT / ".git").exists():
        return os.environ.get("SRLIB_COMMIT") or "unknown", False
    # Neither a repository around this folder nor one that the environment names, as within a git hook.
    here = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    git = ["git", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}", "-C", str(ROOT)]
    try:
        head, changes = (
            subprocess.run(
                [*git, *command], env=here, capture_output=True, text=True, check=True, timeout=600
            ).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno", ":!results"))
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown", False
    return head, bool(changes)


def describe() -> dict[str, Any]:
    """Everything above, as JSON takes it."""
    head, changes = commit()
    return {
        "commit": head,
        "dirty": changes,
        "device": device_name(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(terse=True),
        "versions": versions(),
    }


def write_table(table: pd.DataFrame, file: Path) -> None:
    """Write a benchmark's table as CSV and, beside it as JSON, what it was made with."""
    tables.write(table, file)
    with atomic_path(file.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(describe(), indent=1) + "\n")
