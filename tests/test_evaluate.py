"""Metrics: known answers, documented values for empty structures, tables computed once."""

import dataclasses
import math

import pandas as pd
import pytest
import torch

from srlib import data, evaluate, runs, train
from srlib.runs import RunConfig

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
    assert (table[["dice", "nsd"]] == 1).all(axis=None)
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


def test_empty_structures_have_documented_values():
    diagonal = math.hypot(12 * 1, 10 * 2, 8 * 3)
    both = scores(boxes(), boxes()).loc["b"]
    assert (both["dice"], both["nsd"], both["hd95"]) == (1, 1, 0)
    missed = scores(boxes(), boxes(second=SECOND)).loc["b"]
    assert (missed["dice"], missed["nsd"], missed["hd95"]) == (0, 0, diagonal)
    invented = scores(boxes(second=SECOND), boxes()).loc["b"]
    assert (invented["dice"], invented["nsd"], invented["hd95"]) == (0, 0, diagonal)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"prediction \(12, 10, 8\) and reference \(12, 10, 7\)"):
        scores(boxes(), boxes()[..., :-1])


def test_summary_averages_classes_within_cases_first():
    table = pd.DataFrame(
        {
            "case": ["x", "x", "y", "y"],
            "class": ["a", "b", "a", "b"],
            "dice": [0.8, 0.6, 1.0, 0.9],
        }
    )
    rows = evaluate.summarise(table, ["dice"]).set_index("class")
    assert rows.loc["a", "mean"] == pytest.approx(0.9)
    assert rows.loc["mean", "mean"] == pytest.approx(0.825)
    assert rows.loc["mean", "std"] == pytest.approx(pd.Series([0.7, 0.95]).std())
    assert rows.loc["mean", "count"] == 2


@pytest.fixture
def trained(tmp_path, monkeypatch):
    monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path))
    config = RunConfig(
        "mni152",
        steps=2,
        model="tiny",
        tom="none",
        batch_size=1,
        patch_size=(64, 80, 64),
        warmup=1,
        test_cases=2,
    )
    train.train(config)
    return config


def test_a_run_is_evaluated_once(trained, monkeypatch):
    table = evaluate.evaluate(trained)
    assert table["case"].unique().tolist() == list(data.split("mni152").test[:2])
    assert not table.isna().any(axis=None)
    monkeypatch.setattr(evaluate, "predict", None)  # a second prediction would fail
    pd.testing.assert_frame_equal(evaluate.evaluate(trained), table)
    more = _more(trained)
    with pytest.raises(TypeError):
        evaluate.evaluate(more)


def _more(config):
    """The same trained run asked for one more case: has to be evaluated anew."""
    more = dataclasses.replace(config, test_cases=3)
    runs.run_dir(config).rename(runs.run_dir(more))
    return more


def test_stored_predictions_are_those_of_the_network(trained):
    evaluate.evaluate(trained)
    case = evaluate.test_cases(trained)[0]
    image = data.load_case("mni152", case)["image"]
    predicted = evaluate.predict(train.load_model(trained), image, trained.patch_size)
    assert predicted.shape == image.shape[1:]
    assert torch.equal(evaluate.load_prediction(trained, case), predicted)
    with pytest.raises(FileNotFoundError, match="no prediction for case 'nobody'"):
        evaluate.load_prediction(trained, "nobody")
