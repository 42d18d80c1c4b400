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
from srlib.show import charts
from srlib.study import claims, grid, statistics
from srlib.study.claims import FAILS, HOLDS, OPEN, PART, UNTESTED
from srlib.study.published import published

MEMORY, COMPARABLE, MACS, TIME, ENERGY, TOM, PARTS, PARAMETERS, ABSTRACT = claims.CLAIMS
STEP, COUNTED = TABLES = ("gpu/step.csv", "memory/counted.csv")
EQUAL = dict.fromkeys(SMALL, 0.0)


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


def changed(file, column, factor, network="segresmamba", rows=""):
    """Multiply a network's values in a table, or in some rows of it."""
    table = pd.read_csv(file)
    chosen = table.iloc[:, 0].eq(network) if "peer" in table else table["network"].eq(network)
    chosen &= table.index.isin(table.query(rows).index) if rows else True
    table[column] = table[column].astype(float)
    table.loc[chosen, column] *= factor
    table.to_csv(file, index=False)


@pytest.mark.parametrize(
    ("shown", "excluded", "words"),
    [("11", "00", HOLDS), ("10", "01", PART), ("00", "11", FAILS), ("00", "10", OPEN)],
)
def test_verdict(shown, excluded, words):
    columns = (pd.Series([bit == "1" for bit in bits]) for bits in (shown, excluded))
    assert claims.verdict(*columns) == words


@pytest.mark.parametrize(
    ("claim", "file", "columns"),
    [
        (MEMORY, STEP, ["peak_gib"]),
        (MACS, COUNTED, ["gmacs"]),
        (TIME, STEP, ["captured_ms", "eager_ms"]),
        (ENERGY, STEP, ["joules"]),
    ],
)
def test_a_row_changes_when_its_table_does(reference, claim, file, columns):
    for factor, words in ((1e-3, HOLDS), (1e6, FAILS)):
        for column in columns:
            changed(reference / file, column, factor)
        assert claims.finding(claim).verdict == words


def test_settings_are_like_with_like_and_each_counts(reference):
    found = claims.ratios("memory")
    rows = pd.read_csv(reference / STEP).set_index(["network", "precision", "recomputation"])
    peaks = rows["peak_gib"].unstack("network")
    for name, title in (("unetr", "UNETR"), ("unet", "UNET")):
        for setting, again in (("plain", "off"), ("checkpoints", "on")):
            expected = peaks["segresmamba"]["bf16", again] / peaks[name]["bf16", again]
            assert found.loc[title, f"bf16 {setting}"] == pytest.approx(expected)
        best = peaks.loc["bf16"].min()
        expected = best["segresmamba"] / best[name]
        assert found.loc[title, "bf16 best"] == pytest.approx(expected)
    changed(reference / STEP, "peak_gib", 1e3, rows="recomputation == 'on'")
    sentence = claims.finding(MEMORY).sentence
    assert "in some settings against" in sentence
    assert "in every setting" not in sentence


def test_a_setting_without_a_row_is_said_to_be_not_measured(reference):
    table = pd.read_csv(reference / STEP).query("precision == 'bf16'")
    table.to_csv(reference / STEP, index=False)
    assert "not measured: fp32)" in claims.finding(MEMORY).sentence
    whole = pd.concat([table, table.assign(precision="fp32")])
    whole.to_csv(reference / STEP, index=False)
    assert "not measured" not in claims.finding(MEMORY).sentence
    whole[whole["recomputation"] == "off"].to_csv(reference / STEP, index=False)
    answer = claims.finding(MEMORY)
    assert answer.verdict == UNTESTED
    assert answer.sentence == "not measured: bf16 best"


def test_parameters_hold_as_printed_and_in_part_by_a_reading(reference):
    assert claims.reading() == 119_976_114
    assert claims.finding(PARAMETERS).verdict == PART
    changed(reference / COUNTED, "parameters", 1.1, network="segresmamba_released")
    assert claims.finding(PARAMETERS).verdict == FAILS
    counted = pd.read_csv(reference / COUNTED).query("peer == 'segresmamba' and size == 128")
    changed(reference / COUNTED, "trained", 119.98e6 / counted["trained"].iloc[0])
    assert claims.finding(PARAMETERS).verdict == HOLDS


def test_what_lacks_its_table_has_not_been_tested(reference):
    (reference / COUNTED).unlink()
    for claim in (MACS, TOM):
        assert claims.finding(claim).verdict == UNTESTED
        assert claims.finding(claim).found.empty


@pytest.mark.parametrize(
    ("claim", "shifts", "words"),
    [
        (TOM, {"none": -0.02, "conv": -0.02}, HOLDS),
        (TOM, {"none": -0.02, "conv": 0.0}, PART),
        (TOM, {"none": 0.0, "conv": 0.0}, FAILS),
        (TOM, {"none": -0.02}, PART),
        (PARTS, {"neither": -0.04, "no_extra_conv": -0.02}, HOLDS),  # as table 4 steps
        (PARTS, {"neither": -0.02, "no_extra_conv": -0.02}, PART),
        (PARTS, {"neither": 0.0, "no_extra_conv": 0.0}, FAILS),
        (COMPARABLE, EQUAL, HOLDS),
        (COMPARABLE, EQUAL | {"unet": -0.03}, HOLDS),
        (COMPARABLE, EQUAL | {"unet": 0.03}, PART),
        (COMPARABLE, dict.fromkeys(SMALL, 0.03), FAILS),
        (COMPARABLE, dict.fromkeys(SMALL, 0.005), OPEN),
    ],
)
def test_claims_about_dice(monkeypatch, claim, shifts, words):
    with_runs(monkeypatch, {"segresmamba": 0.0, **shifts}, noise_sd=0.002, seed_sd=0.0002)
    assert claims.finding(claim).verdict == words


def test_each_rival_s_place_is_named(monkeypatch):
    shifts = EQUAL | {"unet": 0.03, "unetr": -0.03, "segmamba": 0.005}
    del shifts["swin_unetr"]
    with_runs(monkeypatch, {"segresmamba": 0.0, **shifts}, noise_sd=0.002, seed_sd=0.0002)
    places = claims.gains("peers")["is"]
    assert places.to_dict() == {
        "UNETR": "ahead",
        "SwinUNETR": UNTESTED,
        "UNET": "behind",
        "U-Net of nnU-Net's shape": "comparable",
        "SegMamba": "behind",  # but by half a point, more or less
        "SegResNet": "comparable",  # the plan has it, the paper does not
    }
    sentence = claims.finding(COMPARABLE).sentence
    assert "ahead of UNETR (+" in sentence
    assert "behind SegMamba (-" in sentence
    assert "and UNET (-3" in sentence
    assert "not tested against SwinUNETR" in sentence


def test_intervals_are_corrected_inside_the_claim_alone(monkeypatch):
    with_runs(monkeypatch, {"segresmamba": 0.0, "none": 0.0, "conv": 0.0, **EQUAL})
    runs = pd.concat([grid.cases("tom")])
    expected = statistics.compare(
        runs, "segresmamba", ("dice",), [statistics.MEAN], ["none", "conv"]
    )
    assert claims.gains("ToM")["high"].tolist() == (-100 * expected["low_all"]).tolist()
    assert (expected["level"] == 0.975).all()


def test_one_seed_of_all_decides_nothing(monkeypatch):
    with_runs(monkeypatch, {"segresmamba": 0.0, "none": -0.02, "conv": -0.02}, seeds=(0,))
    answer = claims.finding(TOM)
    assert answer.verdict == OPEN
    assert answer.sentence.endswith(
        "one training a fold, so no interval for other trainings is known"
    )


def test_wide_intervals_decide_nothing(monkeypatch):
    with_runs(monkeypatch, {"segresmamba": 0.0, "none": -0.005, "conv": -0.005}, noise_sd=0.2)
    assert claims.finding(TOM).verdict == OPEN


def test_a_rival_without_some_folds_is_not_tested(monkeypatch):
    cases = case_tables.cases({"segresmamba": 0.0, "none": 0.0, "conv": 0.0}, folds=(0, 1), n=20)
    lacking = cases[~((cases["system"] == "conv") & (cases["fold"] == 1))]
    monkeypatch.setattr(grid, "cases", lambda name: lacking)
    found = claims.gains("ToM")
    assert found.loc["no ToM", "n"] == 40
    assert found.loc["convolution for ToM", "is"] == UNTESTED


def test_the_abstract_is_as_good_as_its_parts(reference, monkeypatch):
    assert claims.finding(ABSTRACT).verdict == PART
    for name in ("captured_ms", "eager_ms", "joules", "peak_gib"):
        changed(reference / STEP, name, 1e-3)
    changed(reference / COUNTED, "gmacs", 1e-3)
    with_runs(monkeypatch, {"segresmamba": 0.0, **EQUAL}, noise_sd=0.002, seed_sd=0.0002)
    answer = claims.finding(ABSTRACT)
    assert (answer.verdict, answer.sentence) == (HOLDS, "claims 1, 2, 3, 4 and 5: holds")


def test_published_tables_have_the_printed_values():
    assert published("table7_size_btcv").loc["SegResMamba"].to_dict() == {
        "params_m": 119.98,
        "flops_g": 188.42,
    }
    assert published("table8_training_memory_gb").loc["UNETR", "spleen_96"] == 0.14


def test_evidence_is_real_data():
    assert not data.get(grid.DATASET).virtual


def test_the_page_has_a_row_for_each_claim_with_its_numbers():
    answers = claims.findings()
    page = BeautifulSoup(pages.claims_page(answers), "html.parser")
    assert "Dice: no committed runs" in page.caption.text
    assert [cell.text for cell in page.select("th[scope=row]")] == [*claims.CLAIMS]
    signed = [f"{charts.SIGNS[answer.verdict][0]} {answer.verdict}" for answer in answers.values()]
    assert [cell.text for cell in page.select("strong")] == signed
    strips = page.select("img[alt]")
    assert len(strips) == len(page.select("details")) == 8
    assert "UNETR" in page.select("details")[0].text
    for cell, answer in zip(page.select("td:last-child"), answers.values(), strict=True):
        assert cell.text.startswith(answer.sentence)


def test_a_number_without_an_interval_stands_alone():
    numbers = pd.Series({"table 5": 1.27, "here": -0.02, "low": -0.2, "high": 0.1})
    assert pages._numbers(numbers) == "table 5: 1.27; here: -0.02 (-0.20 to 0.10)"
    assert pages._numbers(numbers[:2]) == "table 5: 1.27; here: -0.02"


def written(text):
    """Claims and verdicts of a text: its paragraphs `**claim: verdict.** ...` and rows `| claim | verdict | ...`."""
    names = "|".join(map(re.escape, claims.CLAIMS))
    verdicts = "|".join((PART, HOLDS, FAILS, OPEN, UNTESTED))
    pattern = rf"(?m)^(?:\*\*|\| )({names})(?:: | \| )({verdicts})(?:\.\*\*| \|)"
    return dict(re.findall(pattern, text))


@pytest.fixture
def answers(monkeypatch):
    """What the repository's own tables say."""
    monkeypatch.undo()
    return claims.findings()


def test_what_is_written_in_07_and_the_readme_is_what_the_rules_say(answers):
    verdicts = {claim: answer.verdict for claim, answer in answers.items()}
    cells = nbformat.read(files.NOTEBOOKS / "07_claims.ipynb", as_version=4).cells
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert written(text) == verdicts
    readme = (files.ROOT / "README.md").read_text(encoding="utf-8")
    assert written(readme) == verdicts
    for claim, answer in answers.items():
        assert f"| {claim} | {answer.verdict} | {answer.sentence} |" in readme
    assert claims.evidence().endswith(" 1 seed") == ("one training a fold" in text)


def test_a_published_number_stands_in_the_row_of_the_one_measured_here(answers):
    for claim, printed in claims.CLAIMS.items():
        if printed.printed.columns.isin(["table 4", "table 5"]).any():
            assert {*printed.printed.index} == {*answers[claim].found.index}
