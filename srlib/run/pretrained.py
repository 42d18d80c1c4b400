"""Small trained networks that come with the repository: `tiny`, in half precision, one for each of two data sets.

`results/reference/<data set>/tiny.safetensors` is what `srlib.run.predict` takes; the model card beside it, `tiny.md`,
says what it was trained on and how well it does. `benchmarks/publish.py` makes both.
"""

from __future__ import annotations

from pathlib import Path

from srlib import files


def file(dataset: str) -> Path:
    """Where the trained network of a data set is."""
    return files.REFERENCE / dataset / "tiny.safetensors"


def exists(dataset: str) -> bool:
    """Whether the repository holds one."""
    return file(dataset).is_file()
