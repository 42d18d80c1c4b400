"""The self-check: the tables of a run against those that the repository holds, number by number.

`results/reference/<profile>/<dataset>/` holds the tables of the notebooks for seed 0. A count is the same everywhere,
and so is, up to rounding, what is computed from the same numbers. A machine with another rounding trains other
weights, though, as another seed does: what such a training decides may differ by `TOLERANCES`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from srlib import tables
from srlib.files import REFERENCE, atomic_folder, read_json, results_dir, slug

# Columns that a machine's speed or load decides are not compared.
MACHINE = re.compile(
    r"seconds?\b|\btime\b|\((s|ms|kB|mWh|mg)\)|\bkB\b|^ns\b|(measured|allocated|reserved|process) \(GiB\)"
)
ROUNDING = 1e-4  # relative
SCORES = "^(04-first-rows|04-precision|04-summary|08-held-out) .*"
# "table column metric" -> tolerance: a share of the reference, and added to it. The reasons name the largest
# difference that three seeds made in these tables (default profile, two data sets), which each tolerance covers.
TOLERANCES = (
    (r"^03-loss |^04-borders |^04-first-rows .*volume", 0.25, 0.02),  # 18 % of a cross-entropy
    # 0.053; a network that learned nothing: 0.3 and more
    (rf"^03-overfitting |{SCORES}\bdice\b", 0.0, 0.06),
    (rf"{SCORES}\b(nsd|sensitivity)\b", 0.0, 0.15),  # 0.13 in the worst case of 52
    (rf"{SCORES}\bhd95\b", 0.5, 0.5),  # 55 % of it: a distance jumps from voxel to voxel
    (r"^04-volumes ", 1.0, 0.2),  # 0.12 ml, more than the bias itself
    (r"^06-field-untrained ", 0.1, 0.0),  # 9 %
)


def folder(profile: str, dataset: str) -> Path:
    """The folder of the reference tables; it may not exist."""
    return REFERENCE / profile / slug(dataset)


def compare(profile: str, dataset: str, notebooks: Iterable[str]) -> pd.DataFrame:
    """Compare the tables of seed 0 in `results/` with the reference, number by number.

    Args:
        profile: name of a profile.
        dataset: name of a data set.
        notebooks: those that were run; tables are compared whose name starts with the number of one.

    Returns:
        One row a number: `table`, `row`, `column`, `value`, `reference`, `tolerance`, `agrees`.
        A table or a row that only one side has is a row without a value that does not agree.

    Raises:
        FileNotFoundError: the repository holds no reference for this profile and data set.
    """
    stored, computed = folder(profile, dataset), results_dir(profile, dataset) / "tables"
    if not stored.is_dir():
        raise FileNotFoundError(f"no reference for profile {profile}, data set {dataset}")
    numbers = tuple(f"{notebook[:2]}-" for notebook in notebooks)
    found = {file.name for root in (computed, stored) for file in root.glob("*.csv")}
    names = sorted(name for name in found if name.startswith(numbers))
    rows = [row for name in names for row in _compare_table(computed / name, stored / name)]
    columns = ["table", "row", "column", "value", "reference", "tolerance", "agrees"]
    return pd.DataFrame(rows, columns=columns)


def _compare_table(computed: Path, stored: Path) -> Iterator[tuple]:
    """Rows of `compare` for one table."""
    name = stored.stem
    for file, where in ((computed, "this run"), (stored, "the reference")):
        if not file.is_file():
            yield name, 0, f"table missing in {where}", np.nan, np.nan, 0.0, False
            return
    table, reference = (tables.read(file) for file in (computed, stored))
    if len(table) != len(reference) or [*table] != [*reference]:
        yield name, 0, "other rows or columns", np.nan, np.nan, 0.0, False
        return
    numeric = {column for t in (table, reference) for column in t.select_dtypes("number")}
    for column in map(str, table):
        if column not in numeric or MACHINE.search(column):
            continue
        whole = all(pd.api.types.is_integer_dtype(t[column]) for t in (table, reference))
        # where one table has words they are no number, so that they differ from one
        both = (pd.to_numeric(t[column], errors="coerce") for t in (table, reference))
        for row, (value, expected) in enumerate(zip(*both, strict=True)):
            metric = table["metric"][row] if "metric" in table else ""
            allowed = _tolerance(f"{name} {column} {metric}", expected, whole)
            agrees = bool(np.isclose(value, expected, rtol=0, atol=allowed, equal_nan=True))
            yield name, row, column, float(value), float(expected), allowed, agrees


def _tolerance(number: str, reference: float, whole: bool) -> float:
    """By how much a number may differ; whole ones are counts, of which only those of borders depend on a training."""
    if np.isnan(reference) or (whole and "04-borders" not in number):
        return 0.0
    for pattern, share, more in TOLERANCES:
        if re.search(pattern, number):
            return share * abs(reference) + more
    return ROUNDING * abs(reference)


def verdict(comparison: pd.DataFrame) -> str:
    """The comparison in words: how many numbers agree, and each that does not with both values."""
    agree = f"{comparison['agrees'].sum()} of {len(comparison)}"
    lines = [f"{agree} numbers agree with the reference"]
    lines += [
        f"  {row.table}, row {row.row}, {row.column}: "
        f"{row.value:.6g}, reference {row.reference:.6g} within {row.tolerance:.2g}"
        for row in comparison[~comparison["agrees"]].itertuples()
    ]
    return "\n".join(lines)


def store(profile: str, dataset: str) -> None:
    """For maintainers: make the tables of the notebooks that were run the reference; those of others stay.

    Raises:
        FileNotFoundError: nothing has been computed.
    """
    source, target = results_dir(profile, dataset), folder(profile, dataset)
    if not (source / "manifest.json").is_file():
        raise FileNotFoundError(f"nothing has been computed: no manifest in {source}")
    what = "a manifest of the collection"
    manifest = read_json(source / "manifest.json", what, notebooks=dict)
    replaced = tuple(f"{notebook[:2]}-" for notebook in manifest["notebooks"])
    with atomic_folder(target) as partial:
        if target.is_dir():
            before = read_json(target / "manifest.json", what, notebooks=dict)
            manifest["notebooks"] = before["notebooks"] | manifest["notebooks"]
            for table in target.glob("*.csv"):
                if not table.name.startswith(replaced):
                    shutil.copy(table, partial)
        shutil.copytree(source / "tables", partial, dirs_exist_ok=True)
        text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
        (partial / "manifest.json").write_text(text)
        shutil.rmtree(target, ignore_errors=True)
