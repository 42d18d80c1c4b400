"""What a result was computed with: versions, device, threads and commit."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from srlib.paths import ROOT

PACKAGES = ("torch", "monai", "numpy", "scipy", "pandas", "nibabel", "nilearn", "numba")
OPTIONAL_PACKAGES = ("mamba-ssm", "causal-conv1d")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES + OPTIONAL_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def cpu_name() -> str:
    """The processor's model name, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        name = _output("sysctl", "-n", "machdep.cpu.brand_string")
        if name:
            return name
    return platform.processor() or platform.machine()


def device_name() -> str:
    """The device that is computed on: the GPU's name, or the processor's with the number of threads."""
    import torch

    from srlib.runs import device

    if device().type == "cuda":
        return torch.cuda.get_device_name(device())
    return f"{cpu_name()} ({torch.get_num_threads()} threads)"


def commit() -> tuple[str, bool]:
    """The commit of this checkout and whether tracked files differ from it.

    Returns:
        `("unknown", False)` where there is no git or no repository, in an unpacked archive for instance.
    """
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not head:
        return "unknown", False
    return head, bool(_output("git", "-C", str(ROOT), "status", "--porcelain", "-uno"))


def describe() -> dict[str, Any]:
    """Everything above as one JSON-able dictionary."""
    import torch

    head, dirty = commit()
    return {
        "commit": head,
        "dirty": dirty,
        "device": device_name(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(terse=True),
        "versions": versions(),
    }


def _output(*command: str) -> str:
    """What a command prints, or nothing when it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
