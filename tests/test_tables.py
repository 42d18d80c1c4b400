"""CSV: names come back as they were, and a table of scores that cannot be true is refused."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from srlib import tables
from srlib.data.catalog import MEAN
from srlib.files import REFERENCE, ROOT, DataError
from srlib.run import evaluate
from srlib.study import grid

ODD = [
    "None",
    "NA",
    "null",
    "nan",
    "N/A",
    "-",
    "000",
    "1e5",
    "inf",
    "True",
    "#1",
    "a,b",
    'a"b',
    "ä",
]
ROW = dict.fromkeys(("dice", "nsd", "sensitivity"), 1.0) | {"hd95": 0.0}
ROW |= {"volume_ref_ml": 1.0, "volume_pred_ml": 1.0}


@example(names=ODD, values=[np.nan] * len(ODD))
@settings(max_examples=30, deadline=None)
@given(
    names=st.lists(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1), min_size=1),
    values=st.lists(st.floats(allow_infinity=True), min_size=20, max_size=20),
)
def test_what_is_written_comes_back(tmp_path_factory, names, values):
    file = tmp_path_factory.mktemp("tables") / "table.csv"
    table = pd.DataFrame({"value": np.resize(values, len(names)), "case": names, "class": names})
    tables.write(table, file, stamp="made here", digits=17)
    assert file.read_text(encoding="utf-8").startswith("# made here\n")
    found = tables.read(file)
    assert found["case"].tolist() == found["class"].tolist() == names
    np.testing.assert_allclose(found["value"].astype(float), table["value"], rtol=1e-14)


def test_a_name_that_is_missing_is_not_written(tmp_path):
    for name in ("", None):
        with pytest.raises(ValueError, match=r"t\.csv: a class without a name"):
            tables.write(pd.DataFrame({"class": ["a", name]}), tmp_path / "t.csv")
    assert not (tmp_path / "t.csv").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dice": 9.8}, "dice of x, liver is 9.8; expected a number from 0 to 1"),
        ({"nsd": -0.1}, "nsd of x, liver is -0.1; expected a number from 0 to 1"),
        ({"sensitivity": "high"}, "sensitivity of x, liver is 'high'"),
        ({"hd95": np.nan}, "hd95 of x, liver is nan; expected a number from 0 on"),
        ({"volume_pred_ml": np.inf}, "volume_pred_ml of x, liver is inf"),
        ({"case": "y"}, "expected each case and class once"),
    ],
)
def test_scores_that_cannot_be_true_are_refused_by_the_file_s_name(tmp_path, change, message):
    file = tmp_path / "run.csv"
    rows = [{"case": case, "class": "liver", **ROW} for case in ("x", "y")]
    rows[0] |= change
    tables.write(pd.DataFrame(rows), file)
    with pytest.raises(DataError, match=rf"{re.escape(str(file))}: {re.escape(message)}"):
        tables.read_scores(file)
    tables.write(pd.DataFrame(rows).drop(columns="nsd"), file)
    with pytest.raises(DataError, match=r"run\.csv: expected the columns nsd"):
        tables.read_scores(file)
    file.write_text('case,class\n"x')
    with pytest.raises(DataError, match=r"run\.csv: not a table"):
        tables.read_scores(file)


def test_a_committed_table_is_read_by_the_same_rule(tmp_path, monkeypatch):
    monkeypatch.setattr(grid.paths, "REFERENCE", tmp_path)
    rows = [{"run": "a", "case": "x", "class": "anterior", **ROW, "dice": 9.8}]
    tables.write(pd.DataFrame(rows), tmp_path / "hippocampus" / "runs.csv")
    (tmp_path / "hippocampus" / "runs.jsonl").write_text('{"run": "a"}\n')
    with pytest.raises(DataError, match=r"hippocampus/runs\.csv: dice of x, anterior is 9\.8"):
        grid.kept("hippocampus")


def test_every_committed_table_of_scores_can_be_true():
    files = sorted(REFERENCE.glob("*/runs.csv"))
    assert len(files) > 6
    for file in files:
        assert tables.read_scores(file)["run"].nunique() > 1


def test_a_class_may_be_called_mean():
    table = pd.DataFrame([{"case": "x", "class": k, **ROW} for k in ("mean", "NA")])
    table["dice"] = [0.2, 0.4]
    found = evaluate.summarise(table, ["dice"]).set_index("class")["mean"]
    assert found.to_dict() == {"mean": 0.2, "NA": 0.4, MEAN: pytest.approx(0.3)}


def test_csv_is_read_and_written_in_one_place():
    folders = [ROOT / name for name in ("srlib", "benchmarks", "notebooks")]
    files = [p for folder in folders for p in folder.rglob("*") if p.suffix in (".py", ".ipynb")]
    call = re.compile(r"\.(read_csv|to_csv|read_table)\(|csv\.(reader|writer|Dict\w+)\(")
    elsewhere = {p.name for p in files if call.search(p.read_text(encoding="utf-8"))}
    assert elsewhere == {Path(tables.__file__).name}
