"""What a result was computed with: versions, device, threads and commit."""

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

from srlib.paths import ROOT, atomic_path
from srlib.runs import device

PACKAGES = ("torch", "monai", "numpy", "scipy", "pandas", "nibabel", "nilearn", "numba")
OPTIONAL_PACKAGES = ("mamba-ssm", "causal-conv1d")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on, of those that are there."""
    found = {"python": platform.python_version()}
    for package in PACKAGES + OPTIONAL_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    """The device that is computed on: the GPU's name, or the processor's and the number of threads."""
    if device().type == "cuda":
        return torch.cuda.get_device_name(device())
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' * (threads > 1)}"


def cpu_name() -> str:
    """The processor's model name, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> tuple[str, bool]:
    """The checkout's commit and whether tracked files, results apart, differ from it.

    `$SRLIB_COMMIT` speaks for copies of a checkout on other machines; without it and git it is `unknown`.
    """
    if stated := os.environ.get("SRLIB_COMMIT"):
        return stated, False
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", ROOT, *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno", ":!results"))
        )
    except (OSError, subprocess.CalledProcessError):
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
    with atomic_path(file) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")
    with atomic_path(file.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(describe(), indent=1) + "\n")
