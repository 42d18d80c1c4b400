"""Where things are: every path of the project comes from here, never from the working directory.

Environment variables, read at each call so that a test or a script can set them:

- `SRLIB_DATA`: the folder that holds the data sets (looked at before `data/`);
- `SRLIB_RESULTS`: where results go instead of `results/`;
- `SRLIB_CACHE`: where preprocessed arrays are cached instead of `data/.cache`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
REFERENCE = ROOT / "results" / "reference"


def results_root() -> Path:
    """The folder of everything computed here: `$SRLIB_RESULTS` or `results/`."""
    return Path(os.environ.get("SRLIB_RESULTS") or ROOT / "results").resolve()


def results_dir(profile: str, dataset: str, seed: int = 0) -> Path:
    """The folder of one collection run's figures, tables and executed notebooks."""
    return results_root() / profile / (f"{dataset}-seed-{seed}" if seed else dataset)


def runs_root() -> Path:
    """The folder that holds one folder for each training run."""
    return results_root() / "runs"


def data_roots() -> list[Path]:
    """Folders searched for data sets, in order: `$SRLIB_DATA` when it is set, then `data/`."""
    configured = os.environ.get("SRLIB_DATA")
    roots = [Path(configured).resolve()] if configured else []
    return [*roots, ROOT / "data"]


def cache_dir(*parts: str) -> Path:
    """A folder for preprocessed data, created when missing: `$SRLIB_CACHE` or `data/.cache`."""
    folder = Path(os.environ.get("SRLIB_CACHE") or ROOT / "data" / ".cache").resolve()
    folder = folder.joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block succeeds.

    A reader sees the old file or the new one, never half of one; on an error the temporary file is
    removed and the old file stays. The temporary name keeps the suffixes, for writers that look at it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.stem[:40]}-", suffix="".join(path.suffixes)
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
