"""The self-check: do the tables of a run agree with those that the repository holds?

`results/reference/<profile>/<dataset>/seed-<n>/` holds the tables of the same notebooks for three
seeds. A machine with other rounding trains other weights, as another seed does; so what may differ,
and by how much, is read off the spread between the seeds:

    tolerance = SPREADS * sqrt(2) * sd,   sd = root mean square of the cells' standard deviations

(the difference of two such values spreads sqrt(2) times as much as one). Cells are pooled by column because
three values alone give a poor standard deviation; where rows name a `metric`, by column and metric, since
these have several units. A number that is the same for every seed (a count, a shape) has to be the same
again, up to rounding; so does all that only seed 0 has, which is what notebooks write that know no seed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from srlib.paths import REFERENCE, atomic_folder, results_dir, slug

SEEDS = (0, 1, 2)
SPREADS = 4.0  # a normal difference beyond four standard deviations is one in 16,000
ROUNDING = 1e-4  # relative; of floating-point numbers that no seed changes
# Columns that a machine's speed or load decides are not compared.
MACHINE = re.compile(
    r"seconds?\b|\btime\b|\((s|ms|kB|mWh|mg)\)|\bkB\b|^ns\b|(measured|allocated|reserved|process) \(GiB\)"
)


def folder(profile: str, dataset: str, seed: int) -> Path:
    """Where the reference tables of one seed are."""
    return REFERENCE / profile / slug(dataset) / f"seed-{seed}"


def exists(profile: str, dataset: str) -> bool:
    """Whether the repository holds a reference for this profile and data set."""
    return all(folder(profile, dataset, seed).is_dir() for seed in SEEDS)


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
    if not exists(profile, dataset):
        raise FileNotFoundError(f"no reference for profile {profile}, data set {dataset}")
    references = [folder(profile, dataset, seed) for seed in SEEDS]
    computed = results_dir(profile, dataset) / "tables"
    numbers = tuple(f"{notebook[:2]}-" for notebook in notebooks)
    names = {file.name for root in (computed, references[0]) for file in root.glob("*.csv")}
    rows: list[dict] = []
    for name in sorted(name for name in names if name.startswith(numbers)):
        others = [root / name for root in references[1:] if (root / name).is_file()]
        rows += _compare_table(name, computed / name, [references[0] / name, *others])
    columns = ["table", "row", "column", "value", "reference", "tolerance", "agrees"]
    return pd.DataFrame(rows, columns=columns)


def verdict(comparison: pd.DataFrame) -> str:
    """The comparison in words: how many numbers agree, and each that does not with both values."""
    differing = comparison[~comparison["agrees"]]
    lines = [
        f"{len(comparison) - len(differing)} of {len(comparison)} numbers agree with the reference"
    ]
    lines += [
        f"  {row.table}, row {row.row}, {row.column}: "
        f"{row.value:.6g}, reference {row.reference:.6g} within {row.tolerance:.2g}"
        for row in differing.itertuples()
    ]
    return "\n".join(lines)


def store(profile: str, dataset: str) -> None:
    """For maintainers: make the tables of the notebooks that were run, of each seed that was, the reference.

    What else the reference holds stays, so that a change of one notebook needs no run of the others.

    Raises:
        FileNotFoundError: nothing has been computed, or a seed neither now nor before.
    """
    sources = {seed: results_dir(profile, dataset, seed) for seed in SEEDS}
    computed = {seed for seed in SEEDS if (sources[seed] / "manifest.json").is_file()}
    if not computed:
        raise FileNotFoundError(f"nothing has been computed: no manifest in {sources[SEEDS[0]]}")
    for seed in set(SEEDS) - computed:
        if not folder(profile, dataset, seed).is_dir():
            raise FileNotFoundError(
                f"seed {seed} has not been computed: no manifest in {sources[seed]}"
            )
    for seed in sorted(computed):
        _store(sources[seed], folder(profile, dataset, seed))


def _store(source: Path, target: Path) -> None:
    """Put the tables and the manifest of one seed's run in the place of those of the same notebooks."""
    manifest = json.loads((source / "manifest.json").read_text())
    replaced = tuple(f"{notebook[:2]}-" for notebook in manifest["notebooks"])
    with atomic_folder(target) as partial:
        if target.is_dir():
            before = json.loads((target / "manifest.json").read_text())
            manifest["notebooks"] = before["notebooks"] | manifest["notebooks"]
            for table in target.glob("*.csv"):
                if not table.name.startswith(replaced):
                    shutil.copy(table, partial)
        shutil.copytree(source / "tables", partial, dirs_exist_ok=True)
        text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
        (partial / "manifest.json").write_text(text)
        shutil.rmtree(target, ignore_errors=True)


def _compare_table(name: str, computed: Path, references: Sequence[Path]) -> list[dict]:
    """Rows of `compare` for one table; the first reference is seed 0's, the others give the spread."""
    nothing = {"table": Path(name).stem, "row": 0, "value": np.nan, "reference": np.nan}
    if not computed.is_file() or not references[0].is_file():
        missing = "in this run" if not computed.is_file() else "in the reference"
        return [{**nothing, "column": f"table missing {missing}", "tolerance": 0, "agrees": False}]
    table = _read(computed)
    seeds = [_read(file) for file in references]
    if any(len(other) != len(table) or list(other) != list(table) for other in seeds):
        return [{**nothing, "column": "other rows or columns", "tolerance": 0, "agrees": False}]
    rows = []
    for column in table.select_dtypes("number").columns:
        if MACHINE.search(column):
            continue
        values = np.stack([other[column].to_numpy(float) for other in seeds])  # (seeds, rows)
        spread = np.zeros(len(table))
        if len(seeds) > 1:
            variances = pd.Series(np.var(values, axis=0, ddof=1))
            units = table["metric"] if "metric" in table else np.zeros(len(table))
            pooled = variances.groupby(units).transform("mean").to_numpy()
            spread = SPREADS * np.sqrt(2 * pooled)
        whole = all(pd.api.types.is_integer_dtype(other[column]) for other in (table, *seeds))
        for row, (value, expected) in enumerate(zip(table[column], values[0], strict=True)):
            rounding = 0.0 if whole else ROUNDING * abs(expected)
            tolerance = max(float(spread[row]), rounding)
            agrees = abs(value - expected) <= tolerance or (np.isnan(value) and np.isnan(expected))
            found = {"row": row, "column": column, "value": float(value), "reference": expected}
            rows.append({**nothing, **found, "tolerance": tolerance, "agrees": bool(agrees)})
    return rows


def _read(file: Path) -> pd.DataFrame:
    return pd.read_csv(file, comment="#")
