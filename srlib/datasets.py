"""The registry of data sets: what each is, where its files are, its cases and its folds.

A data set is a folder in the Medical Segmentation Decathlon's layout (`dataset.json`, `imagesTr`,
`labelsTr`) under one of `srlib.paths.data_roots()`; the virtual cohort builds its own in the cache.
`srlib.data` turns these files into tensors, and is the module to import.
"""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from monai.apps import DecathlonDataset, download_url, extractall
from monai.apps.utils import safe_extract_member
from monai.data import load_decathlon_datalist

from srlib import cohort
from srlib.paths import cache_dir, data_roots

FOLDS = 5
FOLD_SEED = "srlib-folds-1"
COHORT_TRAINING = 24


class DataError(ValueError):
    """Files of a data set that cannot be used; the message has one line for each."""


@dataclass(frozen=True)
class Dataset:
    """One entry of the registry. Label value k + 1 is `classes[k]`; 0 is background."""

    name: str
    title: str
    task: str
    modalities: tuple[str, ...]
    classes: tuple[str, ...]
    spacing: tuple[float, float, float]  # working voxel size, mm
    licence: str
    citation: str
    source: str
    how_to_get: str
    flip_axes: tuple[int, ...]  # spatial axes along which a mirrored case is still a possible case
    nsd_tolerance: float  # mm; one voxel of the working spacing
    virtual: bool  # made by a computer from one template, not measured on subjects
    folder: str  # its name under a data root

    @property
    def in_channels(self) -> int:
        """Input channels of a network for it: one a modality."""
        return len(self.modalities)

    @property
    def out_channels(self) -> int:
        """Output channels of a network for it: the background and one a class."""
        return len(self.classes) + 1


class Case(NamedTuple):
    """Files of one labelled case."""

    id: str
    image: Path
    label: Path


class Split(NamedTuple):
    """Case ids of one fold."""

    train: tuple[str, ...]
    test: tuple[str, ...]


MNI152 = Dataset(
    name="mni152",
    title="Virtual cohort of the ICBM-152 template",
    task="Grey and white matter in T1 images deformed at random from one template (no patients)",
    modalities=("T1 MRI",),
    classes=cohort.CLASSES,
    spacing=(cohort.RECIPE.spacing,) * 3,
    licence="ICBM-152 2009 template: free to use, copy, modify and distribute with its notice",
    citation="Fonov et al., Unbiased nonlinear average age-appropriate brain templates from birth"
    " to adulthood, NeuroImage 47, S102 (2009)",
    source="the template and tissue maps in the nilearn package",
    how_to_get="nothing to do: it is built from nilearn's template on first use",
    flip_axes=(0,),  # the labels name no side, and a mirrored brain is a brain
    nsd_tolerance=cohort.RECIPE.spacing,
    virtual=True,
    folder="mni152",
)
HIPPOCAMPUS = Dataset(
    name="hippocampus",
    title="MSD Task04 Hippocampus",
    task="Anterior and posterior hippocampus in cropped T1 images",
    modalities=("MRI",),
    classes=("anterior", "posterior"),
    spacing=(1.0, 1.0, 1.0),
    licence="CC BY-SA 4.0",
    citation="Antonelli et al., The Medical Segmentation Decathlon, Nat. Commun. 13, 4128 (2022)",
    source="Medical Segmentation Decathlon, Task04 (Vanderbilt University Medical Center)",
    how_to_get="python -m srlib data get hippocampus",
    # Anatomy would allow to mirror left and right, but all 260 crops are turned to one handedness
    # (none is more like the mirrored mean than like the mean), so a mirrored one is never met.
    flip_axes=(),
    nsd_tolerance=1.0,
    virtual=False,
    folder="Task04_Hippocampus",
)
REGISTRY: dict[str, Dataset] = {entry.name: entry for entry in (MNI152, HIPPOCAMPUS)}


def get(name: str) -> Dataset:
    """The registry's entry; an unknown name is a `ValueError` that lists the known ones."""
    if name not in REGISTRY:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(REGISTRY)}")
    return REGISTRY[name]


def find(name: str) -> Path:
    """The data set's folder. `FileNotFoundError` says where was looked and how to get it.

    The virtual cohort is built on the first call (about ten seconds).
    """
    entry = get(name)
    if entry.virtual:
        folder = cache_dir(entry.folder) / cohort.fingerprint(cohort.RECIPE)
        return cohort.build(folder, cohort.RECIPE)
    folders = [root / entry.folder for root in data_roots()]
    for folder in folders:
        if (folder / "dataset.json").is_file():
            return folder
    raise FileNotFoundError(
        f"data set {name!r}: no dataset.json in {', '.join(map(str, folders))}."
        f" Get it with `{entry.how_to_get}`, or unpack it in one of these places."
    )


def cases(name: str) -> list[Case]:
    """The labelled cases that `dataset.json` lists, in the order of their ids."""
    index = find(name) / "dataset.json"
    return list(_listed(index, index.stat().st_mtime_ns))


@lru_cache(maxsize=8)  # asked for at each case; read again when the file has changed
def _listed(index: Path, changed: int) -> tuple[Case, ...]:
    try:
        listed = load_decathlon_datalist(str(index), is_segmentation=True, data_list_key="training")
        found = [Case(_stem(i["image"]), Path(i["image"]), Path(i["label"])) for i in listed]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{index}: no list of cases in the Decathlon's form: {error}") from error
    if len({case.id for case in found}) < max(1, len(found)):
        raise DataError(f"{index}: no cases, or two of one name, among the {len(found)} listed")
    return tuple(sorted(found))


def case_ids(name: str) -> list[str]:
    """Ids of the labelled cases, sorted."""
    return [case.id for case in cases(name)]


def _stem(path: str) -> str:
    return Path(path).name.removesuffix(".gz").removesuffix(".nii")


def split(name: str, fold: int = 0) -> Split:
    """Training and test cases of a fold: fixed, the same on every machine.

    Five folds: the cases in the order of the SHA-256 of "seed/name/id", dealt out in turn; the rule
    depends on no random generator's version. The virtual cohort has one split, its first 24
    subjects against the rest, as fold 0.

    Raises:
        ValueError: for a fold that the data set does not have, naming those it has.
    """
    ids = case_ids(name)
    folds = range(1 if get(name).virtual else FOLDS)
    if fold not in folds:
        raise ValueError(f"data set {name!r} has the folds {list(folds)}, got {fold!r}")
    if get(name).virtual:
        test = set(ids[COHORT_TRAINING:])
    else:
        keys = {i: hashlib.sha256(f"{FOLD_SEED}/{name}/{i}".encode()).digest() for i in ids}
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
    try:
        return find(name)
    except FileNotFoundError:
        folder = get(name).folder
    target = data_roots()[0] / folder
    if target.exists():
        raise DataError(f"{target} exists but holds no dataset.json: move it away first")
    target.parent.mkdir(parents=True, exist_ok=True)
    url = DecathlonDataset.resource[folder]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as partial:
        archive = Path(partial, f"{folder}.tar")
        try:
            download_url(url, archive, hash_val=DecathlonDataset.md5[folder], hash_type="md5")
            _refuse_unsafe_members(archive, partial)
            extractall(archive, partial)
            Path(partial, folder).rename(target)
        except (OSError, ValueError, RuntimeError, tarfile.TarError) as error:
            raise DataError(f"{url}: {type(error).__name__}: {error}") from error
    return find(name)


def _refuse_unsafe_members(archive: Path, folder: str) -> None:
    """`ValueError` when an archive holds a link, a device or a path that leaves `folder`."""
    with tarfile.open(archive) as tar:
        for member in tar:
            safe_extract_member(member, folder)
            if not (member.isfile() or member.isdir()):
                raise ValueError(f"neither file nor folder in the archive: {member.name}")
