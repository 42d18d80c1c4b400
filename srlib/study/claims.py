"""The paper's claims, each held against committed tables by a rule; `07_claims` and the front page show the table.

Published numbers come from `published.json`, measured ones from `results/reference/`. Words about them are written by
hand, in `07_claims` and the README; a test holds every verdict there to the one computed here. The rules about Dice
were written before their numbers were there; since then only the part of the seeds in an interval became wider
(Welch's t instead of 1.96).

| verdict | memory, MACs, time: SegResMamba's, a multiple of each rival's | Dice: SegResMamba minus each rival |
|---|---|---|
| holds | below the bar against every rival in every setting | each interval lies above the bar |
| holds in part | against some | some lie above it |
| does not hold | against none | none lies above it, each excludes what is claimed |
| not tested here | no committed table | no table, or none above it and one that leaves both open (as one seed does) |

The bars are what is claimed: 0.5 for "less than half", 1 for "fewer" and "shorter", 0 for "it helps". For "comparable"
it is one Dice point behind: the paper calls itself comparable where it is 0.69 points behind. Intervals cover other
cases and other seeds (`gains`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd

from srlib import files, tables
from srlib.net.peers import PEERS, SMALL
from srlib.study import grid, statistics
from srlib.study.published import PUBLISHED, published

HOLDS, PART, FAILS, UNTESTED = "holds", "holds in part", "does not hold", "not tested here"
TITLES = {name: peer.title for name, peer in PEERS.items()}
OURS, FIRST = TITLES["segresmamba"], "btcv_128"  # the setting whose numbers are shown
COMPARABLE = -1.0  # Dice points


class Finding(NamedTuple):
    """Answer of the committed tables to a claim: the verdict, the numbers and how far they reach."""

    verdict: str
    measured: str = "-"
    interval: str = "-"


def verdict(shown: pd.Series, excluded: pd.Series) -> str:
    """One of the four, by which comparisons show what is claimed and which exclude it."""
    if shown.any():
        return HOLDS if shown.all() else PART
    return FAILS if excluded.all() else UNTESTED


def _times(values: pd.Series) -> str:
    return ", ".join(f"{value:.2f} x {name}" for name, value in values.items())


def _points(values: pd.Series) -> str:
    return ", ".join(f"{value:+.2f} v. {name}" for name, value in values.items()) + " (points)"


def _reach(rows: pd.DataFrame, form: str) -> str:
    return "; ".join(f"{r.Index} {r.low:{form}} to {r.high:{form}}" for r in rows.itertuples())


# --- Memory, arithmetic and time: multiples of each rival's ---------------------------------------

# Saved -> measured in which file and column, printed in which table and column, bar.
RESOURCES: dict[str, tuple[str, str, str, str, float]] = {
    "memory": ("gpu/memory.csv", "allocated", "table8_training_memory_gb", FIRST, 0.5),
    "MACs": ("memory/counted.csv", "gmacs", "table1_btcv", "macs_g", 1),
    "time": ("gpu/memory.csv", "step_s", "table6_time_co2", "epoch_s", 1),
}


def ratios(resource: str) -> pd.DataFrame:
    """SegResMamba's as multiples of each rival's, in the paper's sizes, fp32, without checkpoints.

    Returns:
        A row for each rival: in BTCV's setting the `published` ratio and the one found `here`; the `low`est and the
        `high`est found in any setting.
    """
    file, column, table, printed_column, _ = RESOURCES[resource]
    found = _as_is(file).pivot(index="peer", columns="setting", values=column).rename(TITLES)
    printed = published(table)[printed_column]
    rivals = printed.index.intersection(found.index).drop(OURS)
    times = found.loc[OURS] / found.loc[rivals]
    reach = {"low": times.min(axis=1), "high": times.max(axis=1)}
    return pd.DataFrame(
        {"published": printed[OURS] / printed[rivals], "here": times[FIRST], **reach}
    )


def _saved(resource: str) -> Finding:
    """A claim that SegResMamba needs less."""
    found, (file, *_, bar) = ratios(resource), RESOURCES[resource]
    below = pd.concat([found["low"], found["high"]]) < bar
    settings = _as_is(file)["setting"].nunique()
    reach = f"{settings} settings: {_reach(found, '.2f')}" if settings > 1 else "none: a count"
    return Finding(verdict(below, ~below), _times(found["here"]), reach)


def _parameters() -> Finding:
    """Printed with two decimals, so that agreement within 0.5 % can be asked for."""
    counted = _as_is("memory/counted.csv").set_index("peer")["trained"].rename(TITLES) / 1e6
    ours = counted[[OURS, TITLES["segresmamba_released"]]]
    fits = (ours / published("table7_size_btcv")["params_m"][OURS] - 1).abs() < 0.005
    measured = ", ".join(f"{value:.2f} M {name}" for name, value in ours.items())
    return Finding(HOLDS if fits.any() else FAILS, measured, "none: a count")


def _as_is(file: str) -> pd.DataFrame:
    """A table's rows without levers; of counts, which are of no setting, those of the first one's size."""
    table = tables.read(files.REFERENCE / file)
    table = table[(table["precision"] == "fp32") & ~table["checkpointing"]]
    if "setting" in table:
        return table
    return table[table["size"] == PUBLISHED["settings"][FIRST]["size"]].assign(setting=FIRST)


# --- Dice: SegResMamba minus each rival -----------------------------------------------------------


class Lead(NamedTuple):
    """A claim about Dice: SegResMamba is ahead of rivals.

    Attributes:
        grids: whose runs decide.
        published: rival (key of a system) -> points ahead in the paper; NaN: a rival that it does not have.
        claimed: points ahead; an interval below excludes them. `None`: as published.
        bar: points that an interval has to lie above.
    """

    grids: tuple[str, ...]
    published: pd.Series
    claimed: float | None
    bar: float = 0.0


_DICE = 100 * published("table1_btcv")["dice"]
_GAPS = _DICE[OURS] - _DICE.drop(OURS)  # printed, points
_TOM, _CMMB, _CONVOLUTION = (  # points that each row of an ablation adds to the one before
    step
    for table in ("table5_tom_btcv", "table4_ablation_btcv")
    for step in 100 * published(table)["dice"].diff().dropna()
)
_PARTS = {"segmamba_block": _CMMB, "no_extra_conv": _CONVOLUTION}
_PEERS = {name: _GAPS.get(peer.title) for name, peer in SMALL.items()}
LEADS = {
    "peers": Lead(("peers",), pd.Series(_PEERS, dtype=float).dropna(), COMPARABLE, COMPARABLE),
    "ToM": Lead(("tom",), pd.Series({"none": _TOM, "conv": np.nan}), _TOM),
    "parts": Lead(("tom", "ablations"), pd.Series(_PARTS), None),
}


def gains(name: str) -> pd.DataFrame:
    """Lead of SegResMamba's mean Dice over each rival's, within each case, in points (hundredths).

    Intervals are `low_all` and `high_all` of `srlib.study.statistics`: over other cases and other seeds.

    Returns:
        A row for each rival: `published` and found `here`, its interval's `low` and `high` (NaN of one seed), the
        smallest `detectable` difference, `n` cases, `runs` of the rival. NaN of rivals without a table.

    Raises:
        FileNotFoundError: no committed table holds SegResMamba and a rival.
    """
    lead = LEADS[name]
    cases = pd.concat([grid.cases(name) for name in lead.grids])
    cases = cases[cases["system"].isin(["segresmamba", *lead.published.index])]
    cases = cases.drop_duplicates(statistics.KEYS)
    if not {"segresmamba"} < set(cases["system"]):
        raise FileNotFoundError(f"no committed runs: grid {' and '.join(lead.grids)}")
    found = statistics.compare(cases, "segresmamba", ("dice",), (statistics.MEAN,))
    found = found.set_index("system")
    points = {"here": -found["difference"], "low": -found["high_all"], "high": -found["low_all"]}
    points["detectable"] = found["detectable"]
    table = pd.DataFrame({"published": lead.published} | {k: 100 * v for k, v in points.items()})
    trainings = cases.groupby("system")["run"].nunique()
    titles = {name: system.title for name, system in grid.SYSTEMS.items()}
    return table.assign(n=found["n"], runs=trainings).rename(titles)


def _ahead(name: str) -> Finding:
    """A claim about Dice."""
    lead, found = LEADS[name], gains(name)
    shown = found["low"] > lead.bar
    excluded = ~shown & (found["high"] < (lead.claimed or found["published"]))
    known = found.dropna(subset="here")
    once = known.index[known["low"].isna()]
    unknown = f"none for {', '.join(once)}: one training" if len(once) else ""
    reach = "; ".join(part for part in (_reach(known.drop(once), "+.2f"), unknown) if part)
    return Finding(verdict(shown, excluded), _points(known["here"]), reach)


# --- All of them ----------------------------------------------------------------------------------


def _abstract() -> Finding:
    """The abstract's sentence, which holds as much as claims 1 to 4, which are in it."""
    found = pd.Series([finding(claim).verdict for claim in [*CLAIMS][:4]])
    summed = verdict(found == HOLDS, found == FAILS)
    return Finding(PART if summed != HOLDS and found.isin([HOLDS, PART]).any() else summed)


def _multiples(table: str, column: str) -> str:
    """A printed number, SegResMamba's as a multiple of each rival's."""
    values = published(table)[column]
    return _times(values[OURS] / values.drop(OURS))


def _resource(name: str) -> tuple[str, Callable[[], Finding]]:
    return _multiples(*RESOURCES[name][2:4]), lambda: _saved(name)


ABSTRACT = (
    "Less than half the memory, comparable performance, significantly reduced demands (abstract)"
)
_SIZE = published("table7_size_btcv")["params_m"][OURS]
_CO2 = _multiples("table6_time_co2", "co2_kg_azure")
_ADDED = f"{_CMMB:+.2f} and {_CONVOLUTION:+.2f} points"
# Claim and where it is made -> as printed, and found in the committed tables.
CLAIMS: dict[str, tuple[str, Callable[[], Finding]]] = {
    "1. Less than half the training memory (table 8)": _resource("memory"),
    "2. Comparable Dice (tables 1 to 3)": (_points(_GAPS), lambda: _ahead("peers")),
    "3. Fewer MACs (tables 1 to 3)": _resource("MACs"),
    "4. Shorter training (table 6)": _resource("time"),
    # energy was measured neither there nor here
    "5. Lower CO2 (figure 3, table 6)": (_CO2, lambda: Finding(UNTESTED)),
    "6. ToM matters (table 5)": (f"{_TOM:+.2f} points", lambda: _ahead("ToM")),
    "7. CMMB and the extra convolution matter (table 4)": (_ADDED, lambda: _ahead("parts")),
    "8. 119.98 M parameters (table 7)": (f"{_SIZE:.2f} M", _parameters),
    ABSTRACT: ("claims 1 to 4 in one sentence", _abstract),
}


def finding(claim: str) -> Finding:
    """The committed tables' answer to a claim; one that lacks its table has not been tested."""
    try:
        return CLAIMS[claim][1]()
    except FileNotFoundError:
        return Finding(UNTESTED)


def table() -> pd.DataFrame:
    """A row for each claim: `claim`, `verdict`, `published`, `measured here`, `interval`."""
    rows = [(claim, *finding(claim), printed) for claim, (printed, _) in CLAIMS.items()]
    columns = ["claim", "verdict", "measured here", "interval", "published"]
    return pd.DataFrame(rows, columns=columns)[[*columns[:2], "published", *columns[2:4]]]
