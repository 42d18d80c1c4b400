"""Files that are checked as they are read, and caches of such files, which are made again when they are broken.

A SHA-256 of all that a file holds is written into it: into the metadata of safetensors, beside the content of JSON.
A file that was cut short, has lost a bit or was written by something else raises `BrokenFile`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from srlib.paths import atomic_folder, atomic_path

T = TypeVar("T")
logger = logging.getLogger("srlib")
LIST = "checksums.json"  # of a folder's files
_whole: set[Path] = set()  # folders that this process has looked at


class BrokenFile(ValueError):
    """A file whose content is not what was written; the message names it."""


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None
) -> None:
    """Write tensors and, as JSON takes it, what is to be known of them.

    Raises:
        OSError: naming `path`, also where safetensors does not.
    """
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
    digest = hashlib.sha256(_of_json(about).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _of_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
