"""Where things are: every path of the project comes from here, never from the working directory.

Environment variables, read at each call so that a test or a script can set them:

- `SRLIB_DATA`: the folder that holds the data sets (looked at before `data/`);
- `SRLIB_RESULTS`: where results go instead of `results/`;
- `SRLIB_CACHE`: where preprocessed arrays are cached instead of `data/.cache`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
REFERENCE = ROOT / "results" / "reference"
SPARE = (
    1 << 20
)  # bytes; with fewer a disk counts as full where a library says only that writing failed

LONGEST_WAIT = (
    7 * 24 * 3600.0
)  # seconds, of anything that may rightly take days, as another's training


def results_root() -> Path:
    """The folder of everything computed here: `$SRLIB_RESULTS` or `results/`."""
    return Path(os.environ.get("SRLIB_RESULTS") or ROOT / "results").resolve()


def slug(dataset: str) -> str:
    """A data set's name as part of a file's name: itself, or of a folder's path its end and a hash."""
    if "/" not in dataset and os.sep not in dataset:
        return dataset
    end = re.sub(r"[^A-Za-z0-9]+", "-", Path(dataset).name)[:30].strip("-")
    return f"{end}-{hashlib.sha256(dataset.encode()).hexdigest()[:8]}"


def results_dir(profile: str, dataset: str, seed: int = 0) -> Path:
    """The folder of one collection run's figures, tables and executed notebooks."""
    name = slug(dataset)
    return results_root() / profile / (f"{name}-seed-{seed}" if seed else name)


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


@cache
def source_hash(names: tuple[str, ...]) -> str:
    """Hash of source files and folders of `srlib`, by name and content."""
    package = Path(__file__).resolve().parent
    files = [package / name for name in names]
    files = [f for path in files for f in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def read_json(file: Path, what: str, **expected: type) -> dict[str, Any]:
    """Read an object from a file of JSON that srlib wrote.

    Args:
        file: where it is.
        what: the file's content in words.
        expected: keys that must be there, and the types of their values.

    Raises:
        ValueError: an empty or cut file, another type, or a key that is missing; names the file.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected {what} in JSON ({error}); remove it") from error
    require(file, what, found, **expected)
    return found


def read_json_lines(file: Path, what: str, **expected: type) -> list[dict[str, Any]]:
    """Read a file with an object a line, as `read_json` reads one with one object."""
    try:
        found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(f"{file}: expected {what} in JSON, one a line ({error})") from error
    for entry in found:
        require(file, what, entry, **expected)
    return found


def require(file: Path, what: str, found: Any, **expected: type) -> None:
    """Raise the ValueError of `read_json` unless an object has the expected keys and types."""
    for key, kind in expected.items():
        if not (isinstance(found, dict) and isinstance(found.get(key), kind)):
            raise ValueError(f"{file}: expected {what} with {key!r}, a {kind.__name__}; remove it")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Have an OSError name what is written, and a disk be called full also where a library says only that it failed."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    except RuntimeError as error:  # of ITK or PyTorch
        if shutil.disk_usage(path.parent).free > SPARE:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block succeeds.

    A reader sees the old file or the new one, never half of one, also after a loss of power; on an error the
    temporary file is removed and the old file stays. Its rights are those that the umask leaves. The temporary
    name keeps the suffixes, for writers that look at it; of a long name only its beginning, since systems allow
    255 bytes.

    Raises:
        OSError: naming `path`, also where the system names no file, as on a full disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = "".join(part for part in path.suffixes[-2:] if len(part) <= len(".safetensors"))
    temporary = path.with_name(f".{path.stem[:20]}-{secrets.token_hex(4)}{suffix}")
    try:
        with _named(path):
            temporary.touch(exist_ok=False)
            rights = temporary.stat().st_mode
            yield temporary
            temporary.chmod(rights)  # safetensors leaves a file that only its owner may read
            make_visible(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _free(folder: Path) -> int:
    """Bytes that can still be written there."""
    return shutil.disk_usage(folder).free


def make_visible(finished: Path, path: Path) -> None:
    """Rename a finished file or folder to its place; a loss of power leaves it there whole or not at all."""
    for file in finished.rglob("*") if finished.is_dir() else ():
        _sync(file)
    _sync(finished)
    finished.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(folder: Path) -> None:
    """Remove what `atomic_path` left in a folder when its process was killed; for the one that holds the lock."""
    for file in folder.glob(".*-????????.*"):
        file.unlink()


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; rename it to `folder` when the block succeeds.

    A folder that is there is complete; on an error nothing is left. Of two processes that write at
    once one wins, and both find the same folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        with _named(folder):
            yield partial
            try:
                make_visible(partial, folder)
            except OSError:
                if not folder.is_dir():  # nobody else finished it either
                    raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; a second process says that it waits, and waits.

    The system takes the lock back when its holder ends in whatever way, so nothing stale is left by a crash.

    Raises:
        TimeoutError: another process has held it for `LONGEST_WAIT` seconds, and seems to hang.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        until = None
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if until is None:
                    print(f"another process works on {folder}; waiting for it", file=sys.stderr)
                    until = time.monotonic() + LONGEST_WAIT
                if time.monotonic() > until:
                    hours = LONGEST_WAIT / 3600
                    raise TimeoutError(
                        f"{folder}: another process has held it for {hours:g} h; does that hang?"
                    ) from None
                time.sleep(0.2)
        yield
