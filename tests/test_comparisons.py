"""What the repository holds of the grids, none of it yet, some or all."""

import case_tables
import nbformat
import pandas as pd
import pytest

from srlib import grid, paths, plots, statistics


@pytest.fixture
def reference(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "REFERENCE", tmp_path)
    return tmp_path


@pytest.fixture
def planned(reference):
    """What decides the steps and learning rates of the grids is there."""
    (reference / "cpu").mkdir()
    table = pd.DataFrame({"system": [*grid.SYSTEMS], "step_seconds": 0.4, "gmacs": 1.5})
    table.to_csv(reference / "cpu" / "systems.csv", index=False)
    for config in grid.configs("rates"):
        keep(config)


def keep(config):
    table = case_tables.cases({"any": 0.0}, (config.fold,), (config.seed,), n=6)
    record = {"device_name": "a device", "training_seconds": 9.5, "commit": "abc"}
    grid.keep(config, table[[*grid.COLUMNS]].to_csv(index=False), record)


def test_nothing_is_there_yet(reference, capsys):
    table = grid.committed("tom", "peers")
    assert table.empty
    assert {"system", "title", "dice", "device"} <= set(table)
    assert capsys.readouterr().out.splitlines() == [
        "grid tom: the repository holds nothing of it yet",
        "grid peers: the repository holds nothing of it yet",
    ]


def test_a_run_of_two_grids_comes_once(planned, capsys):
    assert grid.committed("tom").empty
    (both,) = set(grid.configs("tom")[:3]) & set(grid.configs("peers"))
    others = grid.configs("tom")[1], grid.configs("peers")[1]
    for config in (both, *others):
        keep(config)
    table = grid.committed("tom", "peers")
    assert len(table) == 3 * 6 * 2
    assert table["system"].unique().tolist() == [
        "segresmamba",
        *(config.system for config in others),
    ]
    assert "grid peers: the repository holds 2 of 21 runs" in capsys.readouterr().out
    assert grid.made_with(table) == (
        "hippocampus, 6 cases | fold 0, seed 0 | 1,800 steps | a device"
    )


def test_a_table_of_equal_time_says_so():
    table = pd.concat(
        case_tables.cases(minutes=minutes).assign(steps=steps, fold=fold)
        for fold, (minutes, steps) in enumerate(((3.0, 100), (12.0, 400)))
    )
    expected = "made up, 20 cases | fold 0-1, seed 0-2 | the steps of 3-12 minutes | no device"
    assert grid.made_with(table) == expected


GRIDS = ("tom", "peers", "peers-time", "curve", "long")


@pytest.mark.parametrize(
    ("kept", "drawn"),
    [
        (0, set()),
        (1, {"04-error-volume", "04-hippocampus-volumes", "04-long"}),
        (99, {"04-equal-steps", "04-paired", "04-equal-time", "04-minutes", "04-long", "04-folds"}),
    ],
)
def test_notebook_needs_no_number_of_committed_runs(kept, drawn, planned, monkeypatch):
    """Its cells that read the repository's runs, with none, the first of each grid, or all."""
    monkeypatch.setattr(statistics, "RESAMPLES", 99)
    for config in {config for name in GRIDS for config in grid.configs(name)[:kept]}:
        keep(config)
    shown = []
    for method in ("show", "table"):
        monkeypatch.setattr(plots.Record, method, lambda _, what, name, **__: shown.append(name))
    names = {"PROFILE": "smoke", "DATASET": "mni152", "SEED": 0, "committed": grid.committed}
    names |= {
        "made_with": grid.made_with,
        "plots": plots,
        "statistics": statistics,
        "SYSTEMS": grid.SYSTEMS,
    }
    names |= {"FOLDS": grid.FOLDS, "systems": grid.systems, "pd": pd}
    names |= {"MINUTES": grid.MINUTES, "LONG_MINUTES": grid.LONG_MINUTES}
    cells = nbformat.read(paths.NOTEBOOKS / "04_evaluation.ipynb", as_version=4).cells
    for cell in cells:
        if "committed" in cell.metadata.get("tags", []):
            exec(cell.source, names)
    assert drawn <= set(shown)
    assert kept or not shown


def test_costs_are_those_of_the_committed_table():
    found, stored = grid.cost("none"), grid.systems().loc["none"]
    assert found["parameters"] == stored["parameters"]
    assert found["gmacs"] == pytest.approx(stored["gmacs"], rel=1e-4)
