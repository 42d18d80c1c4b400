"""The paper's claims, each held against committed tables: `07_claims`, the front page and the README show them.

Nothing here is a result. Published numbers come from `published.json`, measured ones from `results/reference/`, so that
a row changes when its table does. The rules about Dice were written before their numbers were there; since then only
the part of the seeds in an interval became wider (Welch's t instead of 1.96).

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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader

from srlib import data, grid, paths, statistics
from srlib.baselines import PEERS, SMALL
from srlib.levers import LEVERS
from srlib.profiling import PUBLISHED, published

HOLDS, PART, FAILS, UNTESTED = "holds", "holds in part", "does not hold", "not tested here"
TITLES = {name: peer.title for name, peer in PEERS.items()}
OURS, FIRST = TITLES["segresmamba"], "btcv_128"  # the setting whose numbers are shown
COMPARABLE = -1.0  # Dice points
LIMITS = (
    "One data set of small crops and networks scaled down: nothing is said about BTCV, BraTS or "
    "Spleen, and little about long range."
)


@dataclass(frozen=True)
class Finding:
    """What the committed tables say of a claim: in words, as a row shows it.

    Attributes:
        verdict: one of the four.
        measured, interval: the numbers and how far they reach.
        on: which data or device, and how often.
        why: what decided it, and what it leaves open.
    """

    verdict: str
    measured: str = "-"
    interval: str = "-"
    on: str = "-"
    why: str = ""


def _times(values: pd.Series) -> str:
    return ", ".join(f"{value:.2f} x {name}" for name, value in values.items())


def _points(values: pd.Series) -> str:
    return ", ".join(f"{value:+.2f} v. {name}" for name, value in values.items()) + " (points)"


def _reach(rows: pd.DataFrame, form: str) -> str:
    return "; ".join(f"{r.Index} {r.low:{form}} to {r.high:{form}}" for r in rows.itertuples())


def _grouped(groups: dict[str, pd.Series]) -> str:
    """Which rivals are in which group, a sentence for each that has some."""
    named = {name: ", ".join(member.index[member]) for name, member in groups.items()}
    return "".join(f"{name}: {rivals}. " for name, rivals in named.items() if rivals)


def _multiples(table: str, column: str) -> pd.Series:
    """A printed number, SegResMamba's as a multiple of each rival's."""
    values = published(table)[column]
    return values[OURS] / values.drop(OURS)


def verdict(shown: pd.Series, excluded: pd.Series) -> str:
    """In words, of comparisons that show what is claimed and of those that exclude it."""
    if shown.any():
        return HOLDS if shown.all() else PART
    return FAILS if excluded.all() else UNTESTED


# --- Memory, arithmetic and time: multiples of each rival's ---------------------------------------

# What is saved -> measured in which file and column, printed in which table and column (None: one a setting), bar.
RESOURCES: dict[str, tuple[str, str, str, str | None, float]] = {
    "memory": ("gpu/memory.csv", "allocated", "table8_training_memory_gb", None, 0.5),
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
    printed = published(table)[printed_column or FIRST]
    rivals = printed.index.intersection(found.index).drop(OURS)
    times = found.loc[OURS] / found.loc[rivals]
    return pd.DataFrame(
        {
            "published": printed[OURS] / printed[rivals],
            "here": times[FIRST],
            "low": times.min(axis=1),
            "high": times.max(axis=1),
        }
    )


def _saved(resource: str, further: Callable[[], str]) -> Finding:
    """A claim that SegResMamba needs less."""
    found, (file, *_, bar) = ratios(resource), RESOURCES[resource]
    below = pd.concat([found["low"], found["high"]]) < bar
    groups = {
        f"Nowhere below {bar:g}": found["low"] >= bar,
        f"Below {bar:g} in some settings only": (found["low"] < bar) & (found["high"] >= bar),
    }
    rows = _as_is(file)
    settings, device = rows["setting"].nunique(), rows.get("device", pd.Series(["counted"]))
    return Finding(
        verdict(below, ~below),
        _times(found["here"]),
        f"{settings} settings: {_reach(found, '.2f')}" if settings > 1 else "none: a count",
        f"{', '.join(device.unique())}; the paper's sizes, batch 1, fp32",
        _grouped(groups) + further(),
    )


def _with_levers() -> str:
    """What SegResMamba's own levers did, and who needs less when everyone may use bf16 and checkpoints."""
    peak = _read("memory/levers.csv").query("precision == 'fp32'").set_index("lever")["peak"]
    table = _read("gpu/memory.csv").query("setting == @FIRST")
    least = table.groupby("peer", sort=False)["allocated"].min()
    less = least[least < least["segresmamba"]].rename(TITLES)
    with_both = table.query("checkpointing and precision != 'fp32'")["peer"]
    lacking = [TITLES[peer] for peer in least.index.drop(with_both)]
    return (
        f"Written straightforwardly it would need {peak.iloc[0] / peak[LEVERS['norms']]:.1f} times as much (counted). "
        f"If each uses bf16 and checkpoints as suits it, less is needed by {'; '.join(less.index) or 'none'}"
        f" (both at once not measured: {'; '.join(lacking) or 'none'})."
    )


def _of_times() -> str:
    """What else the times of the GPU depend on, and those of the networks that are trained to compare Dice."""
    fastest = _as_is("gpu/memory.csv").pivot_table("step_s", "peer", "size", aggfunc="min")
    odd = fastest.index[fastest.T.sort_index().diff().min() < 0].map(TITLES)
    seconds = _read("cpu/systems.csv").set_index("system")["step_seconds"]
    times = (seconds["segresmamba"] / seconds[[*SMALL]]).rename(_titles())
    warning = f"Slower on small images than on large ones, so timed by more than the GPU: {'; '.join(odd)}. "
    works = ["setting", "peer", "precision", "checkpointing"]
    both = _read("gpu/memory.csv").merge(_read("gpu/memory_again.csv"), on=works)
    again = both["step_s_y"] / both["step_s_x"]
    return (
        f"{warning if len(odd) else ''}Measured again on another host, without the rivals, SegResMamba's step took "
        f"{again.min():.1f} to {again.max():.1f} times as long. The small networks of claim 2 on two threads of a CPU: "
        f"{_times(times)}. Steps alone are timed; the paper's epochs also load and validate."
    )


def _co2() -> Finding:
    """Table 6 from its first column: 200 epochs, five folds, 250 W, and a cloud's kg for a kWh."""
    table = published("table6_time_co2")
    kwh = 5 * table["epoch_s"] * 200 / 3600 * 0.25
    factors = {"azure": 0.57, "google": 0.62, "amazon": 0.61}
    off = max((kwh * f - table[f"co2_kg_{cloud}"]).abs().max() for cloud, f in factors.items())
    why = f"The printed CO2 is the time of an epoch times constants, within {off:.2f} kg: claim 4 again. "
    return Finding(UNTESTED, why=why + "Energy was measured neither there nor here.")


def _parameters() -> Finding:
    """Printed with two decimals, so that agreement within 0.5 % can be asked for."""
    counted = _as_is("memory/counted.csv").set_index("peer")["trained"].rename(TITLES) / 1e6
    printed = published("table7_size_btcv")["params_m"]
    ours = counted[[OURS, TITLES["segresmamba_released"]]]
    peers = counted[counted.index.intersection(printed.index).drop(OURS)]
    fits = (ours / printed[OURS] - 1).abs() < 0.005
    alike = ((peers / printed[peers.index] - 1).abs() < 0.005).sum()
    why = f"The same count gives what is printed for {alike} of {len(peers)} peers. "
    return Finding(
        HOLDS if fits.any() else FAILS,
        ", ".join(f"{value:.2f} M {name}" for name, value in ours.items()),
        "none: a count",
        "parameters that receive a gradient; 1 channel, 14 classes",
        why + "The public code registers more than it uses: 05_memory.",
    )


# --- Dice: SegResMamba minus each rival -----------------------------------------------------------


def _printed_gaps() -> pd.Series:
    """Printed Dice on BTCV, SegResMamba's minus each rival's, points."""
    dice = published("table1_btcv")["dice"]
    return 100 * (dice[OURS] - dice.drop(OURS))


def _printed_steps(ablation: str) -> pd.Series:
    """Points that each row of a printed ablation adds to the one before."""
    return 100 * published(ablation)["dice"].diff().dropna()


@dataclass(frozen=True)
class Lead:
    """A claim about Dice: SegResMamba is ahead of rivals.

    Attributes:
        grids: whose runs decide.
        published: rival (key of a system) -> points ahead in the paper; NaN: a rival that it does not have.
        claimed: points ahead; an interval below excludes them. `None`: what is published.
        bar: points that an interval has to lie above.
    """

    grids: tuple[str, ...]
    published: pd.Series
    claimed: float | None
    bar: float = 0.0


_TOM, (_CMMB, _CONVOLUTION) = (
    _printed_steps("table5_tom_btcv").iloc[0],
    _printed_steps("table4_ablation_btcv"),
)
_PEERS = {name: _printed_gaps().get(peer.title) for name, peer in SMALL.items()}
LEADS = {
    "peers": Lead(("peers",), pd.Series(_PEERS, dtype=float).dropna(), COMPARABLE, COMPARABLE),
    "ToM": Lead(("tom",), pd.Series({"none": _TOM, "conv": np.nan}), _TOM),
    "parts": Lead(
        ("tom", "ablations"),
        pd.Series({"segmamba_block": _CMMB, "no_extra_conv": _CONVOLUTION}),
        None,
    ),
}


def gains(name: str) -> pd.DataFrame:
    """By how many points (hundredths) SegResMamba's mean Dice is ahead of each rival's, within each case.

    Intervals are `low_all` and `high_all` of `srlib.statistics`: over other cases and other seeds.

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
        raise FileNotFoundError(f"grid {' and '.join(lead.grids)}")
    found = statistics.compare(cases, "segresmamba", ("dice",), ("mean",)).set_index("system")
    points = {
        "here": -found["difference"],
        "low": -found["high_all"],
        "high": -found["low_all"],
        "detectable": found["detectable"],
    }
    table = pd.DataFrame({"published": lead.published} | {k: 100 * v for k, v in points.items()})
    trainings = cases.groupby("system")["run"].nunique()
    return table.assign(n=found["n"], runs=trainings).rename(_titles())


def _ahead(name: str) -> Finding:
    """A claim about Dice."""
    lead, found = LEADS[name], gains(name)
    shown = found["low"] > lead.bar
    excluded = ~shown & (found["high"] < (lead.claimed or found["published"]))
    groups = {
        "Shown": shown,
        "Not shown, and as much as claimed is excluded": excluded,
        "Open": ~shown & ~excluded & found["here"].notna(),
        "No table yet": found["here"].isna(),
    }
    known = found.dropna(subset="here")
    once = known.index[known["low"].isna()]
    unknown = f"none for {', '.join(once)}: one training" if len(once) else ""
    runs = pd.concat([grid.runs(name) for name in lead.grids])
    runs = runs[runs["system"].isin(["segresmamba", *lead.published.index])]
    (dataset,), (steps,) = runs["dataset"].unique(), runs["steps"].unique()
    return Finding(
        verdict(shown, excluded),
        _points(known["here"]),
        "; ".join(part for part in (_reach(known.drop(once), "+.2f"), unknown) if part),
        f"{data.get(dataset).title}: {known['n'].max():.0f} cases, up to {known['runs'].max():.0f} trainings a "
        f"system of {steps} steps, {' and '.join(runs['device'].unique())}",
        f"{_grouped(groups)}The cases alone can show {known['detectable'].min():.2f} to "
        f"{known['detectable'].max():.2f} points. {LIMITS}",
    )


# --- All of them ----------------------------------------------------------------------------------


def _abstract() -> Finding:
    """As much as claims 1 to 4, which are in it."""
    parts = {f"claim {k + 1}": finding(claim).verdict for k, claim in enumerate([*CLAIMS][:4])}
    found = pd.Series(parts)
    summed = verdict(found == HOLDS, found == FAILS)
    summed = PART if summed != HOLDS and found.isin([HOLDS, PART]).any() else summed
    return Finding(summed, why="; ".join(f"{k}: {v}" for k, v in parts.items()) + ".")


# Claim and where it is made -> what is printed, and what the committed tables say.
CLAIMS: dict[str, tuple[str, Callable[[], Finding]]] = {
    "1. Less than half the training memory (table 8)": (
        _times(_multiples("table8_training_memory_gb", FIRST)),
        lambda: _saved("memory", _with_levers),
    ),
    "2. Comparable Dice (tables 1 to 3)": (
        _points(_printed_gaps()),
        lambda: _ahead("peers"),
    ),
    "3. Fewer MACs (tables 1 to 3)": (
        _times(_multiples("table1_btcv", "macs_g")),
        lambda: _saved("MACs", lambda: "Table 1's counter sees too much: 05_memory."),
    ),
    "4. Shorter training (table 6)": (
        _times(_multiples("table6_time_co2", "epoch_s")),
        lambda: _saved("time", _of_times),
    ),
    "5. Lower CO2 (figure 3, table 6)": (
        _times(_multiples("table6_time_co2", "co2_kg_azure")),
        _co2,
    ),
    "6. ToM matters (table 5)": (f"{_TOM:+.2f} points", lambda: _ahead("ToM")),
    "7. CMMB and the extra convolution matter (table 4)": (
        f"{_CMMB:+.2f} and {_CONVOLUTION:+.2f} points",
        lambda: _ahead("parts"),
    ),
    "8. 119.98 M parameters (table 7)": (
        f"{published('table7_size_btcv')['params_m'][OURS]:.2f} M",
        _parameters,
    ),
    "Less than half the memory, comparable performance, significantly reduced demands (abstract)": (
        "claims 1 to 4 in one sentence",
        _abstract,
    ),
}


def finding(claim: str) -> Finding:
    """What the committed tables say of a claim; one that lacks its table has not been tested, and says so."""
    try:
        return CLAIMS[claim][1]()
    except FileNotFoundError as error:
        missing = Path(error.filename).name if error.filename else str(error)
        return Finding(UNTESTED, why=f"No committed table: {missing}.")


def table() -> pd.DataFrame:
    """A row for each claim: `claim`, `verdict`, `published`, `measured here`, `interval`, `on`, `why`."""
    rows = []
    for claim, (printed, _) in CLAIMS.items():
        found = finding(claim)
        row = {"claim": claim, "verdict": found.verdict, "published": printed}
        row |= {"measured here": found.measured, "interval": found.interval}
        rows.append(row | {"on": found.on, "why": found.why})
    return pd.DataFrame(rows)


def html(claims: pd.DataFrame) -> str:
    """A table of claims as HTML, with a caption and headers that a screen reader announces."""
    environment = Environment(loader=PackageLoader("srlib", "."), autoescape=True, trim_blocks=True)
    return environment.get_template("claims.html.j2").module.table(claims.to_dict("records"))  # type: ignore[attr-defined]


def _titles() -> dict[str, str]:
    return {name: system.title for name, system in grid.SYSTEMS.items()}


def _as_is(file: str) -> pd.DataFrame:
    """A table's rows without levers; of counts, which are of no setting, those of the first one's size."""
    table = _read(file)
    table = table[(table["precision"] == "fp32") & ~table["checkpointing"]]
    if "setting" in table:
        return table
    return table[table["size"] == PUBLISHED["settings"][FIRST]["size"]].assign(setting=FIRST)


def _read(file: str) -> pd.DataFrame:
    return pd.read_csv(paths.REFERENCE / file, comment="#")
