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
| `sd_cases` | standard deviation between cases (of a difference: between its cases) | pandas |
| `sd_seeds` | standard deviation between a system's trainings of one fold; NaN for one | pandas |
| `se_seeds` | standard error that the choice of seeds gives; its variance is pooled over all systems | pandas |
| `df_seeds` | degrees of freedom of that variance: trainings less pairs of system and fold | pandas |
| `p` | smallest level at which the interval for other cases and seeds leaves out the margin's ends | bisection |
| `p_holm` | `p` corrected over all rows that one call returns (Holm 1979) | `statsmodels` `multipletests` |
| `level` | level of the step at which Holm's procedure decides on that row, 95 % or higher | |
| `low_all`, `high_all` | interval of that level for other cases (BCa) and seeds (Student), by MOVER | `scipy.stats.t` |
| `signed_rank` | Wilcoxon's p of the differences of these trainings, not corrected | `scipy.stats.wilcoxon` |
| `signed_rank_holm` | the same, corrected | `statsmodels`' `multipletests` |
| `detectable` | mean difference that such cases show with 80 % power at 5 % | `statsmodels` `TTestPower` |

`low` and `high` speak of other cases for these trained networks, and leave out that another training gives another
network. A verdict asks `low_all` and `high_all`. Both distances from the mean are added in quadrature (MOVER: Zou and
Donner 2008). One or two further seeds say little about one system's spread, so all systems are taken to have the same.
`p_holm` is below 5 % exactly where that interval leaves out the ends of the margin (Serlin 1993): zero alone, or,
for equivalence, both ends, which is two one-sided tests (TOST) at half of the level each. Directions are read off
as is usual with Holm (Shaffer 1980).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests  # type: ignore[import-untyped]
from statsmodels.stats.power import TTestPower  # type: ignore[import-untyped]

from srlib.data import mirror
from srlib.data.catalog import MEAN, TASKS_OF
from srlib.run.evaluate import METRICS

LEVEL, POWER = 0.95, 0.8
RESAMPLES = 9999  # no p is smaller than one of them
UNIT = ["system", "class", "metric"]
KEYS = ["system", "fold", "seed", "case", "class"]
CARRIES = 0.75  # mean accuracy from which a system carries the mark: docs/plan.md, "Distance"
POINT = ["task", "axis", "distance"]


def complete(cases: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Cases of the systems that have all folds of the reference; none if it has none.

    Which folds a grid holds that is not finished is chance, and some folds are harder than others.
    """
    folds = {key: {*of} for key, of in cases.groupby("system")["fold"]}
    whole = [key for key, of in folds.items() if of >= folds.get(reference, {None})]
    return cases[cases["system"].isin(whole)]


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
    long_table = _long(cases, metrics)
    spread, rows = _pooled(long_table), []
    for unit, long in long_table.groupby(UNIT, sort=False):
        values = long.groupby("case")["value"].mean()
        low, high = interval(values)
        counts = {"n": len(values), "runs": long.groupby(["fold", "seed"]).ngroups}
        means = {"mean": values.mean(), "low": low, "high": high, "sd_cases": values.std()}
        own = _pooled(long)[unit[1:]][0]
        pooled, freedom = spread[unit[1:]]
        seeds = {"sd_seeds": own, "se_seeds": pooled * _share(long), "df_seeds": freedom}
        rows.append(dict(zip(UNIT, unit, strict=True)) | counts | means | seeds)
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
    reference: str | Mapping[str, str],
    metrics: Sequence[str] = METRICS,
    classes: Sequence[str] | None = None,
    systems: Sequence[str] | None = None,
    margin: float = 0.0,
) -> pd.DataFrame:
    """Other systems against the reference over the same cases: a row for each system, class and metric.

    Args:
        cases: runs of one budget, equal steps or equal minutes; all of them say how much seeds matter.
        reference: the system that is subtracted; or system -> the one that is subtracted from it.
        metrics: those compared.
        classes: those compared (`MEAN` is one); `None` is all.
        systems: those compared; `None` is all. Systems, metrics and classes make the family of Holm's correction, so
            ask for those only that the question is about.
        margin: differences up to this, either way, are called equivalent.

    Returns:
        Columns `system`, `reference`, `class`, `metric`, `n`, `difference`, `low`, `high`, `low_all`, `high_all`,
        `level`, `sd_cases`, `se_seeds`, `df_seeds`, `p`, `p_holm`, `signed_rank`, `detectable`, `signed_rank_holm`;
        NaN where they need trainings that differ in their seed only and no system has any.
    """
    if isinstance(reference, str):
        paired = differences(cases, reference, metrics)
        subtracted: Mapping[str, str] = dict.fromkeys(paired["system"], reference)
    else:
        subtracted = reference
        pairs = [(cases[cases["system"].isin(pair)], pair[1]) for pair in reference.items()]
        paired = pd.concat(differences(of, whose, metrics) for of, whose in pairs)
    for column, asked in {"class": classes, "system": systems}.items():
        if unknown := sorted({*asked} - {*paired[column]} if asked is not None else ()):
            raise ValueError(f"the table of cases has no {column} {', '.join(unknown)}")
        paired = paired[paired[column].isin(asked)] if asked is not None else paired
    long = _long(cases, metrics)
    units, spread = long.groupby(UNIT, sort=False), _pooled(long)
    rows, reaches = [], []
    for (system, name, metric), cells in paired.groupby(UNIT, sort=False):
        both = [units.get_group((key, name, metric)) for key in (system, subtracted[str(system)])]
        share = math.hypot(*(_share(of[of["case"].isin(cells["case"])]) for of in both))
        sd, freedom = spread[name, metric]
        values = cells["difference"].to_numpy()
        reaches.append(_reach(values, sd * share, freedom))
        low, high = interval(values)
        rows.append(
            {
                "system": system,
                "reference": subtracted[str(system)],
                "class": name,
                "metric": metric,
            }
            | {"n": len(values), "difference": values.mean(), "low": low, "high": high}
            | {"low_all": math.nan, "high_all": math.nan, "level": math.nan}
            | {"sd_cases": cells["difference"].std(), "se_seeds": sd * share, "df_seeds": freedom}
            | {"p": _smallest_level(reaches[-1], margin), "p_holm": math.nan}
            | {"signed_rank": signed_rank(values), "detectable": detectable(values)}
        )
    table = pd.DataFrame(rows)
    table["signed_rank_holm"] = multipletests(table["signed_rank"], method="holm")[1]
    if (known := table["p"].notna()).any():
        p = table.loc[known, "p"].to_numpy()
        table.loc[known, "p_holm"] = multipletests(p, method="holm")[1]
        table.loc[known, "level"] = _holm_levels(p)
        for row in table.index[known]:
            table.loc[row, ["low_all", "high_all"]] = reaches[row](table.loc[row, "level"])
    return table


def by_budget(cases: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Other systems minus the reference in Dice at each of several budgets: the rule of docs/plan.md, "Time".

    Args:
        cases: runs of equal minutes, of several such budgets.
        reference: the system that is subtracted.

    Returns:
        A row for each budget and each other system that has all of the reference's folds there: columns `minutes`,
        `system`, `n` (cases), `difference` (mean of the classes), `level`, and `low_cases`, `high_cases`, the interval
        of that level for other cases alone, corrected by Holm over the systems of the budget. A system is ahead or
        behind where it leaves out 0; another training is not in it.

    Raises:
        ValueError: the table lacks columns or values, or has runs of equal steps.
    """
    if cases["minutes"].isna().any():
        raise ValueError("runs of equal steps have no minutes; expected those of equal minutes")
    rows: list[dict[str, Any]] = []
    for minutes, runs in cases.groupby("minutes"):
        whole = complete(runs, reference)
        if whole["system"].nunique() < 2:
            continue
        apart = differences(whole, reference, ["dice"]).query("`class` == @MEAN")
        values = dict(list(apart.groupby("system", sort=False)["difference"]))
        reaches = [_bootstrap(of) for of in values.values()]
        levels = _holm_levels(np.array([_smallest_level(reach, 0.0) for reach in reaches]))
        for (system, of), reach, level in zip(values.items(), reaches, levels, strict=True):
            row = {"minutes": minutes, "system": system, "n": len(of), "difference": of.mean()}
            ends = dict(zip(("low_cases", "high_cases"), reach(level), strict=True))
            rows.append(row | {"level": level} | ends)
    columns = ["minutes", "system", "n", "difference", "level", "low_cases", "high_cases"]
    return pd.DataFrame(rows, columns=columns)


def in_words(row: Mapping[Any, Any]) -> str:
    """One row of `compare` as a sentence; that there is no difference is an interval, too."""
    number = "{:+.3f}".format
    seeds = f"trained with one seed; of these trainings Wilcoxon's p, corrected: {row['signed_rank_holm']:.2g}"
    if not math.isnan(row["se_seeds"]):
        ends = f"{number(row['low_all'])} to {number(row['high_all'])}"
        seeds = f"{ends} with other seeds and corrected, p {row['p_holm']:.2g}"
    return (
        f"{row['system']} minus {row['reference']}, {row['metric']}, {row['class']}: "
        f"{number(row['difference'])} (95 % interval over {row['n']} cases {number(row['low'])} to "
        f"{number(row['high'])}; {seeds}; a difference of {row['detectable']:.3f} could have been shown)"
    )


def effect(row: Mapping[Any, Any]) -> str:
    """Direction of a row of `compare` where other cases and other seeds leave no doubt."""
    if math.isnan(row["se_seeds"]):
        return "one seed only"
    if row["low_all"] <= 0 <= row["high_all"]:
        return "no difference shown"
    return "better" if row["difference"] > 0 else "worse"


def interval_in_points(row: Mapping[Any, Any]) -> tuple[float, float]:
    """Interval of a difference in Dice points: the corrected one, and where there is none that for other cases."""
    over = "" if math.isnan(row["se_seeds"]) else "_all"
    return 100 * row[f"low{over}"], 100 * row[f"high{over}"]


def volume_ranks(cases: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Rank correlation (Spearman) of 1 - Dice with the reference volume for each class, and its p."""
    return {
        str(name): tuple(stats.spearmanr(rows["volume_ref_ml"], 1 - rows["dice"]))
        for name, rows in cases.groupby("class", sort=False)
    }


def cue_accuracy(cases: pd.DataFrame) -> pd.DataFrame:
    """Share of right answers about the class, for each run of a diagnostic task (`cue`, `mirror` in `srlib.data`).

    Returns:
        Columns `system`, `title`, `task`, `axis` (along which the mark is far), `distance`, `seed`, `accuracy`,
        `found`. Of the voxels that are called A or B in all held-out volumes, `accuracy` is the share called right:
        1/2 (in `mirror` less, since what is called outside of a hippocampus is wrong) when targets are found but not
        told apart. `found` is their number over that of the targets' voxels.
    """
    recipes = [(name, recipe) for of in TASKS_OF.values() for name, recipe in of.items()]
    table = cases.assign(
        right=cases["sensitivity"] * cases["volume_ref_ml"],
        task=cases["dataset"].str.partition("-")[0],
        axis=cases["dataset"].map({name: recipe.axis for name, recipe in recipes}),
        distance=cases["dataset"].map({name: recipe.distance for name, recipe in recipes}),
    )
    runs = table.groupby(["system", "title", "task", "axis", "distance", "seed"], sort=False)
    sums = runs[["right", "volume_ref_ml", "volume_pred_ml"]].sum()
    # the files hold six digits; more would break ties, and call more than all right
    accuracy = (sums["right"] / sums["volume_pred_ml"]).round(6)
    found = sums["volume_pred_ml"] / sums["volume_ref_ml"]
    return pd.DataFrame({"accuracy": accuracy, "found": found}).reset_index()


def carried(accuracy: pd.DataFrame, reference: str, trainings: int) -> pd.DataFrame:
    """The rules of docs/plan.md, "Distance": which systems carry the mark how far, and which are behind another.

    Args:
        accuracy: a row for each training, as `cue_accuracy` returns it.
        reference: the system that the others are held against.
        trainings: so many of a system at a distance the rules ask for; of fewer or more they decide nothing.

    Returns:
        A row for each system that has a training at a distance: columns `task`, `axis`, `distance` (voxels), `system`,
        `mean`, `lowest` and `highest` (accuracy, 0 to 1), `trainings` (their number), and by the rules True, False or,
        where that is not decided, NA: `carries` (the mean is at least `CARRIES`), `behind` (the reference carries the
        mark, and each of its trainings is higher than each of the system's) and `says_nothing` (of the half-real task:
        no system of the table carries the mark over its shortest distance).

    Raises:
        ValueError: columns, values or the reference are missing, or a training is there twice.
    """
    missing = {*POINT, "system", "seed", "accuracy"} - set(accuracy.columns)
    if missing:
        raise ValueError(f"the table of accuracies lacks the columns {', '.join(sorted(missing))}")
    if accuracy.empty or accuracy["accuracy"].isna().any():
        raise ValueError("the table of accuracies is empty or has values that are missing")
    if accuracy.duplicated([*POINT, "system", "seed"]).any():
        raise ValueError("the table of accuracies has a training twice")
    systems = accuracy["system"].unique()
    if reference not in systems:
        raise ValueError(f"{reference!r} is needed, got {', '.join(systems)}")
    of = accuracy.groupby([*POINT, "system"], sort=False)["accuracy"]
    table = of.agg(mean="mean", lowest="min", highest="max", trainings="size").reset_index()
    carries = (table["mean"] >= CARRIES).astype("boolean")
    table["carries"] = carries.where(table["trainings"] == trainings)
    theirs = table[table["system"] == reference]
    both = table.merge(theirs, how="left", on=POINT, suffixes=("", "_reference"))
    behind = both["carries_reference"] & (both["lowest_reference"] > both["highest"])
    decided = both[["carries", "carries_reference"]].notna().all(axis=1)
    table["behind"] = behind.where(decided)
    half_real = table["task"] == "mirror"
    near = table.loc[half_real & (table["distance"] == min(mirror.DISTANCES)), "carries"]
    lost = bool((~near).sum() == len(systems))
    nothing = (half_real & lost).astype("boolean")
    table["says_nothing"] = nothing.where(~half_real | lost | bool(near.any()))
    return table


def interval(values: ArrayLike, level: float = LEVEL) -> tuple[float, float]:
    """Bootstrap interval of the mean (BCa); of equal values that value, of a single one NaN."""
    return _bootstrap(values)(level)


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


def _pooled(long: pd.DataFrame) -> dict[tuple, tuple[float, int]]:
    """(Class, metric) -> standard deviation between trainings that differ in their seed only, degrees of freedom."""
    runs = long.groupby([*UNIT, "fold", "seed"])["value"].mean()
    squares = (runs - runs.groupby([*UNIT, "fold"]).transform("mean")) ** 2
    trainings, units = squares.groupby(UNIT[1:]), squares.groupby([*UNIT, "fold"]).size()
    freedom = trainings.size() - units.groupby(UNIT[1:]).size()
    sd = (trainings.sum() / freedom.where(freedom > 0)) ** 0.5
    return {unit: (float(sd[unit]), int(freedom[unit])) for unit in sd.index}


def _share(long: pd.DataFrame) -> float:
    """Standard error of a system's mean by its seeds, as a share of the standard deviation between them."""
    runs = long.groupby(["fold", "seed"]).size().groupby("fold").agg(["size", "first"])
    cases = runs["first"] / runs["first"].sum()
    return math.sqrt((cases**2 / runs["size"]).sum())


Ends = Callable[[float], tuple[float, float]]


def _bootstrap(values: ArrayLike) -> Ends:
    """Level -> ends of the mean's interval for other cases; SciPy's BCa, whose means are drawn once for all levels."""
    sample = np.sort(np.asarray(values, dtype=float))  # the same whatever the order of the cases
    if len(sample) < 2 or np.ptp(sample) == 0:  # the bootstrap has nothing to vary
        end = float(sample[0]) if len(sample) > 1 else math.nan
        return lambda level: (end, end)
    # `random_state` is what SciPy before 1.15 calls `rng`; newer versions take both.
    drawn: dict[str, Any] = {"n_resamples": RESAMPLES, "random_state": np.random.default_rng(0)}
    first = stats.bootstrap((sample,), np.mean, **drawn)
    again: dict[str, Any] = {"n_resamples": 0, "bootstrap_result": first}

    def ends(level: float) -> tuple[float, float]:
        found = stats.bootstrap((sample,), np.mean, confidence_level=level, **again)
        return float(found.confidence_interval.low), float(found.confidence_interval.high)

    return ends


def _reach(values: NDArray, error: float, freedom: int) -> Ends:
    """Level -> ends of the mean's interval for other cases and seeds, whose standard error is given (MOVER)."""
    mean, of_cases = float(values.mean()), _bootstrap(values)

    def ends(level: float) -> tuple[float, float]:
        low, high = of_cases(level)
        seeds = error * stats.t.ppf((1 + level) / 2, freedom)
        return mean - math.hypot(mean - low, seeds), mean + math.hypot(high - mean, seeds)

    return ends


def _smallest_level(reach: Ends, margin: float) -> float:
    """The smallest level of a test by an interval that leaves out both ends of the margin; NaN without an interval."""

    def holds_one(level: float) -> bool:
        low, high = reach(1 - level)
        return low <= -margin <= high or low <= margin <= high

    if math.isnan(reach(LEVEL)[0]):
        return math.nan
    low, high = 1 / RESAMPLES, 1.0
    if not holds_one(low):
        return low
    for _ in range(25):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds_one(middle) else (low, middle)
    return high


def _holm_levels(p: NDArray) -> NDArray:
    """Level of the interval of each test: that of the step that decides on it, or of the one that ends them."""
    steps, order = np.arange(len(p)), np.argsort(p, kind="stable")
    levels = (1 - LEVEL) / (len(p) - steps)
    last = np.append(np.flatnonzero(p[order] > levels), len(p) - 1)[0]
    found = np.empty(len(p))
    found[order] = 1 - levels[np.minimum(steps, last)]
    return found
