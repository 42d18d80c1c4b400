"""The self-check: another rounding agrees, another result or a lost row does not."""

import json

import pandas as pd
import pytest

from srlib.book import verify
from srlib.files import results_dir

METRICS = {"metric": ["dice", "nsd", "hd95"], "count": 8, "mean": [0.8, 0.9, 2.0]}
TABLES = {
    "03-loss": pd.DataFrame({"prediction": ["a"], "cross-entropy": [2.0], "step (s)": [1.0]}),
    "04-summary": pd.DataFrame(METRICS),
    "05-parts": pd.DataFrame({"parameters": [7], "share": [0.25]}),
}
NOTEBOOKS = ["03_training", "04_evaluation", "05_memory"]


@pytest.fixture(autouse=True)
def tables(tmp_path, monkeypatch):
    """The folder of the computed tables."""
    monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(verify, "REFERENCE", tmp_path / "reference")
    folder = results_dir("smoke", "mni152") / "tables"
    folder.mkdir(parents=True)
    return folder


def write(tables, written, notebooks=NOTEBOOKS):
    """Write what a run of these notebooks would have left."""
    manifest = {"notebooks": {name: {} for name in notebooks}}
    (tables.parent / "manifest.json").write_text(json.dumps(manifest))
    for name, table in written.items():
        (tables / f"{name}.csv").write_text("# stamp\n" + table.to_csv(index=False))


@pytest.fixture
def stored(tables):
    write(tables, TABLES)
    verify.store("smoke", "mni152")
    return tables


def compare():
    return verify.compare("smoke", "mni152", NOTEBOOKS)


def test_the_same_tables_agree_and_times_are_not_compared(stored):
    assert compare()["agrees"].all()
    assert set(compare()["column"]) == {"cross-entropy", "count", "mean", "parameters", "share"}
    assert verify.verdict(compare()) == "9 of 9 numbers agree with the reference"
    assert verify.compare("smoke", "mni152", ["01_architecture"]).empty


@pytest.mark.parametrize(
    ("name", "column", "row", "within", "beyond"),
    [
        ("03-loss", "cross-entropy", 0, 2.5, 2.6),
        ("04-summary", "mean", 0, 0.745, 0.73),  # Dice
        ("04-summary", "mean", 1, 0.76, 0.74),  # NSD
        ("04-summary", "mean", 2, 3.4, 3.6),  # mm
        ("04-summary", "count", 2, 8, 9),
        ("05-parts", "share", 0, 0.25002, 0.2501),
        ("05-parts", "parameters", 0, 7, 8),
    ],
)
def test_a_training_may_differ_by_its_tolerance_and_all_else_by_rounding(
    stored, name, column, row, within, beyond
):
    for value, agrees in ((within, True), (beyond, False)):
        table = TABLES[name].copy()
        table[column] = table[column].where(table.index != row, value)
        write(stored, {name: table})
        assert compare()["agrees"].all() == agrees
    assert f"{beyond:.6g}, reference {TABLES[name][column][row]:.6g}" in verify.verdict(compare())


def test_words_in_a_column_of_numbers_do_not_agree_whichever_table_has_them(stored):
    words = TABLES["04-summary"].assign(mean=["not all folds", 0.9, 2.0])
    write(stored, {"04-summary": words})
    assert [*compare().query("not agrees")["row"]] == [0]
    verify.store("smoke", "mni152")
    write(stored, TABLES)
    assert [*compare().query("not agrees")["row"]] == [0]
    assert "04-summary, row 0, mean: 0.8, reference nan" in verify.verdict(compare())


def test_lost_rows_and_lost_tables_do_not_agree(stored):
    write(stored, {"04-summary": TABLES["04-summary"][:-1]})
    assert compare().query("not agrees")["column"].tolist() == ["other rows or columns"]
    (stored / "04-summary.csv").unlink()
    assert compare().query("not agrees")["column"].tolist() == ["table missing in this run"]


def test_nothing_computed_and_nothing_stored_are_named():
    with pytest.raises(FileNotFoundError, match="no reference for profile smoke, data set mni152"):
        compare()
    with pytest.raises(FileNotFoundError, match="nothing has been computed"):
        verify.store("smoke", "mni152")


def test_storing_replaces_the_tables_of_what_was_run_and_no_others(stored):
    for file in stored.iterdir():
        file.unlink()
    write(stored, {"04-other": TABLES["04-summary"]}, ["04_evaluation"])
    verify.store("smoke", "mni152")
    target = verify.folder("smoke", "mni152")
    assert {file.stem for file in target.glob("*.csv")} == {"03-loss", "04-other", "05-parts"}
    assert set(json.loads((target / "manifest.json").read_text())["notebooks"]) == set(NOTEBOOKS)
