"""Data sets: their cases, checks, cached preprocessing and folds.

    files --check--> trusted files --load--> RAS, working spacing, z-scores, kept on disk
          --TrainingSamples (srlib.data.samples)--> patches, each a pure function of (seed, step, index)

Arrays are (C, X, Y, Z), the axes pointing right, anterior and superior; where the network says
(D, H, W) it is given X, Y, Z.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from srlib import files
from srlib.data import labels, plans, scans
from srlib.data.catalog import CATALOG, KNOWN, Entry, find, maker, recipe_fingerprint
from srlib.data.folders import LAYOUTS, Case
from srlib.files import RECIPE, DataError, cache_dir, slug

FOLDS = 5
FOLD_SEED = "srlib-folds-1"
PREPARED = 2  # version of a prepared case; kept results hold `RECIPE`


class Split(NamedTuple):
    """Case ids of one fold."""

    train: tuple[str, ...]
    test: tuple[str, ...]


def get(name: str) -> Entry:
    """Describe a data set, whose files need not be here: the catalogue's entry, or the plan of the folder at that path.

    A folder's entry has the folder's whole path as its name. Its first plan reads every case, which
    takes a while, and is kept in the cache (`srlib.data.plans`).

    Raises:
        ValueError: neither a known name nor a folder; it lists the names.
        DataError: a folder with faults, one line for each.
    """
    if name in KNOWN:
        return KNOWN[name]
    if not Path(name).is_dir():
        known = ", ".join(CATALOG)
        raise ValueError(f"unknown data set {name!r}; choose from {known}, or give a folder's path")
    return plans.load(Path(name).resolve()).entry


def open(name: str) -> Dataset:
    """Open a data set by its name in the catalogue or its folder's path; a virtual one is built on first use.

    Within a process it is read again when files came into the folder or left it.

    Raises:
        ValueError: neither a known name nor a folder.
        FileNotFoundError: a known data set that is not here; it says how to get it.
        DataError: a folder with faults, one line for each.
    """
    entry = get(name)
    folder = find(entry)
    return _opened(entry, folder, plans.changed(folder))


@lru_cache(maxsize=8)  # many ask for the same one by name
def _opened(entry: Entry, folder: Path, _changed: tuple[int, ...]) -> Dataset:
    return Dataset(entry, folder)


class Dataset:
    """A data set whose files are here.

    Attributes:
        entry: what is known of it.
        folder: where its files are.
        cases: the labelled ones, in the order of their ids.
    """

    def __init__(self, entry: Entry, folder: Path) -> None:
        self.entry, self.folder = entry, folder
        self.cases: tuple[Case, ...] = LAYOUTS[entry.layout].read(folder).cases
        self._by_id = {case.id: case for case in self.cases}

    def __repr__(self) -> str:
        return f"<{self.entry.name}: {len(self.cases)} cases in {self.folder}>"

    def split(self, fold: int = 0) -> Split:
        """Training and test cases of a fold: fixed, the same on every machine.

        Five folds, or as many as there are cases: the cases in the order of the SHA-256 of
        "seed/name/id", dealt out in turn; the rule depends on no random generator's version. The name of
        a folder is left out, so that its folds stay when it moves. A virtual data set has one split, its
        first cases against the last (8 subjects of the cohort, 32 volumes of a diagnostic task), as fold 0.

        Raises:
            ValueError: for a fold that the data set does not have, naming those it has.
        """
        entry, ids = self.entry, list(self._by_id)
        folds = range(1 if entry.virtual else min(FOLDS, len(ids)))
        if fold not in folds:
            raise ValueError(f"data set {entry.name!r} has the folds {list(folds)}, got {fold!r}")
        if entry.virtual:
            test = set(ids[-maker(entry)[0].HELD_OUT :])
        else:
            of = entry.name if entry.name in CATALOG else "folder"
            keys = {i: hashlib.sha256(f"{FOLD_SEED}/{of}/{i}".encode()).digest() for i in ids}
            test = set(sorted(ids, key=keys.__getitem__)[fold::FOLDS])
        return Split(tuple(i for i in ids if i not in test), tuple(i for i in ids if i in test))

    def check(self, fold: int | None = None) -> None:
        """Hold every case against the data set's entry, before hours are spent on it.

        Readable files of three dimensions, all of a case on one grid (shape and affine) that is regular,
        finite and not constant intensities, label values that the entry knows, each class in some case.

        Args:
            fold: look for each class in this fold's training cases only.

        Raises:
            DataError: one line for each fault, naming the file and what was expected.
        """
        found = files.cached_json(self._memory("checked"), self._labels_found)
        ids = found if fold is None else self.split(fold).train
        seen = {label for case_id in ids for label in found[case_id]}
        classes = zip(self.entry.classes, self.entry.members, strict=True)
        if absent := [name for name, of in classes if not seen & set(of)]:
            where = "case" if fold is None else f"training case of fold {fold}"
            raise DataError(
                f"data set {self.entry.name!r}: no {where} has {', '.join(absent)}; expected each class"
            )

    def load(self, case_id: str) -> dict[str, Any]:
        """One preprocessed case, from the cache when its files have not changed.

        Returns:
            `image` float32 (C, X, Y, Z), robust z-scores, axes RAS, the entry's spacing; `label` int64
            (1, X, Y, Z); `affine` (4, 4) of this grid, voxels to mm; `spacing` in mm; `id`.

        Raises:
            ValueError: no such case.
            DataError: a file of the case that cannot be read, or that changes meanwhile.
        """
        case = self[case_id]
        tensors = self.prepare(case, self.prepared_at(case))
        spacing = tuple(map(float, nib.affines.voxel_sizes(tensors["affine"].numpy())))
        label = tensors["label"].long()
        return {**tensors, "label": label, "spacing": spacing, "id": case_id}

    def __getitem__(self, case_id: str) -> Case:
        if case_id not in self._by_id:
            raise ValueError(f"data set {self.entry.name!r} has no case {case_id!r}")
        return self._by_id[case_id]

    @property
    def fingerprint(self) -> str:
        """Short hash that names the data: of the decoded arrays; of a virtual one, its recipe."""
        if self.entry.virtual:
            return recipe_fingerprint(self.entry)
        return files.cached_json(self._memory("fingerprint"), self._hash_arrays)

    def summary(self) -> pd.DataFrame:
        """One row a case: voxels and voxel size (mm) of each axis, range of the first channel, volumes (ml)."""
        return pd.DataFrame(files.cached_json(self._memory("summary"), self._rows))

    def file_states(self) -> dict[Path, str]:
        """Size and modification time of every file of the cases."""
        return {path: _state(path) for case in self.cases for path in case.files}

    # Facts about all cases are remembered until a file's path, size or modification time, what is expected of it,
    # `RECIPE` or `PREPARED` changes, and so are prepared cases: MONAI's PersistentDataset keeps pickles without
    # checksums.

    def _identity(self, paths: Sequence[Path]) -> str:
        entry = self.entry
        parts = [f"{RECIPE} {PREPARED} {entry.name} {entry.classes} {entry.spacing}"]
        parts.append(f"{entry.normalisation} {entry.label_values}")
        parts += [f"{path} {_state(path)}" for path in paths]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def _memory(self, what: str) -> Path:
        paths = [path for case in self.cases for path in case.files]
        return cache_dir("facts") / f"{slug(self.entry.name)}-{what}-{self._identity(paths)}"

    def prepared_at(self, case: Case) -> Path:
        """Path of a prepared case: safetensors, which can be read without running code."""
        folder = cache_dir("cases", slug(self.entry.name))
        return folder / f"{case.id}-{self._identity(case.files)}.safetensors"

    def prepare(self, case: Case, place: Path) -> dict[str, Tensor]:
        """The prepared case from its place, put there first where it is missing or broken."""

        def make() -> dict[str, Tensor]:
            if place != self.prepared_at(case):
                raise DataError(
                    f"{case.image}: it or its label has changed since this process began"
                )
            images, label = self._read(case)
            image, affine = scans.prepare(images, self.entry.spacing, self.entry.normalisation)
            label = scans.regrid(label, self.entry.spacing, labels=True)
            return {
                "image": image,  # (C, X, Y, Z)
                "label": self._label_map(label),
                "affine": torch.from_numpy(affine),  # (4, 4)
            }

        tensors, _ = files.cached(place, make, files.save_tensors, files.load_tensors)
        return tensors

    def _read(self, case: Case) -> tuple[list[scans.Scan], scans.Scan]:
        return scans.read_case(case.images, case.label, self.entry.in_channels)

    def _label_map(self, label: scans.Scan) -> Tensor:
        """Labels of a file as this library numbers them, uint8 (1, X, Y, Z)."""
        return torch.from_numpy(labels.encode(label.array, self.entry))[None]

    def _labels_found(self) -> dict[str, list[int]]:
        """The labels, as this library numbers them, of every case; `DataError` with a line for each fault."""
        found, faults, entry = {}, [], self.entry
        for case in self.cases:
            try:
                _, label = self._read(case)
                values = labels.values_in(case.label, label, labels.known_values(entry))
                found[case.id] = [entry.values.index(value) + 1 for value in values]
            except DataError as error:
                faults += str(error).splitlines()
        if faults:
            raise DataError(
                "\n".join([f"data set {entry.name!r}, {len(faults)} fault(s):", *faults])
            )
        return found

    def _hash_arrays(self) -> str:
        digest = hashlib.sha256()
        for case in self.cases:
            images, label = self._read(case)
            digest.update(f"{case.id} {images[0].array.shape}".encode())
            parts: list[tuple[NDArray[Any], str]] = [(image.array, "<f4") for image in images]
            parts += [(labels.encode(label.array, self.entry), "u1"), (images[0].affine, "<f8")]
            for array, kind in parts:
                digest.update(array.astype(kind).tobytes())
        return digest.hexdigest()[:16]

    def _rows(self) -> list[dict[str, object]]:
        return [self._row(case) for case in self.cases]

    def _row(self, case: Case) -> dict[str, object]:
        images, label = self._read(case)
        image, affine = images[0]
        masks = labels.class_masks(self._label_map(label)[None], self.entry.members)[0]
        size = nib.affines.voxel_sizes(affine)
        row: dict[str, object] = {"case": case.id}
        row |= {f"voxels_{axis}": n for axis, n in zip("xyz", image.shape, strict=True)}
        row |= {f"spacing_{axis}_mm": float(s) for axis, s in zip("xyz", size, strict=True)}
        row |= {"intensity_min": float(image.min()), "intensity_max": float(image.max())}
        for of_class, mask in zip(self.entry.classes, masks, strict=True):
            row[f"{of_class} (ml)"] = int(mask.sum()) * float(size.prod()) / 1000
        return row


def _state(path: Path) -> str:
    state = path.stat() if path.is_file() else None
    return f"{state.st_size} {state.st_mtime_ns}" if state else "missing"
