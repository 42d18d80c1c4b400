"""nnU-Net's own trainer beside SegResMamba's, on one data set: does it pay to have Mamba layers there?

The trainings are nnU-Net's (nnunetv2), one after the other, each by its recipe (`nnunet_trainers`). Each is done once:
what was interrupted, also by `kill -9`, goes on after its last epoch. Their masks of the held-out cases are scored by
nnU-Net, and compared case by case by `srlib.study.statistics`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch

from srlib import data, machine
from srlib.data import labels, scans
from srlib.data.cases import FOLDS
from srlib.data.catalog import MEAN
from srlib.files import DataError, atomic_folder, atomic_path, locked, results_root, slug
from srlib.net.model import FEATURES
from srlib.study import statistics

TRAINERS = Path(__file__).with_name("nnunet_trainers")
SYSTEMS = {
    "nnU-Net": "nnUNetTrainerOwn",
    "SegResMamba": "nnUNetTrainerSegResMamba",
    "no ToM": "nnUNetTrainerSegResMambaNoToM",
    "convolution for ToM": "nnUNetTrainerSegResMambaConvForToM",
}
REFERENCE = "SegResMamba"
CONFIGURATION, PLANS = "3d_fullres", "nnUNetPlans"
Splits = list[dict[str, tuple[str, ...]]]  # as nnU-Net's splits_final.json
ITERATIONS = 250  # of an epoch, as nnU-Net's


def compare(
    dataset: str,
    folds: Sequence[int],
    epochs: int,
    iterations: int = ITERATIONS,
    size: str = "paper",
) -> tuple[Path, pd.DataFrame, pd.DataFrame]:
    """Train what is not trained yet, and compare.

    Args:
        dataset: number or name of one of nnU-Net's data sets; or a name in srlib's catalogue or a folder of scans,
            which is made one of nnU-Net's, with srlib's folds.
        folds: that are held out, one training each.
        epochs: of each training.
        iterations: of an epoch.
        size: of SegResMamba, a name in `srlib.net.model.FEATURES`.

    Returns:
        The folder of nnU-Net's results that two tables are written to, each beside the device and versions of the
        last command; the table of cases, with the minutes of each training's epochs; and that of
        `srlib.study.statistics.compare`: each system minus SegResMamba in Dice, the mean of the classes.

    Raises:
        ImportError: nnunetv2 is not installed.
        ValueError: an unknown size, a fold that the data set does not have, or `SRLIB_DEVICE` with another GPU than
            the first, which nnU-Net would not take.
        srlib.files.DataError: there is no such data set, its classes overlap, it is not what was converted before,
            somebody's preprocessed cases are not complete, or the trainings of a fold held out different cases.
    """
    if size not in FEATURES:
        raise ValueError(f"size {size!r} is not one of {', '.join(FEATURES)}")
    if find_spec("nnunetv2") is None:
        raise ImportError('nnU-Net needs the extra "nnunet": pip install -e ".[nnunet]"')
    if not folds or min(folds) < 0:
        raise ValueError(f"{dataset}: folds {list(folds)}; expected some of 0, 1, ...")
    if machine.device().index:
        raise ValueError(
            f"SRLIB_DEVICE={machine.device()}: nnU-Net takes the first GPU; expected CUDA_VISIBLE_DEVICES to choose one"
        )
    name = prepare(dataset, folds)
    budget = f"_{epochs}epochs" + (f"_{iterations}iterations" if iterations != ITERATIONS else "")
    endings = {own: ("" if own == "nnU-Net" or size == "paper" else f"_{size}") for own in SYSTEMS}
    results = place("results") / name
    rows: list[dict[str, Any]] = []
    for fold in folds:
        for system, trainer in SYSTEMS.items():
            full = f"{trainer}{endings[system]}{budget}"
            train(name, full, fold)
            about = {"system": system, "fold": fold, "seed": 0}
            place_of = results / f"{full}__{PLANS}__{CONFIGURATION}" / f"fold_{fold}"
            about |= {"steps": epochs * iterations, "minutes": minutes(place_of)}
            rows += [about | row for row in scores(place_of)]
    cases = pd.DataFrame(rows)
    if (cases.groupby(["fold", "case", "class"]).size() != len(SYSTEMS)).any():
        raise DataError(
            f"{results}: trainings of a fold held out different cases; remove those of a former split"
        )
    what = f"{size}{budget}_fold{'-'.join(map(str, sorted({*folds})))}"
    machine.write_table(cases, results / f"cases_{what}.csv")
    table = statistics.compare(cases, REFERENCE, ["dice"], [MEAN])
    machine.write_table(table, results / f"comparison_{what}.csv")
    return results, cases, table


def place(kind: str) -> Path:
    """The folder `nnUNet_raw`, `_preprocessed` or `_results`: the variable's, or one in srlib's results."""
    variable = f"nnUNet_{kind}"
    return Path(os.environ.setdefault(variable, str(results_root() / "nnunet" / kind)))


def prepare(dataset: str, folds: Sequence[int] = ()) -> str:
    """Make a data set ready for training: raw files, plans and preprocessed cases of nnU-Net; return its name.

    What somebody else has planned or preprocessed is used as it is. Folds that there are not are refused first.
    """
    for kind in ("raw", "preprocessed", "results"):
        place(kind).mkdir(parents=True, exist_ok=True)
    os.environ.update(nnUNet_extTrainer=str(TRAINERS))
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    splits: Splits = []
    if re.fullmatch(r"\d+|Dataset\d{3}_.*", dataset):
        try:
            name = maybe_convert_to_dataset_name(int(dataset) if dataset.isdigit() else dataset)
        except RuntimeError as error:  # none of this number, or several
            raise DataError(f"{dataset}: {error}") from error
    else:
        name, splits = convert(dataset)
    file = place("raw") / name / "dataset.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        _ = about["labels"].values(), about["file_ending"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}: expected labels and file_ending, as nnU-Net v2 has ({error})"
        ) from error
    if not all(isinstance(value, int) for value in about["labels"].values()):
        raise DataError(f"{dataset}: its classes overlap; expected classes that exclude each other")
    folder = place("preprocessed") / name
    final = folder / "splits_final.json"  # nnU-Net makes five without
    number = len(splits or (json.loads(final.read_text()) if final.is_file() else range(FOLDS)))
    if wrong := sorted({*folds} - {*range(number)}):  # nnU-Net would take cases at random
        raise ValueError(f"{dataset}: fold {wrong[0]} is not one of 0 to {number - 1}")
    ready, begun = (folder / f"{word}-{CONFIGURATION}" for word in ("ready", "begun"))
    with locked(folder):
        if ready.is_file():
            return name
        plans, cases = _planned(folder)
        to_plan = plans is None or (begun.is_file() and begun.read_text() == "plans")
        if begun.is_file() or not cases.is_dir():  # nnU-Net deletes what is there
            with atomic_path(begun) as temporary:
                temporary.write_text("plans" if to_plan else "cases")
            number, processes = int(name[7:10]), min(8, os.cpu_count() or 1)
            if to_plan:
                api.extract_fingerprints([number], num_processes=processes)
                api.plan_experiments([number])
            api.preprocess([number], configurations=(CONFIGURATION,), num_processes=(processes,))
        else:
            ids = [
                f.name.removesuffix(about["file_ending"])
                for f in (file.parent / "labelsTr").iterdir()
            ]
            lacking = [i for i in sorted(ids) if not (cases / f"{i}.pkl").is_file()]
            if to_plan or lacking:
                raise DataError(
                    f"{cases}: expected {plans or f'{PLANS}.json beside it'} and every training case"
                    f"{f' (lacks {lacking[0]})' if lacking else ''}: finish it by nnUNetv2_preprocess, or remove it"
                )
        if splits:
            with atomic_path(final) as temporary:
                temporary.write_text(json.dumps(splits))
        with atomic_path(ready):
            pass
    return name


def _planned(folder: Path) -> tuple[Path | None, Path]:
    """The plans that a data set has, and the folder of its preprocessed cases, whoever made them."""
    plans, cases = folder / f"{PLANS}.json", f"{PLANS}_{CONFIGURATION}"
    if not plans.is_file():
        return None, folder / cases
    try:
        found = json.loads(plans.read_text(encoding="utf-8"))["configurations"][CONFIGURATION]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{plans}: expected plans with {CONFIGURATION} ({error})") from error
    return plans, folder / found.get("data_identifier", cases)


def convert(dataset: str) -> tuple[str, Splits]:
    """Write a data set of srlib's as one of nnU-Net's, once.

    Returns:
        Its name, and srlib's folds in the form of nnU-Net's `splits_final.json`.
    """
    path = Path(dataset)
    opened = data.open(str(path.resolve()) if path.is_dir() else dataset)
    entry = opened.entry
    if entry.regions:
        raise DataError(f"{dataset}: its classes overlap; expected classes that exclude each other")
    title = slug(entry.name).replace("_", "-")
    name = f"Dataset{500 + zlib.crc32(entry.name.encode()) % 500}_{title}"
    ids = [case.id for case in opened.cases]
    folds = range(min(FOLDS, len(ids)))
    splits = [{"train": s.train, "val": s.test} for s in map(opened.split, folds)]
    classes = {title: number for number, title in enumerate(("background", *entry.classes))}
    channels = {str(number): title for number, title in enumerate(entry.modalities)}
    about = {"channel_names": channels, "labels": classes, "fingerprint": opened.fingerprint}
    about |= {"numTraining": len(ids), "file_ending": ".nii.gz"}
    folder = place("raw") / name
    if folder.is_dir():
        known = None
        with suppress(OSError, ValueError):
            known = json.loads((folder / "dataset.json").read_text())
        if known != about:
            raise DataError(
                f"{folder}: was made of other cases, channels or classes than {dataset} has now; expected the same,"
                f" or this folder and {place('preprocessed') / name} removed"
            )
        return name, splits
    with atomic_folder(folder) as made:
        for part in ("imagesTr", "labelsTr"):
            (made / part).mkdir()
        for case in opened.cases:
            images, label = scans.read_case(case.images, case.label, entry.in_channels)
            for number, scan in enumerate(images):
                file = made / "imagesTr" / f"{case.id}_{number:04d}.nii.gz"
                nib.save(nib.Nifti1Image(scan.array, scan.affine), file)
            encoded = nib.Nifti1Image(labels.encode(label.array, entry), label.affine)
            nib.save(encoded, made / "labelsTr" / f"{case.id}.nii.gz")
        (made / "dataset.json").write_text(json.dumps(about, indent=1))
    return name, splits


def load_lazy_modules() -> None:
    """Load what modules load when they are asked where they come from.

    nnU-Net asks all of them while it goes through `sys.modules`, which must not grow then.
    """
    count = 0
    while count != len(sys.modules):
        count = len(sys.modules)
        for module in list(sys.modules.values()):
            with suppress(Exception):  # a lazy module of a package that is not installed
                if getattr(module, "__file__", None) is None:
                    list(getattr(module, "__path__", None) or ())


def train(name: str, trainer: str, fold: int) -> None:
    """Train one fold, or go on with it, or only score it; nothing where that was done, or another process does it."""
    from nnunetv2.run.run_training import run_training

    folder = place("results") / name / f"{trainer}__{PLANS}__{CONFIGURATION}" / f"fold_{fold}"
    with locked(folder):
        if summary(folder):
            return
        trained = (folder / "checkpoint_final.pth").is_file()
        begun = any(folder.glob("checkpoint_*.pth"))
        load_lazy_modules()
        run_training(
            name,
            CONFIGURATION,
            fold,
            trainer,
            PLANS,
            continue_training=begun and not trained,
            only_run_validation=trained,
            device=torch.device(machine.device().type),
        )


def summary(fold: Path) -> list[dict[str, Any]]:
    """nnU-Net's scores of the held-out cases; none where there are none yet, or only the beginning of a file."""
    with suppress(OSError, ValueError, KeyError):
        return json.loads((fold / "validation" / "summary.json").read_text())["metric_per_case"]
    return []


def minutes(fold: Path) -> float:
    """Minutes of a training's epochs, as nnU-Net's logs have them."""
    logs = "".join(file.read_text() for file in fold.glob("training_log_*.txt"))
    return sum(map(float, re.findall(r"Epoch time: ([\d.]+) s", logs))) / 60


def scores(fold: Path) -> Iterator[dict[str, Any]]:
    """Dice of each held-out case and class, from what nnU-Net wrote; 1 where neither mask has the class."""
    about = json.loads((fold.parent / "dataset.json").read_text())
    names = {str(number): name for name, number in about["labels"].items()}
    for case in summary(fold):
        for label, found in case["metrics"].items():
            dice = 1.0 if np.isnan(found["Dice"]) else found["Dice"]
            file = Path(case["prediction_file"]).name
            yield {
                "case": file.removesuffix(about["file_ending"]),
                "class": names[label],
                "dice": dice,
            }
