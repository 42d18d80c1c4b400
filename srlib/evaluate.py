"""Evaluation of a finished run: one tidy table, a row for each held-out case and class.

| column | meaning | unit | `monai.metrics` |
|---|---|---|---|
| `dice` | overlap of prediction P and reference R, 2 #(P and R) / (#P + #R) | 1 | `compute_dice` |
| `nsd` | share of both surfaces within the data set's tolerance | 1 | `compute_surface_dice` |
| `hd95` | 95th percentile of the surface distance | mm | `compute_hausdorff_distance` |
| `volume_ref_ml`, `volume_pred_ml` | volumes | ml | voxels times voxel volume |

Where a structure is empty these are not defined; the values are then set, so that no case falls
out of a mean: both empty - Dice 1, NSD 1, HD95 0; one of them empty - Dice 0, NSD 0, HD95 the
diagonal of the image.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from monai.inferers import sliding_window_inference
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from torch import Tensor, nn
from torch.nn.functional import one_hot
from tqdm.auto import tqdm

from srlib import data
from srlib.paths import atomic_path
from srlib.runs import RunConfig, run_dir, run_id, source_hash
from srlib.train import load_model

METRICS = ("dice", "nsd", "hd95")


def evaluate(config: RunConfig, progress: bool | None = None) -> pd.DataFrame:
    """Predict and score the held-out cases of a finished run.

    The table is kept as `metrics.csv` in the run's folder, the label maps beside it as `predictions/<case>.nii.gz`
    on the working grid; neither is computed twice for the same code.

    Args:
        config: a run that `srlib.train.train` has finished.
        progress: show a bar; `None` shows it in a terminal only.

    Returns:
        Columns `case`, `class`, `dice`, `nsd`, `hd95` (mm), `volume_ref_ml`, `volume_pred_ml`.
    """
    folder = run_dir(config)
    dataset = data.get(config.dataset)
    cases = test_cases(config)
    made_with = {"sources": source_hash(("evaluate.py",)), "cases": cases}
    stamp, table_file = folder / "evaluation.json", folder / "metrics.csv"
    if stamp.is_file() and json.loads(stamp.read_text()) == made_with:
        return pd.read_csv(table_file, dtype={"case": str})

    model = load_model(config)
    rows: list[dict] = []
    for case_id in tqdm(
        cases, desc="evaluation", disable=None if progress is None else not progress
    ):
        case = data.load_case(config.dataset, case_id)
        prediction = predict(model, case["image"], config.patch_size)
        _save_labels(prediction, case["affine"], folder / "predictions" / f"{case_id}.nii.gz")
        scores = score(
            prediction, case["label"][0], dataset.spacing, dataset.classes, dataset.nsd_tolerance
        )
        rows += [{"case": case_id, **row} for row in scores]
    table = pd.DataFrame(rows)
    with atomic_path(table_file) as temporary:
        table.to_csv(temporary, index=False)
    with atomic_path(stamp) as temporary:
        temporary.write_text(json.dumps(made_with))
    return pd.read_csv(
        table_file, dtype={"case": str}
    )  # the same rounding whether it was cached or not


def test_cases(config: RunConfig) -> list[str]:
    """The held-out cases that a run is evaluated on: its fold's, cut to `config.test_cases`."""
    return list(data.split(config.dataset, config.fold).test[: config.test_cases])


@torch.inference_mode()
def predict(model: nn.Module, image: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Segment one preprocessed image by overlapping windows (half a patch apart, Gaussian weights).

    Args:
        model: network in eval mode.
        image: (C, D, H, W), float.
        patch_size: window (D, H, W); a smaller image is padded with zeros, its mean after normalisation.

    Returns:
        Label map (D, H, W), uint8, on the CPU.
    """
    model_device = next(model.parameters()).device
    logits = sliding_window_inference(
        image[None].to(model_device),
        roi_size=tuple(patch_size),
        sw_batch_size=1,
        predictor=model,
        overlap=0.5,
        mode="gaussian",
    )
    return logits[0].argmax(0).to(torch.uint8).cpu()


def score(
    prediction: Tensor,
    reference: Tensor,
    spacing: Sequence[float],
    classes: Sequence[str],
    tolerance: float,
) -> list[dict]:
    """Metrics of one label map against its reference, one row a class.

    Args:
        prediction: label map (D, H, W) with values 0..len(classes).
        reference: likewise.
        spacing: voxel size (mm).
        classes: names; `classes[k]` has label value k + 1.
        tolerance: of the NSD (mm).
    """
    if prediction.shape != reference.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and reference {tuple(reference.shape)} differ in shape"
        )
    pred, ref = (
        one_hot(labels.long(), len(classes) + 1).movedim(-1, 0)[
            None
        ]  # (D, H, W) -> (1, K+1, D, H, W)
        for labels in (prediction, reference)
    )
    with warnings.catch_warnings():  # of empty structures, which are handled below
        warnings.filterwarnings("ignore", message=r".*is all 0, this may result in nan/inf")
        warnings.filterwarnings(
            "ignore", message=r".*always_return_as_numpy", category=FutureWarning
        )
        dice = compute_dice(pred, ref, include_background=False)[0]
        tolerances = [tolerance] * len(classes)
        nsd = compute_surface_dice(pred, ref, tolerances, spacing=tuple(spacing))[0]
        hd95 = compute_hausdorff_distance(pred, ref, percentile=95, spacing=tuple(spacing))[0]

    voxel_ml = math.prod(spacing) / 1000
    diagonal = math.hypot(*(n * mm for n, mm in zip(reference.shape, spacing, strict=True)))
    rows = []
    for k, name in enumerate(classes):
        n_pred, n_ref = int(pred[0, k + 1].sum()), int(ref[0, k + 1].sum())
        values = {"dice": float(dice[k]), "nsd": float(nsd[k]), "hd95": float(hd95[k])}
        if n_pred == 0 or n_ref == 0:
            missed = n_pred != n_ref
            values = {"dice": 1.0 - missed, "nsd": 1.0 - missed, "hd95": diagonal * missed}
        volumes = {"volume_ref_ml": n_ref * voxel_ml, "volume_pred_ml": n_pred * voxel_ml}
        rows.append({"class": name, **values, **volumes})
    return rows


def summarise(table: pd.DataFrame, metrics: Sequence[str] = METRICS) -> pd.DataFrame:
    """Spread over cases, one row a class and metric: n, mean, sd, median, min, max.

    The class `mean` is the mean over classes within each case, then summarised over cases.
    """
    per_case = table.groupby("case", sort=False)[list(metrics)].mean().assign(**{"class": "mean"})
    long = pd.concat([table, per_case.reset_index()]).melt("class", list(metrics), "metric")
    spread = long.groupby(["class", "metric"], sort=False)["value"]
    return spread.agg(["count", "mean", "std", "median", "min", "max"]).reset_index()


def load_prediction(config: RunConfig, case_id: str) -> Tensor:
    """The label map (D, H, W) that `evaluate` stored for a held-out case."""
    file = run_dir(config) / "predictions" / f"{case_id}.nii.gz"
    if not file.is_file():
        raise FileNotFoundError(
            f"run {run_id(config)} has no prediction for case {case_id!r}: {file}"
        )
    return torch.from_numpy(np.asarray(nib.load(file).dataobj, dtype=np.uint8))  # type: ignore[attr-defined]


def _save_labels(labels: Tensor, affine: np.ndarray, file: Path) -> None:
    image = nib.Nifti1Image(labels.numpy(), np.asarray(affine))
    with atomic_path(file) as temporary:
        nib.save(image, temporary)
