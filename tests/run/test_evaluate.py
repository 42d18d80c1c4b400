"""Metrics: known answers, documented values for empty structures, tables computed once."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch

from srlib import data
from srlib.data.catalog import MEAN
from srlib.run import evaluate, runs, train
from srlib.run.runs import RunConfig
from srlib.run.train import load_trained, save_trained

SPACING = (1.0, 2.0, 3.0)
CLASSES = ("a", "b")


def boxes(first=(slice(2, 6), slice(2, 6), slice(2, 6)), second=None):
    labels = torch.zeros(12, 10, 8, dtype=torch.uint8)
    labels[first] = 1
    if second:
        labels[second] = 2
    return labels


SECOND = (slice(7, 11), slice(2, 6), slice(2, 6))


def scores(prediction, reference):
    rows = evaluate.score(prediction, reference, SPACING, CLASSES, tolerance=1.0)
    return pd.DataFrame(rows).set_index("class")


def test_a_perfect_prediction():
    table = scores(boxes(second=SECOND), boxes(second=SECOND))
    assert (table[["dice", "nsd", "sensitivity"]] == 1).all(axis=None)
    assert (table["hd95"] == 0).all()
    assert table["volume_ref_ml"].tolist() == [64 * 6 / 1000] * 2


def test_a_box_moved_by_one_voxel():
    moved = boxes((slice(3, 7), slice(2, 6), slice(2, 6)), SECOND)
    row = scores(moved, boxes(second=SECOND)).loc["a"]
    assert row["dice"] == pytest.approx(2 * 48 / 128)
    assert row["hd95"] == 1.0  # mm: one voxel along the first axis
    assert row["nsd"] == 1.0  # within the tolerance of 1 mm
    across = boxes((slice(2, 6), slice(2, 6), slice(3, 7)), SECOND)
    row = scores(across, boxes(second=SECOND)).loc["a"]
    assert row["hd95"] == 3.0  # mm: one voxel along the last axis
    assert row["nsd"] < 1.0


def test_sensitivity_is_the_share_of_the_reference_that_is_found():
    slab = (slice(2, 6), slice(2, 6), slice(2, 4))  # half of the first box, and nothing else
    half = scores(boxes(slab, SECOND), boxes(second=SECOND)).loc["a"]
    assert (half["sensitivity"], half["dice"]) == (0.5, pytest.approx(2 * 32 / 96))
    more = scores(boxes(second=SECOND), boxes(slab, SECOND)).loc["a"]
    assert (more["sensitivity"], more["dice"]) == (1, half["dice"])


DIAGONAL = math.hypot(12 * 1, 10 * 2, 8 * 3)  # of the image, in mm


@pytest.mark.parametrize(
    ("prediction", "reference", "share", "distance"),
    [(None, None, 1, 0), (None, SECOND, 0, DIAGONAL), (SECOND, None, 0, DIAGONAL)],
)
def test_empty_structures_have_documented_values(prediction, reference, share, distance):
    row = scores(boxes(second=prediction), boxes(second=reference)).loc["b"]
    assert row[["dice", "nsd", "hd95", "sensitivity"]].tolist() == [share, share, distance, share]


def test_surface_distances_are_those_of_hd95_and_signed():
    first, moved = boxes() == 1, boxes((slice(3, 7), slice(2, 6), slice(2, 6))) == 1
    found = evaluate.surface_distances(moved, first, SPACING)
    assert found.shape == first.shape
    assert (found[6][moved[6]] == 1).all()  # mm, outside
    assert (found[3][~np.isnan(found[3])] <= 0).all()
    assert np.isnan(found[~moved.numpy()]).all()
    wide = boxes((slice(2, 6), slice(2, 10), slice(2, 6))) == 1
    there = np.abs(evaluate.surface_distances(wide, first, SPACING))
    row = scores(wide.byte(), first.byte()).loc["a"]
    assert np.nanpercentile(there, 95) == row["hd95"] == 8.0  # mm, four voxels of 2 mm
    with pytest.raises(ValueError, match="empty structure"):
        evaluate.surface_distances(first, torch.zeros_like(first), SPACING)


def test_probability_bins_count_what_is_said_and_what_is_there():
    said = torch.tensor([0.05, 0.05, 0.95, 1.0]).view(1, 4, 1, 1)
    reference = torch.tensor([0, 1, 1, 1]).view(4, 1, 1)
    bins = evaluate.probability_bins(torch.cat([1 - said, said]), reference, ["a"])
    assert bins["voxels"].tolist() == [2, *[0] * 8, 2]
    assert bins["observed"].tolist() == [1, *[0] * 8, 2]
    assert bins["predicted"].iloc[[0, -1]].tolist() == pytest.approx([0.1, 1.95])


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"prediction \(12, 10, 8\) and reference \(12, 10, 7\)"):
        scores(boxes(), boxes()[..., :-1])


def test_summary_averages_classes_within_cases_first():
    of = {"case": ["x", "x", "y", "y"], "class": ["a", "b", "a", "b"]}
    table = pd.DataFrame(of | {"dice": [0.8, 0.6, 1.0, 0.9]})
    rows = evaluate.summarise(table, ["dice"]).set_index("class")
    assert rows.loc["a", "mean"] == pytest.approx(0.9)
    assert rows.loc[MEAN, "mean"] == pytest.approx(0.825)
    assert rows.loc[MEAN, "std"] == pytest.approx(pd.Series([0.7, 0.95]).std())
    assert rows.loc[MEAN, "count"] == 2


@pytest.fixture
def trained(tmp_path, monkeypatch):
    monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path))
    short = {"steps": 2, "warmup": 0.5, "batch_size": 1, "test_cases": 2}
    config = RunConfig("mni152", model="tiny", tom="none", patch_size=(64, 80, 64), **short)
    train.train(config)
    return config


def test_a_run_is_evaluated_once(trained, monkeypatch):
    table = evaluate.evaluate(trained)
    assert table["case"].unique().tolist() == list(data.open("mni152").split().test[:2])
    assert not table.isna().any(axis=None)
    monkeypatch.setattr(evaluate, "predict", None)  # a second prediction would fail
    pd.testing.assert_frame_equal(evaluate.evaluate(trained), table)
    network = runs.run_dir(trained) / "model.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(data.Dataset, "fingerprint", "other data")
        with pytest.raises(data.DataError, match="then, other data now"):
            evaluate.evaluate(trained, checkpoint=network)
    more = dataclasses.replace(trained, test_cases=3)
    runs.run_dir(trained).rename(runs.run_dir(more))
    with pytest.raises(TypeError):  # its third case has to be predicted
        evaluate.evaluate(more)


def test_other_weights_are_evaluated_anew(trained, tmp_path):
    file = tmp_path / "model.safetensors"
    found = load_trained(runs.run_dir(trained))
    tables = []
    for scale in (1, -1):
        weights = {name: scale * tensor for name, tensor in found.weights.items()}
        save_trained(file, found._replace(weights=weights))
        tables.append(evaluate.evaluate(trained, checkpoint=file))
    assert not tables[0].equals(tables[1])


def test_scores_survive_a_kill(trained, monkeypatch):
    """Only the case that was being computed is computed again."""
    predict, seen = evaluate.predict, []

    def deadly(model, image, patch_size):
        seen.append(image)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return predict(model, image, patch_size)

    monkeypatch.setattr(evaluate, "predict", deadly)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(trained)
    table = evaluate.evaluate(trained)
    assert len(seen) == 3
    (runs.run_dir(trained) / "evaluation.json").unlink()
    pd.testing.assert_frame_equal(evaluate.evaluate(trained), table)


def test_stored_predictions_are_those_of_the_network(trained):
    evaluate.evaluate(trained)
    case = evaluate.test_cases(trained)[0]
    image = data.open("mni152").load(case)["image"]
    model = train.train(trained).model
    predicted = evaluate.predict(model, image, trained.patch_size)
    assert predicted.shape == image.shape[1:]
    assert torch.equal(evaluate.load_prediction(trained, case), predicted)
    shares = evaluate.probabilities(model, image, trained.patch_size)
    assert torch.allclose(shares.sum(0), torch.ones(predicted.shape))
    assert torch.equal(shares.argmax(0), predicted.long())
    with pytest.raises(FileNotFoundError, match="no prediction for case 'nobody'"):
        evaluate.load_prediction(trained, "nobody")
