"""Statistics of a comparison: means with intervals, paired differences, and what the cases could have shown.

Every function takes a table with a row for each run, case and class, as `srlib.study.grid.cases` returns it: columns
`system`, `fold`, `seed`, `steps`, `minutes`, `case`, `class` and the metrics of `srlib.run.evaluate` (which names their
implementations). Aggregation follows Metrics Reloaded (Maier-Hein et al. 2024), in this order:

1. a metric belongs to one case and class; where a structure is empty it has a documented value, so that no case
   falls out;
2. class `MEAN`: over the classes within a case;
3. over the seeds within a case, for trainings of one system differ, but are no further cases;
4. over the cases. Those of several folds are pooled: each case is held out once.

| column | meaning | implementation |
|---|---|---|
| `mean`, `difference` | mean over the cases; of a difference: system minus reference, within each case | pandas |
| `low`, `high` | 95 % interval of that mean, cases drawn anew, BCa, seeded | `scipy.stats.bootstrap` |
| `p` | Wilcoxon's signed-rank test of the differences, two-sided | `scipy.stats.wilcoxon` |
| `p_holm` | `p` corrected over all rows that one call returns (Holm) | `statsmodels` `multipletests` |
| `detectable` | mean difference that such cases show with 80 % power at 5 % | `statsmodels` `TTestPower` |
| `sd_cases` | standard deviation between cases (of a difference: between its cases) | pandas |
| `sd_seeds` | standard deviation between seeds of a fold's mean, pooled over the folds; NaN for one seed | pandas |
| `se_seeds` | standard error of the mean that the choice of seeds gives | pandas |
| `df_seeds` | degrees of freedom of both: trainings less folds | pandas |
| `low_all`, `high_all` | 95 % interval for other cases and seeds; of seeds Welch's, in quadrature | `scipy.stats.t` |

`low` and `high` speak of other cases for these trained networks, and leave out that another training gives another
network: a difference is shown only where `low_all` and `high_all` leave out zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats
from statsmodels.stats.multitest import multipletests  # type: ignore[import-untyped]
from statsmodels.stats.power import TTestPower  # type: ignore[import-untyped]

from srlib.data import cue
from srlib.data.catalog import MEAN
from srlib.run.evaluate import METRICS

LEVEL, POWER = 0.95, 0.8
RESAMPLES = 9999
UNIT = ["system", "class", "metric"]
KEYS = ["system", "fold", "seed", "case", "class"]


def case_values(cases: pd.DataFrame, metrics: Sequence[str] = METRICS) -> pd.DataFrame:
    """One value for each system, class, metric and case: the mean over its seeds.

    Returns:
        Columns `system`, `class`, `metric`, `case`, `value`; the class `MEAN` comes after the others.
    """
    units = _long(cases, metrics).groupby([*UNIT, "case"], sort=False)
    return units["value"].mean().reset_index()


def run_means(cases: pd.DataFrame, metrics: Sequence[str] = METRICS) -> pd.DataFrame:
    """The mean over the cases of each training.

    Returns:
        Columns `system`, `class`, `metric`, `fold`, `seed`, `value`.
    """
    units = _long(cases, metrics).groupby([*UNIT, "fold", "seed"], sort=False)
    return units["value"].mean().reset_index()


def summary(cases: pd.DataFrame, metrics: Sequence[str] = METRICS) -> pd.DataFrame:
    """Each system by itself: a row for each system, class and metric.

    Returns:
        Columns `system`, `class`, `metric`, `n` (cases), `runs` (trainings), `mean`, `low`, `high`, `sd_cases`,
        `sd_seeds`, `se_seeds`, `df_seeds`.
    """
    rows = []
    for unit, long in _long(cases, metrics).groupby(UNIT, sort=False):
        values = long.groupby("case")["value"].mean()
        low, high = interval(values)
        counts = {"n": len(values), "runs": long.groupby(["fold", "seed"]).ngroups}
        means = {"mean": values.mean(), "low": low, "high": high, "sd_cases": values.std()}
        rows.append(dict(zip(UNIT, unit, strict=True)) | counts | means | _seeds(long))
    return pd.DataFrame(rows)


def differences(
    cases: pd.DataFrame, reference: str, metrics: Sequence[str] = METRICS
) -> pd.DataFrame:
    """Every other system minus the reference, within each case that both were evaluated on.

    Returns:
        Columns `system`, `class`, `metric`, `case`, `difference`.

    Raises:
        ValueError: the reference is not in the table, there is no other, or one shares no case with it.
    """
    values = case_values(cases, metrics)
    is_reference = values["system"] == reference
    if not is_reference.any() or is_reference.all():
        systems = ", ".join(values["system"].unique())
        raise ValueError(f"{reference!r} and a system to compare it with are needed, got {systems}")
    paired = values[~is_reference].merge(
        values[is_reference], on=["class", "metric", "case"], suffixes=("", "_reference")
    )
    for system in set(values["system"]) - {reference, *paired["system"]}:
        raise ValueError(f"{system!r} and {reference!r} share no case")
    paired["difference"] = paired["value"] - paired["value_reference"]
    return paired[[*UNIT, "case", "difference"]]


def compare(
    cases: pd.DataFrame,
    reference: str,
    metrics: Sequence[str] = METRICS,
    classes: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Every other system against the reference over the same cases: a row for each system, class and metric.

    Args:
        cases: runs of one budget, equal steps or equal minutes.
        reference: the system that is subtracted.
        metrics: those compared.
        classes: those compared (`MEAN` is one); `None` is all. Systems, metrics and classes make the family of
            Holm's correction, so ask for those only that the question is about.

    Returns:
        Columns `system`, `reference`, `class`, `metric`, `n`, `difference`, `low`, `high`, `low_all`, `high_all`,
        `sd_cases`, `se_seeds`, `p`, `p_holm`, `detectable`.
    """
    paired = differences(cases, reference, metrics)
    if classes is not None:
        if unknown := sorted(set(classes) - set(paired["class"])):
            raise ValueError(f"the table of cases has no class {', '.join(unknown)}")
        paired = paired[paired["class"].isin(classes)]
    units = _long(cases, metrics).groupby(UNIT, sort=False)
    rows = []
    for (system, name, metric), cells in paired.groupby(UNIT, sort=False):
        both = [units.get_group((key, name, metric)) for key in (system, reference)]
        se_seeds, reach = _welch(*(_seeds(of[of["case"].isin(cells["case"])]) for of in both))
        values = cells["difference"]
        mean, (low, high) = values.mean(), interval(values)
        all_seeds = {
            "low_all": mean - math.hypot(mean - low, reach),
            "high_all": mean + math.hypot(high - mean, reach),
        }
        rows.append(
            {"system": system, "reference": reference, "class": name, "metric": metric}
            | {"n": len(values), "difference": mean, "low": low, "high": high, **all_seeds}
            | {"sd_cases": values.std(), "se_seeds": se_seeds}
            | {"p": signed_rank(values), "p_holm": math.nan, "detectable": detectable(values)}
        )
    table = pd.DataFrame(rows)
    table["p_holm"] = multipletests(table["p"], method="holm")[1]
    return table


def in_words(row: Mapping[Any, Any]) -> str:
    """One row of `compare` as a sentence; that there is no difference is an interval, too."""
    number = "{:+.3f}".format
    seeds = "one seed"
    if not math.isnan(row["se_seeds"]):
        seeds = f"{number(row['low_all'])} to {number(row['high_all'])} with other seeds"
    return (
        f"{row['system']} minus {row['reference']}, {row['metric']}, {row['class']}: "
        f"{number(row['difference'])} (95 % interval over {row['n']} cases {number(row['low'])} to "
        f"{number(row['high'])}, {seeds}; corrected p {row['p_holm']:.2g}; "
        f"a difference of {row['detectable']:.3f} could have been shown)"
    )


def effect(row: Mapping[Any, Any]) -> str:
    """Direction of a row of `compare` where other cases and other seeds leave no doubt."""
    if math.isnan(row["se_seeds"]):
        return "one seed only"
    if row["low_all"] <= 0 <= row["high_all"]:
        return "no difference shown"
    return "better" if row["difference"] > 0 else "worse"


def interval_in_points(row: Mapping[Any, Any]) -> tuple[float, float]:
    """95 % interval of a difference in Dice points: for other cases and seeds, of one seed for other cases alone."""
    over = "" if math.isnan(row["se_seeds"]) else "_all"
    return 100 * row[f"low{over}"], 100 * row[f"high{over}"]


def volume_ranks(cases: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Rank correlation (Spearman) of 1 - Dice with the reference volume for each class, and its p."""
    return {
        str(name): tuple(stats.spearmanr(rows["volume_ref_ml"], 1 - rows["dice"]))
        for name, rows in cases.groupby("class", sort=False)
    }


def cue_accuracy(cases: pd.DataFrame) -> pd.DataFrame:
    """Share of right answers about the class, for each run of the diagnostic task (`srlib.data.cue`).

    Returns:
        Columns `system`, `title`, `distance`, `seed`, `accuracy`, `found`. Of the voxels that are called A or B in all
        held-out volumes, `accuracy` is the share called right: 1/2 when targets are found but not told apart. `found`
        is their number over that of the targets' voxels.
    """
    distances = {name: recipe.distance for name, recipe in cue.RECIPES.items()}
    table = cases.assign(
        right=cases["sensitivity"] * cases["volume_ref_ml"],
        distance=cases["dataset"].map(distances),
    )
    runs = table.groupby(["system", "title", "distance", "seed"], sort=False)
    sums = runs[["right", "volume_ref_ml", "volume_pred_ml"]].sum()
    accuracy = sums["right"] / sums["volume_pred_ml"]
    found = sums["volume_pred_ml"] / sums["volume_ref_ml"]
    return pd.DataFrame({"accuracy": accuracy, "found": found}).reset_index()


def interval(values: ArrayLike) -> tuple[float, float]:
    """95 % bootstrap interval of the mean; of equal values that value, of a single one NaN."""
    sample = np.sort(np.asarray(values, dtype=float))  # the same whatever the order of the cases
    if len(sample) < 2:
        return math.nan, math.nan
    if np.ptp(sample) == 0:  # the bootstrap has nothing to vary
        return float(sample[0]), float(sample[0])
    # `random_state` is what SciPy before 1.15 calls `rng`; newer versions take both.
    options: dict[str, Any] = {"n_resamples": RESAMPLES, "random_state": np.random.default_rng(0)}
    found = stats.bootstrap((sample,), np.mean, confidence_level=LEVEL, method="BCa", **options)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def signed_rank(differences: ArrayLike) -> float:
    """Wilcoxon's p, two-sided; cases without a difference are left out, and 1 if no case has one."""
    sample = np.asarray(differences, dtype=float)
    return float(stats.wilcoxon(sample).pvalue) if sample.any() else 1.0


def detectable(differences: ArrayLike) -> float:
    """The smallest mean difference that so many cases show with 80 % power at 5 %, two-sided; NaN for one case."""
    sample = np.asarray(differences, dtype=float)
    if len(sample) < 2:
        return math.nan
    deviations = TTestPower().solve_power(nobs=len(sample), alpha=1 - LEVEL, power=POWER)
    return float(sample.std(ddof=1) * deviations)


def _long(cases: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """A row for each system, fold, seed, case, class (`MEAN` too) and metric.

    Raises:
        ValueError: a table whose means would mislead.
    """
    missing = {*KEYS, "steps", "minutes", *metrics} - set(cases.columns)
    if missing:
        raise ValueError(f"the table of cases lacks the columns {', '.join(sorted(missing))}")
    if cases.empty or cases[list(metrics)].isna().any(axis=None):
        raise ValueError("the table of cases is empty or has values that are missing")
    one_time = cases["minutes"].notna().all() and cases["minutes"].nunique() == 1
    if cases["steps"].nunique() > 1 and not one_time:
        budgets = cases[["steps", "minutes"]].drop_duplicates().to_dict("records")
        raise ValueError(f"runs of different budgets must not be compared: {budgets}")
    if cases.duplicated(KEYS).any():
        raise ValueError("the table of cases has a run's case twice, perhaps of two grids")
    if (cases.groupby(["system", "case"])["fold"].nunique() > 1).any():
        raise ValueError("a case is held out in more than one fold")
    per_case = cases.groupby(KEYS[:-1], sort=False)[list(metrics)].mean().reset_index()
    both = pd.concat([cases[[*KEYS, *metrics]], per_case.assign(**{"class": MEAN})])
    return both.melt(KEYS, list(metrics), "metric")


def _seeds(long: pd.DataFrame) -> dict[str, float]:
    """`sd_seeds`, `se_seeds` and `df_seeds` of one system, class and metric."""
    runs = long.groupby(["fold", "seed"])["value"].agg(["mean", "size"]).reset_index()
    folds = runs.groupby("fold")
    freedom = len(runs) - folds.ngroups
    if freedom == 0:
        return {"sd_seeds": math.nan, "se_seeds": math.nan, "df_seeds": 0}
    sd = math.sqrt(((runs["mean"] - folds["mean"].transform("mean")) ** 2).sum() / freedom)
    share = folds["size"].first() / folds["size"].first().sum()  # of the cases that a fold holds
    se = sd * math.sqrt((share**2 / folds.size()).sum())
    return {"sd_seeds": sd, "se_seeds": se, "df_seeds": freedom}


def _welch(*systems: dict[str, float]) -> tuple[float, float]:
    """Standard error of a difference of two systems by their seeds, and half of its 95 % interval."""
    squares = np.array([system["se_seeds"] ** 2 for system in systems])
    if not squares.sum() > 0:  # no spread, or NaN
        return float(squares.sum()), float(squares.sum())
    freedom = squares.sum() ** 2 / sum(squares**2 / [system["df_seeds"] for system in systems])
    error = math.sqrt(squares.sum())
    return error, error * float(stats.t.ppf((1 + LEVEL) / 2, freedom))
