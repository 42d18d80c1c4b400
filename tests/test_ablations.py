"""Words and figures of the ablations."""

import pandas as pd
import pytest
from case_tables import cases

from srlib import ablations, cue, grid, statistics

ROW = {"difference": -0.01, "low_all": -0.014, "high_all": -0.006, "se_seeds": 0.001}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "worse"),
        ({"difference": 0.01, "low_all": 0.006, "high_all": 0.014}, "better"),
        ({"high_all": 0.001}, "no difference shown"),
        ({"se_seeds": float("nan")}, "one seed only"),
    ],
)
def test_an_effect_is_named_only_where_cases_and_seeds_leave_no_doubt(changed, words):
    assert ablations.effect(ROW | changed) == words


def test_the_interval_of_one_seed_is_over_cases():
    row = ROW | {"low": -0.012, "high": -0.008}
    assert ablations.interval(row) == pytest.approx((-1.4, -0.6))
    assert ablations.interval(row | {"se_seeds": float("nan")}) == pytest.approx((-1.2, -0.8))


def test_costs_are_those_of_the_committed_table():
    found, committed = ablations.cost("none"), grid.systems().loc["none"]
    assert found["parameters"] == committed["parameters"]
    assert found["gmacs"] == pytest.approx(committed["gmacs"], rel=1e-4)


def test_cost_and_gain_shows_each_row_against_each_cost():
    rows = pd.DataFrame({"title": ["a", "b", "c"], "points": [0.0, -1, 2]})
    rows = rows.assign(low=rows["points"] - 0.3, high=rows["points"] + 0.5)
    figure = ablations.cost_and_gain(rows.assign(parameters=7.0, gmacs=1.5, step_seconds=0.4))
    assert [len(axis.containers) for axis in figure.axes] == [3, 3, 3]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]


def test_cue_volumes_frame_the_cubes_in_the_colour_of_their_class():
    figure = ablations.cue_volumes((8, 64), number=2)
    rows = cue.rows_of(2, cue.Recipe(8))
    for axis in figure.axes:
        frames = [(p.get_x() + 1.5, p.get_y() + 1.5, p.get_edgecolor()) for p in axis.patches[:4]]
        assert [(x, y) for x, y, _ in frames] == list(zip(rows.target[:4], rows.y[:4], strict=True))
        assert len({colour for *_, colour in frames}) == len(set(rows.value[:4]))


def test_accuracy_by_distance_draws_means_over_seeds():
    key = {"title": "SegResMamba", "system": "both", "found": 1.0}
    table = pd.DataFrame({"distance": [4, 4, 64, 64], "accuracy": [1.0, 0.9, 0.5, 0.6], **key})
    (axis,) = ablations.accuracy_by_distance(table.assign(seed=[0, 1] * 2)).axes
    assert axis.lines[0].get_ydata().tolist() == pytest.approx([0.95, 0.55])
    assert len(axis.collections[0].get_offsets()) == 4


def test_rows_of_a_comparison_are_what_the_words_need():
    rows = statistics.compare(cases({"both": 0.0, "none": -0.05}), "both", ["dice"], ["mean"])
    assert [ablations.effect(row) for row in rows.to_dict("records")] == ["worse"]
