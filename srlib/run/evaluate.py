"""Evaluation of a finished run: one tidy table, a row for each held-out case and class.

| column | meaning | unit | `monai.metrics` |
|---|---|---|---|
| `dice` | overlap of prediction P and reference R, 2 #(P and R) / (#P + #R) | 1 | `compute_dice` |
| `nsd` | share of both surfaces within the data set's tolerance | 1 | `compute_surface_dice` |
| `hd95` | 95th percentile of the surface distance | mm | `compute_hausdorff_distance` |
| `sensitivity` | share of R that is labelled as it, #(P and R) / #R | 1 | `compute_confusion_matrix_metric` |
| `volume_ref_ml`, `volume_pred_ml` | volumes | ml | voxels times voxel volume |

Where a structure is empty these are not defined; the values are then set, so that no case falls
out of a mean: both empty - Dice, NSD and sensitivity 1, HD95 0; one of them empty - Dice, NSD and sensitivity 0,
HD95 the diagonal of the image.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from monai.metrics import (
    compute_confusion_matrix_metric,
    compute_dice,
    compute_hausdorff_distance,
    compute_surface_dice,
    get_confusion_matrix,
)
from monai.metrics.utils import get_mask_edges, get_surface_distance
from torch import Tensor, nn
from tqdm.auto import tqdm

from srlib import data, tables
from srlib.data.catalog import MEAN
from srlib.data.labels import class_masks
from srlib.files import RECIPE, atomic_path, cached_json, load_json, save_json
from srlib.run.predict import scores_by_slab
from srlib.run.runs import RunConfig, open_data, run_dir, run_id
from srlib.run.train import load_trained, require_same_data, restore

METRICS = ("dice", "nsd", "hd95")
BINS = 10  # of probabilities


def evaluate(
    config: RunConfig, progress: bool | None = None, checkpoint: Path | None = None
) -> pd.DataFrame:
    """Predict and score the held-out cases of a finished run.

    The table is kept as `metrics.csv` in the run's folder, the label maps beside it as `predictions/<case>.nii.gz`
    on the working grid; neither is computed twice for the same code, weights and data, also of a run that was killed.

    Args:
        config: a run that `srlib.run.train.train` has finished.
        progress: show a bar; `None` shows it in a terminal only.
        checkpoint: the trained network's file, where that is not the run's here; `scores_folder` says where the
            table goes.

    Returns:
        Columns `case`, `class`, `dice`, `nsd`, `hd95` (mm), `sensitivity`, `volume_ref_ml`, `volume_pred_ml`.

    Raises:
        srlib.files.DataError: the data set, its classes or the held-out cases are not those of the training.
    """
    network = checkpoint or run_dir(config) / "model.safetensors"
    folder = scores_folder(network)
    scores_file, table_file = folder / "evaluation.json", folder / "metrics.csv"
    trained, dataset = load_trained(network), open_data(config)
    require_same_data(trained, network)
    entry = dataset.entry
    cases = list(trained.split.test[: config.test_cases])
    weights = hashlib.sha256(network.read_bytes()).hexdigest()
    made_with: dict[str, Any] = {"recipe": RECIPE, "network": weights, "cases": cases}
    made_with["data"] = trained.fingerprint
    found = cached_json(scores_file, lambda: {"made_with": made_with, "rows": []})
    rows: list[dict] = found["rows"] if found["made_with"] == made_with else []
    missing = [case_id for case_id in cases if case_id not in {row["case"] for row in rows}]

    if missing:
        model = restore(trained, network)
    hidden = not missing or (None if progress is None else not progress)
    for case_id in tqdm(missing, desc="evaluation", disable=hidden):
        case = dataset.load(case_id)
        labels = predict(model, case["image"], config.patch_size)
        with atomic_path(folder / "predictions" / f"{case_id}.nii.gz") as temporary:
            nib.save(nib.Nifti1Image(labels.numpy(), np.asarray(case["affine"])), temporary)
        about = (entry.spacing, entry.classes, entry.nsd_tolerance, entry.members)
        scores = score(labels, case["label"][0], *about)
        require_same_data(trained, network)  # also now that the case has been read
        rows += [{"case": case_id, **row} for row in scores]
        save_json(scores_file, {"made_with": made_with, "rows": rows})
    tables.write(pd.DataFrame(rows), table_file, digits=None)
    return tables.read_scores(table_file)


def scores_folder(network: Path) -> Path:
    """Where `evaluate` writes: beside `model.safetensors`, for a file of another NAME into the folder `NAME.scores`."""
    own = network.with_name(f"{network.name}.scores")  # a folder may hold several networks
    return network.parent if network.name == "model.safetensors" else own


def stored_scores(network: Path) -> pd.DataFrame | None:
    """The table that `evaluate` wrote of a network's file; `None` unless it is whole and of these very weights."""
    file = scores_folder(network) / "evaluation.json"
    if not file.is_file():
        return None
    found = load_json(file)
    table, made_with = pd.DataFrame(found["rows"]), found["made_with"]
    same = made_with.get("network") == hashlib.sha256(network.read_bytes()).hexdigest()
    return table if same and set(made_with["cases"]) <= {*table.get("case", ())} else None


def test_cases(config: RunConfig) -> list[str]:
    """The held-out cases that a run is evaluated on: its fold's, cut to `config.test_cases`."""
    return list(data.open(config.dataset).split(config.fold).test[: config.test_cases])


def load_prediction(config: RunConfig, case_id: str) -> Tensor:
    """The label map (D, H, W) that `evaluate` stored for a held-out case."""
    file = run_dir(config) / "predictions" / f"{case_id}.nii.gz"
    if not file.is_file():
        raise FileNotFoundError(
            f"run {run_id(config)} has no prediction for case {case_id!r}: {file}"
        )
    return torch.from_numpy(np.asarray(nib.load(file).dataobj, dtype=np.uint8))  # type: ignore[attr-defined]


def predict(model: nn.Module, image: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Segment one preprocessed image by overlapping windows (half a patch apart, Gaussian weights).

    Args:
        model: network in eval mode.
        image: (C, D, H, W), float.
        patch_size: window (D, H, W); a smaller image is padded with zeros, its mean after normalisation.

    Returns:
        Label map (D, H, W), uint8, on the CPU.
    """
    slabs = _scores(model, image, patch_size)
    return torch.cat([scores.argmax(0).to(torch.uint8).cpu() for scores in slabs])


def probabilities(model: nn.Module, image: Tensor, patch_size: Sequence[int]) -> Tensor:
    """The probability of each class, background first, (K+1, D, H, W), on the CPU; `predict` takes the largest."""
    slabs = _scores(model, image, patch_size)
    return torch.cat([scores.softmax(0).cpu() for scores in slabs], dim=1)


def _scores(model: nn.Module, image: Tensor, patch_size: Sequence[int]) -> Iterator[Tensor]:
    """Slabs (K+1, d, H, W) along the first axis, averaged over the windows, on the model's device."""
    return scores_by_slab(model, image, patch_size, next(model.parameters()).device)


def score(
    prediction: Tensor,
    reference: Tensor,
    spacing: Sequence[float],
    classes: Sequence[str],
    tolerance: float,
    members: Sequence[Sequence[int]] | None = None,
) -> list[dict]:
    """Metrics of one label map against its reference, one row a class.

    Args:
        prediction: label map (D, H, W); 0 is background.
        reference: label map (D, H, W).
        spacing: voxel size (mm).
        classes: their names.
        tolerance: of the NSD (mm).
        members: labels that make up each class, which may overlap; `None` means that class k is label k + 1.
    """
    if prediction.shape != reference.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and reference {tuple(reference.shape)} differ in shape"
        )
    members = members or [(k + 1,) for k in range(len(classes))]
    pred, ref = (  # (D, H, W) -> (1, K, D, H, W)
        class_masks(labels[None, None], members).long() for labels in (prediction, reference)
    )
    with warnings.catch_warnings():  # of empty structures, which are handled below
        for words in (r".*is all 0, this may result in nan/inf", r".*always_return_as_numpy"):
            warnings.filterwarnings("ignore", message=words)
        tolerances = [tolerance] * len(classes)
        surfaces: dict[str, Any] = {"include_background": True, "spacing": tuple(spacing)}
        sensitivity = ("sensitivity", get_confusion_matrix(pred, ref))
        metrics = {
            "dice": compute_dice(pred, ref)[0],
            "nsd": compute_surface_dice(pred, ref, tolerances, **surfaces)[0],
            "hd95": compute_hausdorff_distance(pred, ref, percentile=95, **surfaces)[0],
            "sensitivity": compute_confusion_matrix_metric(*sensitivity)[0],
        }

    voxel_ml = math.prod(spacing) / 1000
    diagonal = math.hypot(*(n * mm for n, mm in zip(reference.shape, spacing, strict=True)))
    rows = []
    for k, name in enumerate(classes):
        n_pred, n_ref = int(pred[0, k].sum()), int(ref[0, k].sum())
        values = {metric: float(of_class[k]) for metric, of_class in metrics.items()}
        if n_pred == 0 or n_ref == 0:
            missed = n_pred != n_ref
            values = dict.fromkeys(values, 1.0 - missed) | {"hd95": diagonal * missed}
        volumes = {"volume_ref_ml": n_ref * voxel_ml, "volume_pred_ml": n_pred * voxel_ml}
        rows.append({"class": name, **values, **volumes})
    return rows


def summarise(table: pd.DataFrame, metrics: Sequence[str] = METRICS) -> pd.DataFrame:
    """Spread over cases, one row a class and metric: n, mean, sd, median, min, max.

    The class `MEAN` is the mean over classes within each case, then summarised over cases.
    """
    per_case = table.groupby("case", sort=False)[list(metrics)].mean().assign(**{"class": MEAN})
    long = pd.concat([table, per_case.reset_index()]).melt("class", list(metrics), "metric")
    spread = long.groupby(["class", "metric"], sort=False)["value"]
    return spread.agg(["count", "mean", "std", "median", "min", "max"]).reset_index()


def probability_bins(
    probabilities: Tensor, reference: Tensor, classes: Sequence[str]
) -> pd.DataFrame:
    """The voxels of one case sorted by the probability of a class: what a reliability diagram needs.

    Args:
        probabilities: (K+1, D, H, W), background first.
        reference: label map (D, H, W).
        classes: names; `classes[k]` has label value k + 1.

    Returns:
        A row for each class and each of `BINS` bins of equal width, from 0 to 1: `class`, `bin`, `voxels`, and the sums
        over these of the class's probability, `predicted`, and of the voxels that are of the class, `observed`. Sums of
        cases may be added.
    """
    tables = []
    for k, name in enumerate(classes, start=1):
        said, found = probabilities[k].double().flatten(), (reference == k).double().flatten()
        sums = {
            column: np.histogram(said, BINS, (0, 1), weights=weights)[0]
            for column, weights in (("voxels", None), ("predicted", said), ("observed", found))
        }
        tables.append(pd.DataFrame({"class": name, "bin": range(BINS), **sums}))
    return pd.concat(tables, ignore_index=True)


def surface_distances(
    prediction: Tensor, reference: Tensor, spacing: Sequence[float]
) -> np.ndarray:
    """Distance of each voxel of a predicted surface from the reference's, MONAI's as in HD95.

    Args:
        prediction: one structure (D, H, W), bool.
        reference: the same one (D, H, W), bool.
        spacing: voxel size (mm).

    Returns:
        (D, H, W) in mm, positive outside the reference and negative inside; NaN off the predicted surface.

    Raises:
        ValueError: one of them is empty.
    """
    if not (prediction.any() and reference.any()):
        raise ValueError("an empty structure has no surface")
    ours, theirs = get_mask_edges(prediction.numpy(), reference.numpy(), crop=False)
    far = get_surface_distance(ours, theirs, spacing=tuple(spacing))
    distances = np.full(ours.shape, np.nan)
    distances[ours] = np.where(reference.numpy()[ours], -far, far)
    return distances
