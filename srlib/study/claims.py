"""The paper's claims, each held against committed tables by a rule; `07_claims` and the front page show the findings.

Published numbers come from `published.json`, measured ones from `results/reference/`. Words about them are written by
hand, in `07_claims` and the README; a test holds every verdict there to the one computed here.

| verdict | memory, MACs, time, energy: SegResMamba's, a multiple of each rival's | Dice: SegResMamba minus each rival |
|---|---|---|
| holds | below the bar against every rival in every setting | shown against each |
| holds in part | against some | shown against some |
| does not hold | against none | shown against none, and each interval excludes what is claimed |
| undecided | | tested, and none of these |
| not tested | no committed table | no committed runs |

The bars of multiples are what is claimed: 0.5 for "less than half", 1 for "reduced". Settings are like with like:
every network plain, every one with checkpoints, and each at the better of both.

A difference in Dice is shown where its interval for other cases and seeds, corrected inside the claim (Holm), lies
above zero, or, for "comparable", within half a point either way. The paper gives no number for that word. A rival
whose interval lies wholly on its side of zero is called better, also where that interval leaves open whether it is
so by more than half a point. What is claimed is excluded by an interval below the printed gain, or below minus half
a point. "Holds" and "does not hold" ask for all rivals at once, so they need no correction; "in part" needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pandas as pd
from monai.networks.nets import SegResNet
from torch import nn

from srlib import files, tables
from srlib.net.model import FEATURES
from srlib.net.peers import PEERS, SMALL
from srlib.net.tom import TriOrientedMamba
from srlib.study import grid, statistics
from srlib.study.published import published

HOLDS, PART, FAILS = "holds", "holds in part", "does not hold"
OPEN, UNTESTED = "undecided", "not tested"
NO_GAIN = "no gain shown"
TITLES = {name: peer.title for name, peer in PEERS.items()}
OURS = TITLES["segresmamba"]
COMPARABLE = 0.5  # Dice points, either way


class Finding(NamedTuple):
    """Answer of the committed tables to a claim.

    Attributes:
        verdict: one of the five.
        sentence: the numbers, and against whom.
        found: a row for each rival: `here`, and the ends `low` and `high` of its interval, or of all settings.
    """

    verdict: str
    sentence: str = "there is no committed table"
    found: pd.DataFrame = pd.DataFrame(columns=["here", "low", "high"], dtype=float)


class Claim(NamedTuple):
    """A claim as the paper makes it.

    Attributes:
        printed: a row for each rival, a column for each table.
        claimed: ends of the numbers that agree with it.
        unit: of the numbers.
        test: what finds the answer; it raises FileNotFoundError where no table has one.
    """

    printed: pd.DataFrame
    claimed: tuple[float, float]
    unit: str
    test: Callable[[], Finding]


def verdict(shown: pd.Series, excluded: pd.Series) -> str:
    """One of four, by which comparisons show what is claimed and which exclude it."""
    if shown.any():
        return HOLDS if shown.all() else PART
    return FAILS if excluded.all() else OPEN


def names(of: Iterable[str]) -> str:
    """Names in a sentence."""
    *most, last = [*of] or ["none"]
    return f"{', '.join(most)} and {last}" if most else last


def _with(form: str, values: pd.Series) -> str:
    """Rivals with their numbers in a sentence."""
    return names(f"{name} ({value:{form}})" for name, value in values.items())


# --- Memory, arithmetic, time and energy: multiples of each rival's -------------------------------


def on_gpu(column: str) -> pd.DataFrame:
    """A column of the table of a GPU's steps, of networks in the paper's size at 128^3, like with like.

    Returns:
        A row for each network, by title; for each precision a column `plain`, `checkpoints` and `best`, the lower of
        both; NaN: not measured.
    """
    rows = tables.read(files.REFERENCE / "gpu" / "step.csv").set_index("network")
    found = pd.DataFrame(index=[*TITLES])
    for precision in ("fp32", "bf16"):
        of = rows[rows["precision"] == precision]
        plain, again = (of.loc[of["recomputation"] == on, column] for on in ("off", "on"))
        found = found.assign(**{f"{precision} plain": plain, f"{precision} checkpoints": again})
        found[f"{precision} best"] = found.iloc[:, -2:].min(axis=1, skipna=False)
    return found.rename(TITLES)


def counted(column: str) -> pd.DataFrame:
    """A column of the table of counts in fp32 without checkpoints: a row for each network, a column for each size."""
    rows = tables.read(files.REFERENCE / "memory" / "counted.csv")
    rows = rows[(rows["precision"] == "fp32") & ~rows["checkpointing"]]
    return rows.pivot(index="peer", columns="size", values=column).rename(TITLES)


class Resource(NamedTuple):
    """A claim that SegResMamba needs less.

    Attributes:
        printed: label -> table and column.
        measured: what makes a table with a row for each network, a column for each setting.
        first: the setting whose numbers are shown.
        bar: multiple of a rival's that what is claimed lies below.
    """

    printed: dict[str, tuple[str, str]]
    measured: Callable[[], pd.DataFrame]
    first: str = "bf16 best"
    bar: float = 1


_TABLE8 = {"BTCV": "btcv_128", "BraTS": "brats_128", "Spleen": "spleen_96"}
_TABLES = {"table 1": "table1_btcv", "table 2": "table2_brats21", "table 3": "table3_spleen"}
RESOURCES = {
    "memory": Resource(
        {label: ("table8_training_memory_gb", column) for label, column in _TABLE8.items()},
        lambda: on_gpu("peak_gib"),
        bar=0.5,
    ),
    "MACs": Resource(
        {label: (table, "macs_g") for label, table in _TABLES.items()},
        lambda: counted("gmacs")[[128, 96]].rename(columns="counted at {}^3".format),
        "counted at 128^3",
    ),
    "time": Resource(
        {"table 6": ("table6_time_co2", "epoch_s")},
        lambda: on_gpu("captured_ms").join(on_gpu("eager_ms").add_suffix(", eager")),
    ),
    "energy": Resource({"table 6": ("table6_time_co2", "co2_kg_azure")}, lambda: on_gpu("joules")),
}


def printed(resource: str) -> pd.DataFrame:
    """SegResMamba's as multiples of each rival's, as published: a row for each rival, a column for each table."""
    columns = {
        label: published(table)[column]
        for label, (table, column) in RESOURCES[resource].printed.items()
    }
    return pd.DataFrame({label: v[OURS] / v.drop(OURS) for label, v in columns.items()})


def ratios(resource: str) -> pd.DataFrame:
    """SegResMamba's as multiples of each rival's that the paper prints: a row for each, a column for each setting."""
    found = RESOURCES[resource].measured()
    return found.loc[OURS] / found.loc[printed(resource).index.intersection(found.index)]


def _saved(resource: str) -> Finding:
    """A claim that SegResMamba needs less."""
    found, first, bar = ratios(resource), *RESOURCES[resource][2:]
    missing = found.columns[found.isna().any()]
    found = found.drop(columns=missing)
    kinds = {str(k).split()[0] for k in missing} - {str(k).split()[0] for k in found}
    ways = dict.fromkeys(str(k).split(",")[0] for k in missing if "best" not in str(k))
    if first not in found:
        return Finding(UNTESTED, f"not measured: {first}")
    below = found < bar
    each = pd.Series(below.to_numpy().ravel())
    always, never = below.all(axis=1), ~below.any(axis=1)
    parts = {"every setting": always, "some settings": ~always & ~never, "no setting": never}
    said = [
        f"in {word} against {_with('.2f', found.loc[rows, first])}"
        for word, rows in parts.items()
        if rows.any()
    ]
    lacking = f"; not measured: {names(kinds or ways)}" if len(missing) else ""
    sentence = f"{'; '.join(said)} ({first}{lacking})"
    ends = {"low": found.min(axis=1), "high": found.max(axis=1)}
    rows = pd.DataFrame({"here": found[first], **ends})
    return Finding(verdict(each, ~each), sentence, rows)


def reading() -> int:
    """Number of parameters with three ToM layers and one more convolution a stage, and an encoder that is never used.

    The public code registers the released network, one ToM layer a stage that is not called, and an encoder of
    MONAI's SegResNet of which its forward pass uses nothing.
    """

    def size(*modules: nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    spare = SegResNet(init_filters=48, in_channels=4, out_channels=4)
    unused = size(spare.convInit, spare.down_layers, spare.conv_final)
    toms = sum(size(TriOrientedMamba(c), nn.LayerNorm(c)) for c in FEATURES["paper"])
    convolutions = sum(size(nn.Conv3d(c, c, 3)) for c in FEATURES["paper"])
    released = int(counted("parameters")[128][TITLES["segresmamba_released"]])
    return released + unused + 3 * toms + convolutions


def _parameters() -> Finding:
    """Printed with two decimals, so the number itself can be asked for; by a reading alone it holds in part."""
    trained = counted("trained")[128] / 1e6
    rows = trained[[OURS, TITLES["segresmamba_released"]]].rename({OURS: "network of the text"})
    rows["stated reading"] = reading() / 1e6
    fits = rows.round(2) == _SIZE
    said = (
        f"trained, in millions: {_with('.2f', rows.iloc[:-1])}; {'' if fits.iloc[-1] else 'not '}reproduced by"
        f" a reading, {reading():,}: three ToM layers and one more convolution a stage, and an"
        " encoder that is never used"
    )
    found = pd.DataFrame({"here": rows, "low": rows, "high": rows})
    answer = HOLDS if fits.iloc[:-1].any() else PART if fits.any() else FAILS
    return Finding(answer, said, found)


# --- Dice: SegResMamba minus each rival -----------------------------------------------------------


class Lead(NamedTuple):
    """A claim about Dice: SegResMamba is ahead of rivals, or as good.

    Attributes:
        rivals: key of a system -> points ahead that the paper prints; NaN: a rival that it does not have.
        claimed: points ahead; an interval below excludes them. `None`: as printed.
        margin: points either way that are as good.
        ahead: rival -> the system that is held against it, where that is not SegResMamba.
    """

    rivals: pd.Series
    claimed: float | None
    margin: float = 0.0
    ahead: Mapping[str, str] = MappingProxyType({})


_DICE = {
    label: 100 * published(table)["mean_dice" if label == "table 2" else "dice"]
    for label, table in _TABLES.items()
}
_GAPS = pd.DataFrame({label: dice[OURS] - dice.drop(OURS) for label, dice in _DICE.items()})
_TOM, _CMMB, _CONVOLUTION = (  # points that each row of an ablation adds to the one before
    step
    for table in ("table5_tom_btcv", "table4_ablation_btcv")
    for step in 100 * published(table)["dice"].diff().dropna()
)
_PARTS = {"neither": _CMMB, "no_extra_conv": _CONVOLUTION}
_ROWS = {key: system.title for key, system in grid.SYSTEMS.items()}
_ROWS["neither"] = "SegMamba's block for CMMB"  # in claim 7, where both lack the extra convolution
_DECIDING = ("tom", "peers", "parts", "seeds")  # the grids whose runs a verdict rests on
_PEERS = {name: _GAPS["table 1"].get(TITLES[name]) for name in SMALL}
_SMALL = {TITLES[name]: peer.title for name, peer in SMALL.items()}
LEADS = {
    "peers": Lead(pd.Series(_PEERS, dtype=float), -COMPARABLE, COMPARABLE),
    "ToM": Lead(pd.Series({"none": _TOM, "conv": np.nan}), _TOM),
    "parts": Lead(pd.Series(_PARTS), None, ahead={"neither": "no_extra_conv"}),
}


def gains(name: str) -> pd.DataFrame:
    """Lead of SegResMamba's mean Dice over each rival's, within each case, in points (hundredths).

    Of a rival that `Lead.ahead` names it is that system's lead. Intervals are `low_all` and `high_all` of
    `srlib.study.statistics`: over other cases and other seeds, corrected: for the question whether the lead is within
    the margin where it is, else for the question whether it is zero.

    Returns:
        A row for each rival, by title: points `printed` and found `here`, its interval's `low` and `high`, `n` cases,
        `runs` of the rival, `is`: SegResMamba is `ahead`, `comparable`, `behind`, or it is `undecided` (where a gain is
        claimed: `no gain shown`) or `not tested`.

    Raises:
        FileNotFoundError: no committed runs of SegResMamba and a rival.
    """
    lead, cases = LEADS[name], pd.concat([grid.cases(grid_name) for grid_name in _DECIDING])
    cases = cases.drop_duplicates(statistics.KEYS)
    ahead = {rival: lead.ahead.get(rival, "segresmamba") for rival in lead.rivals.index}
    whole = {of: {*statistics.complete(cases, of)["system"]} for of in ahead.values()}
    there = {rival: of for rival, of in ahead.items() if rival in whole[of]}
    if not there:
        raise FileNotFoundError(f"no committed runs: grids {', '.join(_DECIDING)}")
    margin = lead.margin
    of_zero, of_margin = (
        statistics.compare(
            cases, there, ("dice",), (statistics.MEAN,), margin=either_way / 100
        ).set_index("system")
        for either_way in (0.0, margin)
    )
    table = pd.DataFrame({"printed": lead.rivals, "here": -100 * of_zero["difference"]})
    low, high = -100 * of_margin["high_all"], -100 * of_margin["low_all"]
    comparable = (low > -margin) & (high < margin)
    # Better or not is a question of its own, with a correction of its own.
    low = low.where(comparable, -100 * of_zero["high_all"])
    high = high.where(comparable, -100 * of_zero["low_all"])
    table = table.assign(low=low, high=high, n=of_zero["n"])
    table["runs"] = cases.groupby("system")["run"].nunique()
    comparable = comparable.reindex(table.index, fill_value=False)
    words = {"comparable": comparable, "ahead": table["low"] > 0, "behind": table["high"] < 0}
    otherwise = OPEN if margin else NO_GAIN
    table["is"] = np.select([*words.values(), table["here"].isna()], [*words, UNTESTED], otherwise)
    return table.rename(_ROWS)


def _ahead(name: str) -> Finding:
    """A claim about Dice."""
    try:
        lead, found = LEADS[name], gains(name)
    except FileNotFoundError:
        return Finding(UNTESTED, "there are no committed runs of all folds")
    shown = found["is"].isin(["comparable", "ahead"])
    claimed = found["printed"] if lead.claimed is None else lead.claimed
    excluded = ~shown & (found["high"] < claimed)
    forms = {"ahead": "ahead of {}", "behind": "behind {}", "comparable": "comparable with {}"}
    forms |= {word: f"{word} against {{}}" for word in (OPEN, NO_GAIN)}
    said = [
        form.format(_with("+.2f", found.loc[found["is"] == word, "here"]))
        for word, form in forms.items()
        if (found["is"] == word).any()
    ]
    if found["low"].isna().all():
        said.append("one training a fold, so no interval for other trainings is known")
    elif not shown.any() and not lead.margin:
        against = "" if excluded.all() else f" against {names(found.index[excluded])}"
        said.append(f"the printed gain is excluded{against} on these data by this recipe")
    if (lacking := found.index[found["is"] == UNTESTED]).any():
        said.append(f"not tested against {names(lacking)}")
    return Finding(verdict(shown, excluded), "; ".join(said), found[["here", "low", "high"]])


def evidence() -> str:
    """Data, steps and devices of the trainings that the claims about Dice rest on."""
    try:
        runs = pd.concat([grid.runs(name) for name in _DECIDING]).drop_duplicates("run")
    except FileNotFoundError:  # what decides their steps or learning rates is not there yet
        runs = pd.DataFrame()
    if runs.empty:
        return "no committed runs"
    seeds = runs["seed"].nunique()
    return (
        f"{grid.DATASET}, {len(runs)} trainings of small networks on {names(sorted(runs['device'].unique()))}, "
        f"{grid.STEPS:,} steps of {grid.BATCH} patches, {seeds} seed{'s' * (seeds > 1)}"
    )


# --- All of them ----------------------------------------------------------------------------------


def _abstract() -> Finding:
    """The abstract's sentence, which holds as much as claims 1 to 5, which are in it."""
    answers = [finding(claim) for claim in [*CLAIMS][:5]]
    found = pd.Series([answer.verdict for answer in answers])
    summed = verdict(found == HOLDS, found == FAILS)
    if summed != HOLDS and found.isin([HOLDS, PART]).any():
        summed = PART
    numbers = {word: [str(k) for k in found.index[found == word] + 1] for word in found.unique()}
    said = [f"claim{'s' * (len(n) > 1)} {names(n)}: {word}" for word, n in numbers.items()]
    return Finding(summed, "; ".join(said))


_SIZE = published("table7_size_btcv")["params_m"][OURS]


def _titled(points: pd.Series, label: str) -> pd.DataFrame:
    """What the paper prints of the systems of an ablation."""
    return points.rename(_ROWS).to_frame(label)


def _resource(name: str) -> Claim:
    unit = "times the rival's"
    return Claim(printed(name), (0, RESOURCES[name].bar), unit, lambda: _saved(name))


def _dice(name: str, points: pd.DataFrame, claimed: tuple[float, float]) -> Claim:
    return Claim(points, claimed, "Dice points", lambda: _ahead(name))


# Claim, in the paper's words where it has some, and where it is made.
CLAIMS: dict[str, Claim] = {
    '1. "less than half the memory during training" (table 8)': _resource("memory"),
    '2. "comparable performance": Dice (tables 1 to 3)': _dice(
        "peers", _GAPS.rename(_SMALL), (-COMPARABLE, COMPARABLE)
    ),
    '3. "reduce computation complexity": MACs (tables 1 to 3)': _resource("MACs"),
    '4. "reduce ... training time" (table 6)': _resource("time"),
    '5. "reduce ... environmental impact": CO2 (figure 3, table 6)': _resource("energy"),
    f"6. ToM adds {_TOM:.2f} points of Dice (table 5)": _dice(
        "ToM", _titled(LEADS["ToM"].rivals, "table 5"), (0, math.inf)
    ),
    f"7. CMMB adds {_CMMB:.2f}, the extra convolution {_CONVOLUTION:.2f} points (table 4)": _dice(
        "parts", _titled(LEADS["parts"].rivals, "table 4"), (0, math.inf)
    ),
    f"8. {_SIZE:.2f} M parameters (table 7)": Claim(
        pd.DataFrame({"table 7": {"the paper": _SIZE}}),
        (_SIZE, _SIZE),
        "million parameters",
        _parameters,
    ),
    '9. "comparable performance with significantly reduced resource demands" (abstract)': Claim(
        pd.DataFrame(), (0, 0), "", _abstract
    ),
}


def finding(claim: str) -> Finding:
    """The committed tables' answer to a claim; one that lacks its table has not been tested."""
    try:
        return CLAIMS[claim].test()
    except FileNotFoundError:
        return Finding(UNTESTED)


def findings() -> dict[str, Finding]:
    """Claim -> what the committed tables say of it."""
    return {claim: finding(claim) for claim in CLAIMS}


def table(answers: Mapping[str, Finding]) -> pd.DataFrame:
    """A row for each claim: `claim`, `verdict`, `in a sentence`."""
    rows = [(claim, *answer[:2]) for claim, answer in answers.items()]
    return pd.DataFrame(rows, columns=["claim", "verdict", "in a sentence"])


def side_by_side(claim: str, answer: Finding) -> pd.DataFrame:
    """A claim's numbers: a row for each rival, a column for each table, `here`, `low`, `high`; NaN: not there."""
    both = CLAIMS[claim].printed.join(answer.found, how="outer")
    return both.sort_values("here").rename_axis("rival")
