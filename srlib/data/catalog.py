"""The catalogue: what is known of each data set, and where its files are.

The entries stand in `catalog.toml`. A folder that is not in there is described from its files (`srlib.data.plans`).
"""

from __future__ import annotations

import socket
import tarfile
import tempfile
import tomllib
from collections import ChainMap, Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from srlib.data import cue, mirror, virtual
from srlib.data.folders import LAYOUTS
from srlib.data.scans import Normalisation, check_normalisation
from srlib.files import DataError, cache_dir, data_roots, make_visible

MEAN = "mean of classes"  # in tables, the mean over the classes of a case; no class has this name
TASKS_OF: dict[str, Mapping[str, Any]] = {
    "cue": cue.RECIPES | cue.ALONG,
    "mirror": mirror.RECIPES,
}
STATED = ("modalities", "classes", "label_values", "spacing", "normalisation")
STALLED = 120.0  # seconds without a byte, after which a download is given up


@dataclass(frozen=True)
class Entry:
    """A data set as the catalogue describes it, or as `srlib.data.plans` found it in a folder.

    In the label maps of this library, 1, 2 and so on are `values` in this order, and 0 is background.
    Usually each class is one value. Classes of several values are *regions*, which may overlap: the
    network then has one output for each class, a sigmoid's, and none for the background.

    Raises:
        ValueError: as `check_classes`; a normalisation that is not known.
    """

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
    folder: str  # its name under a data root, or its whole path
    virtual: bool = False  # made by a computer, not measured on subjects
    layout: str = "standard"  # of the folder: a name in `srlib.data.folders.LAYOUTS`
    normalisation: tuple[Normalisation, ...] = ("scan",)  # of each modality
    label_values: tuple[tuple[int, ...], ...] = ()  # of each class, in the files; () is 1, 2, ...
    median_size: tuple[float, float, float] | None = None  # working voxels of a case, of a folder

    def __post_init__(self) -> None:
        check_classes(self.name, self.classes, self.label_values)
        if len(self.normalisation) != len(self.modalities):
            counts = f"{len(self.normalisation)} normalisations of {len(self.modalities)} channels"
            raise DataError(f"{self.name}: {counts}; expected one of each")
        for how in self.normalisation:
            check_normalisation(how)

    @property
    def in_channels(self) -> int:
        """Input channels of a network for it: one a modality."""
        return len(self.modalities)

    @property
    def out_channels(self) -> int:
        """Output channels of a network for it: one a class, and the background where classes exclude each other."""
        return len(self.classes) + (not self.regions)

    @property
    def regions(self) -> bool:
        """True when a class is a union of label values."""
        return any(len(values) > 1 for values in self.label_values)

    @property
    def values(self) -> tuple[int, ...]:
        """Label values in the files besides 0, those of the first class first."""
        found = dict.fromkeys(chain.from_iterable(self.label_values))
        return tuple(found) or tuple(range(1, len(self.classes) + 1))

    @property
    def stated(self) -> list[Any]:
        """What a training depends on besides the voxels, where that may change or has changed what is computed.

        A folder's owner may state it anew; samples on voxels of unequal edges are turned in mm, which they once were
        not. Empty for the other data sets of the catalogue, whose runs keep their identities.
        """
        unlike = self.median_size or len({*self.spacing}) > 1
        return [getattr(self, name) for name in STATED] if unlike else []

    @property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """For each class, the labels of this library's maps (not of the files) that belong to it."""
        label = {value: k for k, value in enumerate(self.values, start=1)}
        return tuple(tuple(label[v] for v in of) for of in self.label_values) or tuple(
            (k,) for k in label.values()
        )


def check_classes(where: str, names: Sequence[str], values: Sequence[tuple[int, ...]]) -> None:
    """Refuse classes that tables or figures cannot hold, or that cannot be told apart.

    Args:
        where: they are stated, for the message.
        names: of the classes.
        values: label values of each; empty for 1, 2, ...

    Raises:
        DataError: naming the class and what was expected.
    """
    for name, times in Counter(names).items():
        if not name or name != name.strip() or not name.isprintable() or "$" in name:
            why = "a name of printable characters, without $, which figures take for a formula"
        elif name == MEAN:
            why = "another name, since tables call the mean over the classes so"
        elif times > 1:
            why = "one class of a name"
        else:
            continue
        raise DataError(f"{where}: class {name!r}; expected {why}")
    if values and len(set(values)) < len(names):
        raise DataError(
            f"{where}: label values {values} of {names}; expected others for each class"
        )


def tuples(value: Any) -> Any:
    """Replace the lists in what was read from JSON or TOML by the tuples of entries and configurations."""
    if isinstance(value, list):
        return tuple(map(tuples, value))
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return value


def _entries() -> Iterator[Entry]:
    stated = tomllib.loads(Path(__file__).with_name("catalog.toml").read_text(encoding="utf-8"))
    for name, fields in stated.items():
        for task, recipe in TASKS_OF.get(name, {name: None}).items():
            title = fields["title"].format(distance=recipe.distance) if recipe else fields["title"]
            if task in cue.ALONG:
                title += f" along axis {cue.ALONG[task].axis}"
            yield Entry(task, **tuples(fields) | {"title": title})


CATALOG: dict[str, Entry] = {entry.name: entry for entry in _entries()}
# Lists leave out what only the grid `distance` asks for: opening it builds it, which takes up to a minute.
TASKS = {name: CATALOG.pop(name) for name in (*cue.ALONG, *mirror.RECIPES)}
KNOWN = ChainMap(CATALOG, TASKS)


def maker(entry: Entry) -> tuple[Any, Any]:
    """The module that makes a virtual data set, and its recipe."""
    for module, recipes in ((cue, cue.RECIPES | cue.ALONG), (mirror, mirror.RECIPES)):
        if entry.name in recipes:
            return module, recipes[entry.name]
    return virtual, virtual.RECIPE


def find(entry: Entry) -> Path:
    """The folder of a data set, which is built on the first call when it is virtual (about ten seconds).

    Raises:
        FileNotFoundError: saying where was looked and how to get it.
    """
    if entry.virtual:
        module, recipe = maker(entry)
        return module.build(cache_dir(entry.folder) / recipe_fingerprint(entry), recipe)
    if Path(entry.folder).is_absolute():
        return Path(entry.folder)
    sign = LAYOUTS[entry.layout].sign
    folders = [root / entry.folder for root in data_roots()]
    for folder in folders:
        if next(folder.glob(sign), None):
            return folder
    raise FileNotFoundError(
        f"data set {entry.name!r}: no {sign} in {', '.join(map(str, folders))}."
        f" Get it with `{entry.how_to_get}`, or unpack it in one of these places."
    )


def present() -> list[str]:
    """Names of the data sets whose files are on this machine, virtual ones apart."""
    names = []
    for name, entry in CATALOG.items():
        with suppress(FileNotFoundError):
            if not entry.virtual and find(entry):
                names.append(name)
    return names


def recipe_fingerprint(entry: Entry) -> str:
    """Short hash of what a virtual data set is made by."""
    module, recipe = maker(entry)
    return module.fingerprint(recipe)


def download(name: str) -> Path:
    """Get a data set from its official source into the first data root; return its folder.

    A command, never a side effect. MONAI knows the Decathlon's addresses and MD5 sums. The archive
    is verified, refused as a whole if a member is a link or would land outside, unpacked beside its
    place and renamed: what is in place is complete.

    Raises:
        DataError: naming the address and what went wrong; nothing is left behind.
        ValueError: no name in the catalogue.
    """
    from monai.apps import DecathlonDataset, download_url, extractall

    if name not in CATALOG:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(CATALOG)}")
    entry = CATALOG[name]
    with suppress(FileNotFoundError):
        return find(entry)
    if entry.folder not in DecathlonDataset.resource:
        raise DataError(f"{name} cannot be downloaded by a program: {entry.how_to_get}")
    target = data_roots()[0] / entry.folder
    if target.exists():
        raise DataError(f"{target} exists but holds no dataset.json: move it away first")
    target.parent.mkdir(parents=True, exist_ok=True)
    url = DecathlonDataset.resource[entry.folder]
    before = socket.getdefaulttimeout()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as partial:
        archive = Path(partial, f"{entry.folder}.tar")
        try:
            socket.setdefaulttimeout(STALLED)
            md5 = DecathlonDataset.md5[entry.folder]
            download_url(url, archive, hash_val=md5, hash_type="md5")
            _refuse_unsafe_members(archive, partial)
            extractall(archive, partial)
            make_visible(Path(partial, entry.folder), target)
        except (OSError, ValueError, RuntimeError, tarfile.TarError) as error:
            raise DataError(f"{url}: {type(error).__name__}: {error}") from error
        finally:
            socket.setdefaulttimeout(before)
    return find(entry)


def _refuse_unsafe_members(archive: Path, folder: str) -> None:
    """`ValueError` when an archive holds a link, a device or a path that leaves `folder`."""
    from monai.apps.utils import safe_extract_member

    with tarfile.open(archive) as tar:
        for member in tar:
            safe_extract_member(member, folder)
            if not (member.isfile() or member.isdir()):
                raise ValueError(f"neither file nor folder in the archive: {member.name}")
