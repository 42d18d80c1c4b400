"""Data sets by name: where their files are, their cases and their folds.

A name is one of the registry (`srlib.registry`), whose folder is looked for under
`srlib.paths.data_roots()`, or the path of any folder in a layout of `srlib.layouts`; what the registry
would say of that is found out from its files (`srlib.plans`). A virtual one is built in the cache.
`srlib.data` turns these files into tensors, and is the module to import.
"""

from __future__ import annotations

import hashlib
import socket
import tarfile
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from srlib import cohort, cue, plans
from srlib.images import DataError
from srlib.layouts import LAYOUTS, Case
from srlib.paths import cache_dir, data_roots, make_visible, source_hash
from srlib.registry import REGISTRY, Dataset

FOLDS = 5
STALLED = 120.0  # seconds without a byte, after which a download is given up
FOLD_SEED = "srlib-folds-1"


class Split(NamedTuple):
    """Case ids of one fold."""

    train: tuple[str, ...]
    test: tuple[str, ...]


def get(name: str) -> Dataset:
    """What is known of a data set: the registry's entry, or the plan of the folder at that path.

    A folder's entry has the folder's whole path as its name. Its first plan reads every case, which
    takes a while, and is kept in the cache (`srlib.plans`).

    Raises:
        ValueError: neither a known name nor a folder; it lists the names.
        DataError: a folder with faults, one line for each.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    if not Path(name).is_dir():
        known = ", ".join(REGISTRY)
        raise ValueError(f"unknown data set {name!r}; choose from {known}, or give a folder's path")
    return plans.load(Path(name).resolve()).entry


def find(name: str) -> Path:
    """The data set's folder. `FileNotFoundError` says where was looked and how to get it.

    A virtual one is built on the first call (about ten seconds).
    """
    entry = get(name)
    if entry.virtual:
        code = source_hash(("cohort.py", "cue.py"))
        folder = cache_dir(entry.folder) / f"{recipe_fingerprint(name)}-{code}"
        if name in cue.RECIPES:
            return cue.build(folder, cue.RECIPES[name])
        return cohort.build(folder, cohort.RECIPE)
    if name not in REGISTRY:
        return Path(entry.folder)
    folders, sign = [root / entry.folder for root in data_roots()], LAYOUTS[entry.layout].sign
    for folder in folders:
        if next(folder.glob(sign), None):
            return folder
    raise FileNotFoundError(
        f"data set {name!r}: no {sign} in {', '.join(map(str, folders))}."
        f" Get it with `{entry.how_to_get}`, or unpack it in one of these places."
    )


def present() -> list[str]:
    """Names of the registry's data sets whose files are on this machine, virtual ones apart."""
    names = []
    for name, entry in REGISTRY.items():
        with suppress(FileNotFoundError):
            if not entry.virtual and find(name):
                names.append(name)
    return names


def recipe_fingerprint(name: str) -> str:
    """Short hash of what a virtual data set is made by."""
    if name in cue.RECIPES:
        return cue.fingerprint(cue.RECIPES[name])
    return cohort.fingerprint(cohort.RECIPE)


def cases(name: str) -> list[Case]:
    """The labelled cases of the data set's folder, in the order of their ids."""
    folder = find(name)
    return list(_listed(folder, get(name).layout, plans.changed(folder)))


@lru_cache(maxsize=8)  # asked for at each case; read again when the folder has changed
def _listed(folder: Path, layout: str, changed: tuple[int, ...]) -> tuple[Case, ...]:
    return LAYOUTS[layout].read(folder).cases


def case_ids(name: str) -> list[str]:
    """Ids of the labelled cases, sorted."""
    return [case.id for case in cases(name)]


def split(name: str, fold: int = 0) -> Split:
    """Training and test cases of a fold: fixed, the same on every machine.

    Five folds, or as many as there are cases: the cases in the order of the SHA-256 of "seed/name/id",
    dealt out in turn; the rule depends on no random generator's version. The name of a folder is left
    out, so that its folds stay when it moves. A virtual data set has one split, its first cases (24
    subjects of the cohort, 128 volumes of a diagnostic task) against the rest, as fold 0.

    Raises:
        ValueError: for a fold that the data set does not have, naming those it has.
    """
    ids = case_ids(name)
    folds = range(1 if get(name).virtual else min(FOLDS, len(ids)))
    if fold not in folds:
        raise ValueError(f"data set {name!r} has the folds {list(folds)}, got {fold!r}")
    if get(name).virtual:
        test = set(ids[(cue if name in cue.RECIPES else cohort).TRAINING :])
    else:
        of = name if name in REGISTRY else "folder"
        keys = {i: hashlib.sha256(f"{FOLD_SEED}/{of}/{i}".encode()).digest() for i in ids}
        test = set(sorted(ids, key=keys.__getitem__)[fold::FOLDS])
    return Split(tuple(i for i in ids if i not in test), tuple(i for i in ids if i in test))


def download(name: str) -> Path:
    """Get a data set from its official source into the first data root; return its folder.

    A command, never a side effect. MONAI knows the Decathlon's addresses and MD5 sums. The archive
    is verified, refused as a whole if a member is a link or would land outside, unpacked beside its
    place and renamed: what is in place is complete.

    Raises:
        DataError: naming the address and what went wrong; nothing is left behind.
    """
    from monai.apps import DecathlonDataset, download_url, extractall

    try:
        return find(name)
    except FileNotFoundError:
        folder = get(name).folder
    if folder not in DecathlonDataset.resource:
        raise DataError(f"{name} cannot be downloaded by a program: {get(name).how_to_get}")
    target = data_roots()[0] / folder
    if target.exists():
        raise DataError(f"{target} exists but holds no dataset.json: move it away first")
    target.parent.mkdir(parents=True, exist_ok=True)
    url = DecathlonDataset.resource[folder]
    before = socket.getdefaulttimeout()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as partial:
        archive = Path(partial, f"{folder}.tar")
        try:
            socket.setdefaulttimeout(STALLED)
            download_url(url, archive, hash_val=DecathlonDataset.md5[folder], hash_type="md5")
            _refuse_unsafe_members(archive, partial)
            extractall(archive, partial)
            make_visible(Path(partial, folder), target)
        except (OSError, ValueError, RuntimeError, tarfile.TarError) as error:
            raise DataError(f"{url}: {type(error).__name__}: {error}") from error
        finally:
            socket.setdefaulttimeout(before)
    return find(name)


def _refuse_unsafe_members(archive: Path, folder: str) -> None:
    """`ValueError` when an archive holds a link, a device or a path that leaves `folder`."""
    from monai.apps.utils import safe_extract_member

    with tarfile.open(archive) as tar:
        for member in tar:
            safe_extract_member(member, folder)
            if not (member.isfile() or member.isdir()):
                raise ValueError(f"neither file nor folder in the archive: {member.name}")
