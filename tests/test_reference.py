"""The self-check: another rounding agrees, another model or a lost row does not."""

import dataclasses
import json
import shutil

import pandas as pd
import pytest
import torch

from srlib import reference, train
from srlib.paths import results_dir
from srlib.runs import RunConfig

CONFIG = RunConfig(
    "mni152", steps=5, model="tiny", tom="inner", batch_size=1, patch_size=(36, 20, 20), warmup=2
)
NOTEBOOKS = ["03_training"]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(reference, "REFERENCE", tmp_path / "reference")


def write_tables(config, seed=0):
    """What a notebook would write of a training: numbers of several kinds."""
    result = train.train(dataclasses.replace(config, seed=seed))
    folder = results_dir("smoke", "mni152", seed)
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(
        json.dumps({"seed": seed, "notebooks": {"03_training": {}}})
    )
    parameters = sum(p.numel() for p in result.model.parameters())
    history = result.history[["step", "loss", "seconds"]].assign(parameters=parameters)
    (folder / "tables" / "03-history.csv").write_text("# stamp\n" + history.to_csv(index=False))


@pytest.fixture
def stored(folders):
    for seed in reference.SEEDS:
        write_tables(CONFIG, seed)
    reference.store("smoke", "mni152")


def test_the_same_run_agrees_and_times_are_not_compared(stored):
    comparison = reference.compare("smoke", "mni152", NOTEBOOKS)
    assert comparison["agrees"].all()
    assert set(comparison["column"]) == {"step", "loss", "parameters"}
    assert reference.verdict(comparison) == "15 of 15 numbers agree with the reference"


def test_another_rounding_agrees(stored):
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)  # sums in another order, and another run
    try:
        write_tables(CONFIG)
    finally:
        torch.set_num_threads(threads)
    assert reference.compare("smoke", "mni152", NOTEBOOKS)["agrees"].all()


def test_a_changed_model_differs_and_both_values_are_named(stored):
    write_tables(dataclasses.replace(CONFIG, tom="none"))
    comparison = reference.compare("smoke", "mni152", NOTEBOOKS)
    different = comparison[~comparison["agrees"]]
    assert (different["column"] == "parameters").sum() == CONFIG.steps
    row = different.iloc[0]
    assert f"{row['value']:.6g}, reference {row['reference']:.6g}" in reference.verdict(comparison)


def test_a_broken_training_differs(stored):
    file = results_dir("smoke", "mni152") / "tables" / "03-history.csv"
    table = pd.read_csv(file, comment="#")
    table["loss"] += 10 * table["loss"].std()
    table.to_csv(file, index=False)
    assert not reference.compare("smoke", "mni152", NOTEBOOKS)["agrees"].all()


def test_lost_rows_and_lost_tables_do_not_agree(stored):
    folder = results_dir("smoke", "mni152") / "tables"
    file = folder / "03-history.csv"
    pd.read_csv(file, comment="#").iloc[:-1].to_csv(file, index=False)
    (only,) = reference.compare("smoke", "mni152", NOTEBOOKS).itertuples()
    assert (only.column, only.agrees) == ("other rows or columns", False)
    file.unlink()
    (only,) = reference.compare("smoke", "mni152", NOTEBOOKS).itertuples()
    assert (only.column, only.agrees) == ("table missing in this run", False)


def test_only_tables_of_notebooks_that_ran_are_compared(stored):
    assert reference.compare("smoke", "mni152", ["01_architecture"]).empty


def test_what_only_seed_0_has_must_be_the_same_again(folders):
    for seed in reference.SEEDS:
        write_tables(CONFIG, seed)
    table = pd.DataFrame({"parameters": [7], "share": [0.25]})
    file = results_dir("smoke", "mni152") / "tables" / "03-counted.csv"
    table.to_csv(file, index=False)
    reference.store("smoke", "mni152")
    assert reference.compare("smoke", "mni152", NOTEBOOKS)["agrees"].all()
    table.assign(share=0.26).to_csv(file, index=False)
    (only,) = reference.compare("smoke", "mni152", NOTEBOOKS).query("not agrees").itertuples()
    assert (only.table, only.column) == ("03-counted", "share")


def test_a_metrics_tolerance_comes_from_that_metric_alone(folders):
    tables = {
        seed: pd.DataFrame({"metric": ["dice", "hd95"], "mean": [0.8 + seed / 1000, 2 + seed]})
        for seed in reference.SEEDS
    }
    for seed, table in tables.items():
        write_tables(CONFIG, seed)
        folder = results_dir("smoke", "mni152", seed) / "tables"
        table.to_csv(folder / "04-metrics.csv", index=False)
    reference.store("smoke", "mni152")
    file = results_dir("smoke", "mni152") / "tables" / "04-metrics.csv"
    for change, agrees in ([0.005, 5], [True, True]), ([0.006, 6], [False, False]):
        tables[0].assign(mean=tables[0]["mean"] + change).to_csv(file, index=False)
        comparison = reference.compare("smoke", "mni152", ["04_evaluation"])
        assert comparison["agrees"].tolist() == agrees
        assert comparison["tolerance"].tolist() == pytest.approx([0.004 * 2**0.5, 4 * 2**0.5])


def test_a_missing_reference_is_named(folders):
    with pytest.raises(FileNotFoundError, match="no reference for profile smoke, data set mni152"):
        reference.compare("smoke", "mni152", NOTEBOOKS)
    with pytest.raises(FileNotFoundError, match="nothing has been computed"):
        reference.store("smoke", "mni152")
    write_tables(CONFIG)
    with pytest.raises(FileNotFoundError, match="seed 1 has not been computed"):
        reference.store("smoke", "mni152")


def test_what_was_not_run_again_stays_stored(stored):
    results = results_dir("smoke", "mni152")
    before = (reference.folder("smoke", "mni152", 0) / "03-history.csv").read_text()
    for seed in reference.SEEDS[1:]:
        shutil.rmtree(results_dir("smoke", "mni152", seed))
    shutil.rmtree(results / "tables")
    (results / "tables").mkdir()
    (results / "tables" / "05-counted.csv").write_text("parameters\n7\n")
    (results / "manifest.json").write_text(json.dumps({"notebooks": {"05_memory": {}}}))
    reference.store("smoke", "mni152")
    target = reference.folder("smoke", "mni152", 0)
    assert (target / "03-history.csv").read_text() == before
    assert (target / "05-counted.csv").is_file()
    assert set(json.loads((target / "manifest.json").read_text())["notebooks"]) == {
        "03_training",
        "05_memory",
    }


def test_a_table_that_a_notebook_no_longer_writes_is_dropped(stored):
    file = results_dir("smoke", "mni152") / "tables" / "03-history.csv"
    file.rename(file.with_name("03-other.csv"))
    reference.store("smoke", "mni152")
    target = reference.folder("smoke", "mni152", 0)
    assert [table.name for table in target.glob("*.csv")] == ["03-other.csv"]
