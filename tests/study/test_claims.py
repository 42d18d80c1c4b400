"""Verdicts: each follows its rule, a row changes when its table does, and what is written by hand says the same."""

import re
import shutil

import case_tables
import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from srlib import data, files
from srlib.book import pages
from srlib.net.peers import SMALL
from srlib.study import claims, grid
from srlib.study.claims import FAILS, HOLDS, PART, UNTESTED
from srlib.study.published import published

MEMORY, MACS, TIME, PARAMETERS = (
    next(claim for claim in claims.CLAIMS if claim.startswith(number)) for number in "1348"
)
COMPARABLE, TOM, PARTS = (
    next(claim for claim in claims.CLAIMS if claim.startswith(number)) for number in "267"
)
ABSTRACT = [*claims.CLAIMS][-1]
TABLES = ("gpu/memory.csv", "memory/counted.csv", "cpu/systems.csv")


@pytest.fixture(autouse=True)
def reference(tmp_path, monkeypatch):
    """The measured tables in a folder of their own, which a test may change, and no runs."""
    for name in TABLES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(files.REFERENCE / name, tmp_path / name)
    monkeypatch.setattr(files, "REFERENCE", tmp_path)
    return tmp_path


def with_runs(monkeypatch, shifts, **options):
    """Committed runs of systems whose Dice differs by these shifts."""
    cases = case_tables.cases(shifts, n=52, **options)
    monkeypatch.setattr(grid, "cases", lambda name: cases)


def changed(file, column, factor):
    """Multiply SegResMamba's values in a table."""
    table = pd.read_csv(file)
    table[column] = table[column].astype(float)
    table.loc[table["peer"] == "segresmamba", column] *= factor
    table.to_csv(file, index=False)


@pytest.mark.parametrize(
    ("shown", "excluded", "words"),
    [("11", "00", HOLDS), ("10", "01", PART), ("00", "11", FAILS), ("00", "10", UNTESTED)],
)
def test_verdict(shown, excluded, words):
    columns = (pd.Series([bit == "1" for bit in bits]) for bits in (shown, excluded))
    assert claims.verdict(*columns) == words


@pytest.mark.parametrize(
    ("claim", "file", "column"),
    [(MEMORY, TABLES[0], "allocated"), (MACS, TABLES[1], "gmacs"), (TIME, TABLES[0], "step_s")],
)
def test_a_row_changes_when_its_table_does(reference, claim, file, column):
    changed(reference / file, column, 1e-3)
    assert claims.finding(claim).verdict == HOLDS
    changed(reference / file, column, 1e6)
    assert claims.finding(claim).verdict == FAILS


def test_every_setting_counts(reference):
    table = pd.read_csv(reference / TABLES[0])
    others = table["setting"] != claims.FIRST
    table.loc[others & (table["peer"] == "segresmamba"), "allocated"] = 1e3
    table.to_csv(reference / TABLES[0], index=False)
    assert claims.ratios("memory")["high"].min() > 1
    assert claims.finding(MEMORY).verdict == PART


def test_parameters_have_to_be_as_many_as_printed(reference):
    assert claims.finding(PARAMETERS).verdict == FAILS
    counted = pd.read_csv(reference / TABLES[1])
    ours = counted.loc[counted["peer"] == "segresmamba", "trained"].iloc[0]
    changed(reference / TABLES[1], "trained", 119.98e6 / ours)
    assert claims.finding(PARAMETERS).verdict == HOLDS


def test_what_lacks_its_table_has_not_been_tested(reference):
    (reference / TABLES[1]).unlink()
    for claim in (MACS, TOM):
        assert claims.finding(claim) == (UNTESTED, "-", "-")


@pytest.mark.parametrize(
    ("claim", "shifts", "words"),
    [
        (TOM, {"none": -0.02, "conv": -0.02}, HOLDS),
        (TOM, {"none": -0.02, "conv": 0.0}, PART),
        (TOM, {"none": 0.0, "conv": 0.0}, FAILS),
        (TOM, {"none": -0.02}, PART),
        (PARTS, {"segmamba_block": -0.02, "no_extra_conv": 0.0}, PART),
        (PARTS, {"segmamba_block": 0.0, "no_extra_conv": 0.0}, FAILS),
        (COMPARABLE, dict.fromkeys(SMALL, 0.0), HOLDS),
        (COMPARABLE, dict.fromkeys(SMALL, 0.0) | {"unet": 0.03}, PART),
        (COMPARABLE, dict.fromkeys(SMALL, 0.03), FAILS),
    ],
)
def test_claims_about_dice(monkeypatch, claim, shifts, words):
    with_runs(monkeypatch, {"segresmamba": 0.0, **shifts})
    assert claims.finding(claim).verdict == words


def test_one_seed_decides_nothing(monkeypatch):
    with_runs(monkeypatch, {"segresmamba": 0.0, "none": -0.02, "conv": -0.02}, seeds=(0,))
    found = claims.finding(TOM)
    assert found.verdict == UNTESTED
    assert found.interval == "none for no ToM, convolution for ToM: one training"


def test_rivals_of_one_training_are_named_beside_intervals_of_the_others(monkeypatch):
    cases = case_tables.cases({"segresmamba": 0.0, "none": -0.02, "conv": -0.02}, n=52)
    once = cases[(cases["system"] != "conv") | (cases["seed"] == 0)]
    with_runs(monkeypatch, {"segresmamba": 0.0, "none": 0.0, "conv": 0.0})
    monkeypatch.setattr(grid, "cases", lambda name: once)
    found = claims.finding(TOM)
    assert re.fullmatch(
        r"no ToM \+\S+ to \+\S+; none for convolution for ToM: one training", found.interval
    )


def test_wide_intervals_decide_nothing(monkeypatch):
    with_runs(monkeypatch, {"segresmamba": 0.0, "none": -0.005, "conv": -0.005}, noise_sd=0.2)
    assert claims.finding(TOM).verdict == UNTESTED


def test_intervals_cover_other_seeds(monkeypatch):
    with_runs(monkeypatch, {"segresmamba": 0.0, "none": 0.0, "conv": 0.0}, seed_sd=0.0)
    narrow = claims.gains("ToM")
    with_runs(monkeypatch, {"segresmamba": 0.0, "none": 0.0, "conv": 0.0}, seed_sd=0.02)
    wide = claims.gains("ToM")
    assert ((wide["high"] - wide["low"]) > 2 * (narrow["high"] - narrow["low"])).all()
    assert (narrow["low"] < narrow["here"]).all()
    assert (narrow["here"] < narrow["high"]).all()


def test_each_rival_is_compared_on_the_cases_that_it_has(monkeypatch):
    cases = case_tables.cases({"segresmamba": 0.0, "none": 0.0, "conv": 0.0}, folds=(0, 1), n=20)
    lacking = cases[~((cases["system"] == "conv") & (cases["fold"] == 1))]
    monkeypatch.setattr(grid, "cases", lambda name: lacking)
    assert claims.gains("ToM")["n"].tolist() == [40, 20]


def test_the_abstract_is_as_good_as_its_parts(reference, monkeypatch):
    assert claims.finding(ABSTRACT).verdict == PART
    for name, column in ((TABLES[0], "allocated"), (TABLES[0], "step_s"), (TABLES[1], "gmacs")):
        changed(reference / name, column, 1e-3)
    with_runs(monkeypatch, {"segresmamba": 0.0, **dict.fromkeys(SMALL, 0.0)})
    assert claims.finding(ABSTRACT).verdict == HOLDS


def test_published_tables_have_the_printed_values():
    assert published("table7_size_btcv").loc["SegResMamba"].to_dict() == {
        "params_m": 119.98,
        "flops_g": 188.42,
    }
    assert published("table8_training_memory_gb").loc["UNETR", "spleen_96"] == 0.14


def test_evidence_is_real_data():
    assert not data.get(grid.DATASET).virtual


def test_the_table_has_a_row_for_each_claim_and_reads_as_html():
    table = claims.table()
    assert len(table) == 9
    assert table["verdict"].isin([HOLDS, PART, FAILS, UNTESTED]).all()
    page = BeautifulSoup(pages.claims_table(table), "html.parser")
    assert page.caption.text
    assert [cell.text for cell in page.select("th[scope=col]")] == [*table]
    assert [cell.text for cell in page.select("th[scope=row]")] == [*table["claim"]]
    assert [cell.text for cell in page.select("strong")] == [*table["verdict"]]


def written(text):
    """Claims and verdicts of a text: its paragraphs `**claim: verdict.** ...` and rows `| claim | verdict | ...`."""
    names = "|".join(map(re.escape, claims.CLAIMS))
    verdicts = "|".join((PART, HOLDS, FAILS, UNTESTED))
    pattern = rf"(?m)^(?:\*\*|\| )({names})(?:: | \| )({verdicts})(?:\.\*\*| \|)"
    return dict(re.findall(pattern, text))


@pytest.fixture
def table(monkeypatch):
    """What the repository's own tables say."""
    monkeypatch.undo()
    return claims.table().set_index("claim")


def test_the_verdicts_written_in_07_and_the_readme_are_those_of_the_rules(table):
    cells = nbformat.read(files.NOTEBOOKS / "07_claims.ipynb", as_version=4).cells
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    readme = (files.ROOT / "README.md").read_text(encoding="utf-8")
    for page in (text, readme):
        assert written(page) == table["verdict"].to_dict()


def test_the_numbers_written_in_the_readme_are_those_of_the_table(table):
    number = (
        r"[+-]?\d+\.\d+ (?:x|v\.|M|points|and)(?: (?:SegResMamba, released|[^,;|]+?)(?=[,;] | \|))?"
    )
    readme = (files.ROOT / "README.md").read_text(encoding="utf-8")
    rows = {claim: line for line in readme.splitlines() for claim in written(line)}
    for claim, line in rows.items():
        shown = line.partition(claim)[2].replace(" but ", " ")
        there = f"{table['published'][claim]}, {table['measured here'][claim]}"
        for found in re.findall(number, shown):
            assert found.removesuffix(" points") in there, f"{claim}: {found}"
