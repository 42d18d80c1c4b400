"""Files: where they are, and how they are written, locked, checked and cached.

Every path of the project comes from here, never from the working directory.

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
import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # torch takes seconds, and the list of data sets needs no tensors
    from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
REFERENCE = ROOT / "results" / "reference"
# Version of everything that results depend on. Raise it by hand when a change of the code alters them: a run, its
# scores, prepared cases, plans and executed notebooks of another version are computed anew. `tests/test_recipe.py`
# trains a tiny network and fails when its numbers move while this one does not.
RECIPE = 2
# Bytes; with fewer a disk counts as full where a library says only that writing failed.
SPARE = 1 << 20
LONGEST_WAIT = 7 * 24 * 3600.0  # seconds, of what may rightly take days, as another's training
T = TypeVar("T")
logger = logging.getLogger("srlib")
LIST = "checksums.json"  # of a folder's files
_whole: set[Path] = set()  # folders that this process has looked at


class DataError(ValueError):
    """Files that cannot be used; the message has one line for each, naming it and what was expected."""


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

    A folder with its final name is complete; on an error nothing is left. Of two processes that write at
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


# --- Files with checksums, and caches of them ----------------------------------------------------
#
# A SHA-256 of all that a file holds is written into it: into the metadata of safetensors, beside the content of JSON. A
# file that was cut short, has lost a bit or was written by something else raises `BrokenFile`; a cache is made again.


class BrokenFile(ValueError):
    """A file whose content is not what was written; the message names it."""


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None
) -> None:
    """Write tensors and, as JSON takes it, what is to be known of them.

    Raises:
        OSError: naming `path`, also where safetensors does not.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    about = about or {}
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # One entry, since safetensors writes several in an order that changes: equal contents are equal files.
    entry = json.dumps({"about": about, "sha256": _of_tensors(held, about)}, sort_keys=True)
    with atomic_path(path) as temporary:
        try:
            save_file(held, temporary, metadata={"srlib": entry})
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written; is the disk full? ({error})") from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote, onto the CPU.

    Raises:
        BrokenFile: a file that is cut short or changed, or that this version of srlib did not write.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            entry = json.loads((file.metadata() or {})["srlib"])
            # cloned, since what is mapped into memory would change with the file
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        about, expected = entry["about"], entry["sha256"]
    except SafetensorError as error:
        raise BrokenFile(f"{path}: not a whole file of safetensors ({error})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise BrokenFile(f"{path}: its metadata are not those of this version of srlib") from error
    if _of_tensors(tensors, about) != expected:
        raise BrokenFile(f"{path}: broken: its content has another checksum than was written")
    return tensors, about


def save_json(path: Path, content: Any) -> None:
    """Write what JSON takes."""
    with atomic_path(path) as temporary:
        entry = {"sha256": _of_json(content), "content": content}
        temporary.write_text(json.dumps(entry, indent=1), encoding="utf-8")


def load_json(path: Path) -> Any:
    """Read what `save_json` wrote.

    Raises:
        BrokenFile: a file that is cut short or changed, or that this version of srlib did not write.
    """
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        content, expected = entry["content"], entry["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise BrokenFile(f"{path}: not a whole file of this version of srlib") from error
    if _of_json(content) != expected:
        raise BrokenFile(f"{path}: broken: its content has another checksum than was written")
    return content


def cached(path: Path, make: Callable[[], Any], save: Callable, load: Callable[[Path], T]) -> T:
    """Read a cache's file; where it is missing or broken, make and write it first.

    Args:
        path: of the file.
        make: gives the content.
        save: writes it, given the path and the content.
        load: reads it, given the path; raises `BrokenFile`.
    """
    if path.is_file():
        try:
            return load(path)
        except BrokenFile as error:
            logger.warning("%s; it is made again", error)
    save(path, make())
    return load(path)


def cached_json(path: Path, make: Callable[[], Any]) -> Any:
    """`cached` of what JSON takes."""
    return cached(path, make, save_json, load_json)


def cached_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """A cache's folder; where it is missing or a file in it is broken or gone, it is written anew.

    Args:
        folder: where it is.
        write: fills an empty folder.
    """
    if folder in _whole and folder.is_dir():
        return folder
    if folder.is_dir() and not _is_whole(folder):
        logger.warning("%s: broken: a file is not as it was written; it is made again", folder)
        shutil.rmtree(folder)
    if not folder.is_dir():
        with atomic_folder(folder) as partial:
            write(partial)
            save_json(partial / LIST, _of_files(partial))
    _whole.add(folder)
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        return load_json(folder / LIST) == _of_files(folder)
    except (BrokenFile, FileNotFoundError):
        return False


def _of_files(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != LIST)
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def _of_tensors(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    import torch

    digest = hashlib.sha256(_of_json(about).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _of_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
