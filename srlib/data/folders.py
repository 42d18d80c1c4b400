"""Layouts of folders: which cases a folder holds, in which files, and what it states of them.

| layout | files |
|---|---|
| `standard` | the Decathlon's and nnU-Net's: `dataset.json`, `imagesTr/`, `labelsTr/`; or `images/` and `labels/` |
| `brats` | as BraTS 2021 is distributed: `BraTS2021_00000/BraTS2021_00000_flair.nii.gz`, and so on |
| `btcv` | as BTCV's `RawData.zip` unpacks: `RawData/Training/img/img0001.nii.gz`, `.../label/label0001.nii.gz` |

A label and its image have one name, up to their endings. Several channels of a case are one 4D NIfTI
file that `dataset.json` states the channels of, or files whose names end in `_0000`, `_0001`, ...
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from glob import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

from srlib.data.scans import CHANNEL, stem
from srlib.files import DataError

PAIRS = (("imagesTr", "labelsTr"), ("images", "labels"))
LONGEST_NAME = 200  # bytes: files made from a case are named by it, and systems allow 255


class Case(NamedTuple):
    """Files of one labelled case."""

    id: str
    images: tuple[Path, ...]  # one a channel, or one for all
    label: Path

    @property
    def image(self) -> Path:
        """The first image."""
        return self.images[0]

    @property
    def files(self) -> tuple[Path, ...]:
        """All its files."""
        return (*self.images, self.label)


class Contents(NamedTuple):
    """Content of a folder: its cases and what it states of them."""

    cases: tuple[Case, ...]  # in the order of their ids
    modalities: tuple[str, ...] = ()  # empty when nothing is stated
    classes: dict[str, tuple[int, ...]] = {}  # noqa: RUF012 - label values of each; empty when nothing is stated


class Layout(NamedTuple):
    """A layout: a pattern that matches something in the folder, and its reader."""

    sign: str
    read: Callable[[Path], Contents]


def standard(folder: Path) -> Contents:
    """Read a folder as the table above says; `dataset.json` may be missing where images and labels pair up.

    Raises:
        DataError: no such layout, a broken `dataset.json`, no cases, an image or a label without its
            partner, two cases of one name, a name that is too long.
    """
    index = folder / "dataset.json"
    stated = _stated(index) if index.is_file() else {}
    pairs = [(folder / a, folder / b) for a, b in PAIRS if (folder / b).is_dir()]
    try:
        if "training" in stated:
            cases = [_listed(folder, item) for item in stated["training"]]
        elif "dataset" in stated:  # nnU-Net's second version, where files lie elsewhere
            cases = [
                Case(
                    name,
                    tuple(folder / image for image in _listed_names(of["images"])),
                    folder / of["label"],
                )
                for name, of in stated["dataset"].items()
            ]
        elif pairs:
            cases = _paired(*pairs[0])
        else:
            raise DataError(
                f"{folder}: expected imagesTr/ and labelsTr/, images/ and labels/,"
                " or a dataset.json that lists the cases"
            )
        return Contents(_sorted(cases, index if stated else folder), *_meaning(stated))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, DataError | UnicodeEncodeError):
            raise
        raise DataError(f"{index}: not as the Decathlon or nnU-Net write it: {error!r}") from error


def brats(folder: Path) -> Contents:
    """BraTS 2021's training data, one folder a case."""
    names = sorted(p.name for p in folder.glob("BraTS2021_*") if p.is_dir())
    cases = [
        Case(
            name,
            tuple(folder / name / f"{name}_{k}.nii.gz" for k in ("flair", "t1", "t1ce", "t2")),
            folder / name / f"{name}_seg.nii.gz",
        )
        for name in names
    ]
    return Contents(_sorted(cases, folder))


def btcv(folder: Path) -> Contents:
    """BTCV's training data, 30 cases."""
    training = folder / "RawData" / "Training"
    images = sorted(training.glob("img/img*.nii.gz"))
    cases = [
        Case(stem(image), (image,), training / "label" / image.name.replace("img", "label", 1))
        for image in images
    ]
    return Contents(_sorted(cases, training))


LAYOUTS = {
    "standard": Layout("dataset.json", standard),
    "brats": Layout("BraTS2021_*", brats),
    "btcv": Layout("RawData/Training/img", btcv),
}


def _stated(index: Path) -> dict[str, Any]:
    try:
        stated = json.loads(index.read_text(encoding="utf-8-sig"), object_pairs_hook=_distinct)
    except ValueError as error:
        raise DataError(f"{index}: expected JSON: {error}") from error
    if not isinstance(stated, dict):
        raise DataError(f"{index}: expected an object with 'labels' and more")
    return stated


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a name that comes twice, as of two classes, Python alone would keep the last."""
    for name, times in Counter(name for name, _ in pairs).items():
        if times > 1:
            raise ValueError(f"{name!r} comes {times} times")
    return dict(pairs)


def _meaning(stated: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """Modalities and label values of the classes, as the Decathlon or nnU-Net state them."""
    channels = stated.get("channel_names", stated.get("modality", {}))
    modalities = tuple(str(channels[key]) for key in sorted(channels, key=int))
    classes = {}
    named = stated.get("labels", {})
    for name, values in named.items():
        if "background" not in named and str(name).isdigit() and isinstance(values, str):
            # the Decathlon's order: value, name
            name, values = ("background" if name == "0" else values), int(name)
        if name == "ignore":
            raise ValueError("the label 'ignore' is not supported")
        if name in classes:
            raise ValueError(f"two classes of the name {name!r}")
        classes[name] = tuple(map(_whole, values if isinstance(values, list) else [values]))
        if classes[name] != (0,) if name == "background" else 0 in classes[name]:
            raise ValueError(
                f"class {name!r} has the value {values}; expected 0 for 'background' alone"
            )
    classes.pop("background", None)
    return modalities, classes


def _listed_names(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _whole(value: Any) -> int:
    """A label value, which JSON may hold as text."""
    with suppress(ValueError):
        if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
            return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise ValueError(f"the label value {value!r}; expected a whole number")


def _listed(folder: Path, item: dict[str, str]) -> Case:
    """A case of the list in `dataset.json`; nnU-Net's first version leaves out the channels' numbers."""
    image, label = folder / item["image"], folder / item["label"]
    names = f"{escape(stem(image))}_[0-9][0-9][0-9][0-9].*"
    numbered = [] if image.exists() else sorted(image.parent.glob(names))
    return Case(stem(label), tuple(numbered) or (image,), label)


def _paired(images: Path, labels: Path) -> list[Case]:
    """Cases of two folders, by the files' names."""
    if not images.is_dir():
        raise DataError(f"{images}: no such folder beside {labels}")
    by_name = _by_name(images)
    channels: dict[str, list[Path]] = defaultdict(list)
    for name, path in by_name.items():
        channels[CHANNEL.sub("", name)].append(path)
    cases, used = [], set()
    for name, label in _by_name(labels).items():
        files = [by_name[name]] if name in by_name else sorted(channels[name])
        if not files:
            likes = [
                other for other in by_name if normalize("NFC", other) == normalize("NFC", name)
            ]
            spelt = f"; {likes[0]!a} there is another spelling of {name!a}" if likes else ""
            raise DataError(f"{label}: no image of this name in {images}{spelt}")
        if name not in by_name and stem(files[-1]) != f"{name}_{len(files) - 1:04d}":
            got = ", ".join(file.name for file in files)
            raise DataError(
                f"{label}: expected images {name}_0000, {name}_0001 and so on; got {got}"
            )
        used |= set(files)
        cases.append(Case(name, tuple(files), label))
    if left := set(by_name.values()) - used:
        raise DataError(f"{min(left)}: no label of this name in {labels}")
    return cases


def _by_name(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        name = stem(path)
        if not name or path.name.startswith("."):
            continue
        str(path).encode()  # a name that is not UTF-8 ends it here
        if name in found:
            raise DataError(f"{path} and {found[name].name}: two files of one name")
        found[name] = path
    return found


def _sorted(cases: Iterable[Case], where: Path) -> tuple[Case, ...]:
    ordered = tuple(sorted(cases))
    if not ordered:
        raise DataError(f"{where}: no labelled cases")
    for case, following in pairwise(ordered):
        if case.id == following.id:
            raise DataError(f"{where}: two of one name among the cases: {case.id}")
    for case in ordered:
        if not case.id or len(case.id.encode()) > LONGEST_NAME:
            raise DataError(
                f"{case.label}: expected the name of a scan with at most {LONGEST_NAME} bytes"
            )
        if case.id in (".", "..") or Path(case.id).name != case.id:  # files are named by it
            raise DataError(f"{where}: the case {case.id!r}; expected a name, not a path")
    return ordered
