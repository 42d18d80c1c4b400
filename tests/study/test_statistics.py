"""Statistics: known answers, the order of aggregation, and tables that would mislead."""

import gc
import math

import case_tables
import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from srlib.data.catalog import MEAN
from srlib.study import statistics

DICE = ("dice",)


def test_complete_are_systems_with_all_folds_of_the_reference():
    cases = case_tables.cases({"segresmamba": 0.0, "none": 0.0, "conv": 0.0}, (1, 2), (0,), n=2)
    lacking = cases[(cases["system"] != "conv") | (cases["fold"] != 2)]
    assert {*statistics.complete(lacking, "segresmamba")["system"]} == {"segresmamba", "none"}
    assert {*statistics.complete(lacking, "conv")["system"]} == {"segresmamba", "none", "conv"}
    assert statistics.complete(lacking, "unet").empty
    assert statistics.complete(cases[:0], "none").empty


def test_interval_of_a_normal_sample_is_near_the_t_interval():
    sample = np.random.default_rng(3).normal(0.9, 0.03, 60)
    low, high = statistics.interval(sample)
    expected = stats.t.interval(0.95, 59, sample.mean(), stats.sem(sample))
    assert (low, high) == pytest.approx(expected, abs=0.1 * (high - low))
    assert statistics.interval(sample) == (low, high)  # seeded


def test_budgets_are_compared_each_by_itself_over_cases_alone():
    """Against the definition: Holm's steps by hand, each interval SciPy's at its step's level."""
    effects = {"segresmamba": 0.0, "none": 0.02, "conv": 0.002, "unet": -0.004}
    one = case_tables.cases(effects, (1, 2), (0,), n=12).assign(minutes=1.0)
    two = one[(one["system"] != "unet") | (one["fold"] != 2)].assign(minutes=2.0)
    two.loc[two["system"] == "none", "dice"] -= 0.02
    found = statistics.by_budget(pd.concat([one, two]), "segresmamba")
    assert found.groupby("minutes")["system"].agg(list).to_dict() == {
        1.0: ["none", "conv", "unet"],
        2.0: ["none", "conv"],
    }
    assert (found["n"] == 24).all()
    for minutes, rows in found.groupby("minutes"):
        of = statistics.differences({1.0: one, 2.0: two}[minutes], "segresmamba", ["dice"])
        of = of[of["class"] == MEAN].groupby("system")["difference"]
        assert rows.set_index("system")["difference"].to_dict() == pytest.approx(
            {system: of.get_group(system).mean() for system in rows["system"]}
        )
        undecided = len(rows)  # Holm: while the smallest p is below its step's
        outside = {}
        for system in sorted(
            rows["system"], key=lambda s: -abs(of.get_group(s).mean() / of.get_group(s).std())
        ):
            level = 1 - 0.05 / undecided
            low, high = statistics.interval(of.get_group(system), level)
            row = rows.set_index("system").loc[system]
            assert row["level"] == pytest.approx(level)
            assert (row["low_cases"], row["high_cases"]) == pytest.approx((low, high))
            outside[system] = not low <= 0 <= high
            undecided -= outside[system]
        assert outside["none"] == (minutes == 1)


def test_budgets_without_another_system_have_no_rows_and_equal_steps_are_refused():
    cases = case_tables.cases({"segresmamba": 0.0, "none": 0.0}, (1,), (0,), n=3)
    alone = cases[cases["system"] == "none"].assign(minutes=1.0)
    assert statistics.by_budget(alone, "segresmamba").empty
    assert statistics.by_budget(alone, "none").empty
    assert statistics.by_budget(cases[:0], "none").empty
    with pytest.raises(ValueError, match="expected those of equal minutes"):
        statistics.by_budget(cases.assign(minutes=math.nan), "segresmamba")


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_interval_is_scipy_s_bca_at_any_level(level):
    sample = np.sort(np.random.default_rng(7).exponential(size=25))
    options = {"n_resamples": 9999, "random_state": np.random.default_rng(0)}
    found = stats.bootstrap((sample,), np.mean, confidence_level=level, method="BCa", **options)
    assert statistics.interval(sample, level) == pytest.approx(tuple(found.confidence_interval))


def test_of_eight_cases_bca_s_95_hold_the_mean_in_fewer_samples_than_student_s(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 999)
    samples = np.random.default_rng(0).normal(size=(600, 8))
    low, high = stats.t.interval(0.95, 7, samples.mean(1), stats.sem(samples, axis=1))
    found = [low <= 0 <= high for low, high in map(statistics.interval, samples)]
    assert np.mean(found) == pytest.approx(0.885, abs=0.03)
    assert np.mean((low <= 0) & (high >= 0)) == pytest.approx(0.95, abs=0.025)


def test_interval_holds_the_true_mean_in_about_95_of_100_samples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 999)
    random = np.random.default_rng(0)
    found = [statistics.interval(random.exponential(size=50)) for _ in range(200)]
    assert 0.90 <= np.mean([low <= 1 <= high for low, high in found]) <= 0.98


def test_intervals_of_samples_without_spread():
    assert statistics.interval([3.0, 3.0, 3.0]) == (3, 3)
    assert np.isnan(statistics.interval([3.0])).all()


def test_signed_rank_of_known_samples():
    assert statistics.signed_rank([1, 2, 3, 4, 5]) == 2 / 2**5  # all signs equal, two-sided, exact
    assert statistics.signed_rank([0, 0, 0]) == 1
    assert statistics.signed_rank([1, -1.5, 2, -2.5]) > 0.5


def test_a_detectable_difference_is_detected_in_80_of_100_samples():
    random = np.random.default_rng(1)
    shift = statistics.detectable(stats.zscore(random.normal(size=30), ddof=1))  # SD 1
    samples = random.normal(shift, 1, (2000, 30))
    assert np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05) == pytest.approx(
        0.8, abs=0.03
    )
    assert statistics.detectable([0.1, 0.1]) == 0
    assert math.isnan(statistics.detectable([0.1]))


def test_a_case_is_averaged_over_seeds_and_classes_before_cases_are():
    table = case_tables.cases({"segresmamba": 0.0}, n=4)
    table["dice"] = np.arange(len(table)) / 100
    values = statistics.case_values(table, DICE).set_index(["class", "case"])["value"]
    rows = table[table["case"] == "case 0-2"]
    assert values[MEAN, "case 0-2"] == pytest.approx(rows["dice"].mean())
    assert values["anterior", "case 0-2"] == pytest.approx(
        rows.loc[rows["class"] == "anterior", "dice"].mean()
    )
    assert statistics.summary(table, DICE)["n"].tolist() == [4, 4, 4]


def test_summary_tells_seeds_from_cases():
    table = case_tables.cases({"segresmamba": 0.0}, folds=range(3), seeds=range(8), seed_sd=0.01)
    row = statistics.summary(table, DICE).set_index("class").loc[MEAN]
    assert (row["n"], row["runs"]) == (60, 24)
    assert row["low"] < row["mean"] < row["high"]
    assert row["sd_seeds"] == pytest.approx(0.01, rel=0.4)
    assert row["sd_cases"] == pytest.approx(0.03 / math.sqrt(2), rel=0.2)
    assert row["se_seeds"] == pytest.approx(row["sd_seeds"] / math.sqrt(24))
    one = statistics.summary(table[table["seed"] == 0], DICE)
    assert one["sd_seeds"].isna().all()


def test_a_seed_that_only_some_folds_have_counts_with_their_share():
    table = case_tables.cases({"segresmamba": 0.0}, folds=(0, 1))
    table = table[(table["fold"] == 0) | (table["seed"] == 0)]
    row = statistics.summary(table, DICE).iloc[0]
    means = table[table["class"] == row["class"]].groupby(["fold", "seed"])["dice"].mean()
    assert row["sd_seeds"] == pytest.approx(means[0].std())
    assert row["se_seeds"] == pytest.approx(row["sd_seeds"] * math.sqrt(1 / 12 + 1 / 4))


def test_comparison_finds_what_is_there_and_nothing_else():
    table = case_tables.cases({"segresmamba": 0.0, "same": 0.0, "worse": -0.02}, n=50, seed_sd=0)
    rows = statistics.compare(table, "segresmamba", DICE).set_index(["system", "class"])
    same, worse = rows.loc[("same", MEAN)], rows.loc[("worse", MEAN)]
    assert worse["low"] < -0.02 < worse["high"] < 0
    assert worse["p_holm"] < 1e-2
    assert same["low"] < 0 < same["high"]
    assert (rows["p_holm"] >= rows["p"]).all()
    assert (rows["n"] == 50).all()
    assert rows.loc[("worse", MEAN), "detectable"] < 0.01


@pytest.fixture
def quick(monkeypatch):
    """Simulations without what makes them slow: many draws, and statsmodels' call of the garbage collector."""
    monkeypatch.setattr(statistics, "RESAMPLES", 499)
    monkeypatch.setattr(gc, "collect", lambda: 0)


def of_mean(table, **options):
    """Systems against SegResMamba in Dice, the mean over the classes."""
    return statistics.compare(table, "segresmamba", DICE, [MEAN], **options)


def test_seeds_part_of_an_interval_is_student_s_of_the_trainings_pooled_variance():
    table = case_tables.cases(seed_sd=0.02)
    row = of_mean(table).iloc[0]
    assert row["low_all"] < row["low"] < row["high"] < row["high_all"]
    means = statistics.run_means(table, DICE).query("`class` == @MEAN").groupby("system")["value"]
    pair = [means.get_group(name) for name in ("none", "segresmamba")]
    student = stats.ttest_ind(*pair).confidence_interval()
    above = row["high"] - row["difference"], student.high - row["difference"]
    assert row["high_all"] - row["difference"] == pytest.approx(math.hypot(*above))


def test_variance_between_seeds_is_that_of_a_model_with_a_mean_for_each_system_and_fold():
    systems = {"segresmamba": 0.0, "none": 0.01, "conv": -0.02}
    table = case_tables.cases(systems, folds=(0, 1), seed_sd=0.01)
    table = table[(table["fold"] == 0) | (table["seed"] == 0) | (table["system"] == "conv")]
    runs = statistics.run_means(table, DICE).query("`class` == @MEAN")
    model = smf.ols("value ~ C(system) * C(fold)", runs).fit()
    row = of_mean(table).set_index("system").loc["none"]
    assert row["df_seeds"] == model.df_resid == 8
    assert row["se_seeds"] == pytest.approx(math.sqrt(model.mse_resid * 2 * (1 / 12 + 1 / 4)))


def test_one_training_of_a_system_borrows_the_others_spread_and_of_all_gives_no_interval():
    table = case_tables.cases()
    once = table[(table["system"] == "segresmamba") | (table["seed"] == 0)]
    assert of_mean(once).iloc[0]["se_seeds"] > 0
    nothing = of_mean(table[table["seed"] == 0])
    columns = ["low_all", "high_all", "level", "se_seeds", "p", "p_holm"]
    assert nothing[columns].isna().all(axis=None)


@pytest.mark.parametrize("margin", [0.0, 0.007])
def test_an_interval_leaves_out_the_margin_s_ends_exactly_where_holm_rejects(margin, quick):
    decided = []
    for random in range(10):
        shifts = dict(zip("abcde", (0.0, 0.003, -0.005, 0.008, 0.02), strict=True))
        noise = {"seed_sd": 0.002, "noise_sd": 0.006, "random": random}
        rows = of_mean(case_tables.cases({"segresmamba": 0.0, **shifts}, **noise), margin=margin)
        inside = [(rows["low_all"] <= end) & (end <= rows["high_all"]) for end in (-margin, margin)]
        rejected = multipletests(rows["p"], method="holm")[0]
        assert (rejected == ~(inside[0] | inside[1])).all()
        assert rows["level"].between(0.95, 0.99).all()
        decided.append(rejected.sum())
    assert 0 < sum(decided) < 5 * len(decided)
    assert len(set(decided)) > 1


def test_equivalence_is_two_one_sided_tests_at_half_of_the_level():
    values = np.random.default_rng(5).normal(0.001, 0.01, 400)
    reach = statistics._reach(values, 0.0, 10)
    for errors in (1.5, 2, 2.5):
        margin = abs(values.mean()) + errors * values.std() / 20
        p = statistics._smallest_level(reach, margin)
        expected = 2 * ttost_paired(values, np.zeros(400), -margin, margin)[0]
        assert p == pytest.approx(expected, rel=0.25)


def test_intervals_hold_the_truth_and_few_studies_of_equal_systems_find_a_difference(quick):
    """Coverage and the rate of false alarms, with half of the trainings made once; cases alone do far worse."""
    covered, alarms, by_cases = [], [], []
    for random in range(120):
        table = case_tables.cases(
            dict.fromkeys(["segresmamba", *"abc"], 0.0), n=30, seed_sd=0.004, random=random
        )
        table = table[table["system"].isin(["segresmamba", "a"]) | (table["seed"] == 0)]
        one = of_mean(table, systems=["c"]).iloc[0]
        covered.append(one["low_all"] <= 0 <= one["high_all"])
        rows = of_mean(table)
        alarms.append((rows["p_holm"] <= 0.05).any())
        by_cases.append(multipletests(rows["signed_rank"], method="holm")[0].any())
    assert 0.92 <= np.mean(covered) <= 1
    assert np.mean(alarms) <= 0.09
    assert np.mean(by_cases) > 0.3


def test_comparison_is_antisymmetric():
    table = case_tables.cases()
    there, back = (statistics.compare(table, name, DICE) for name in ("segresmamba", "none"))
    assert there["difference"].tolist() == pytest.approx((-back["difference"]).tolist())
    assert there["p"].tolist() == pytest.approx(back["p"].tolist(), abs=0.01)
    for column in ("signed_rank", "sd_cases", "se_seeds", "detectable"):
        assert there[column].tolist() == pytest.approx(back[column].tolist())


def test_holm_s_family_is_what_is_asked_for():
    table = case_tables.cases({"segresmamba": 0.0, "a": -0.002, "b": 0.003})
    alone = statistics.compare(table, "segresmamba", DICE, [MEAN]).set_index("system")
    assert sorted(alone["p_holm"]) == sorted(
        [min(1, 2 * alone["p"].min()), max(alone["p"].max(), min(1, 2 * alone["p"].min()))]
    )
    whole = statistics.compare(table, "segresmamba")
    assert len(whole) == 2 * 3 * 3
    assert whole["p_holm"].min() == pytest.approx(min(1, 18 * whole["p"].min()))


def test_only_cases_that_both_have_are_compared():
    table = case_tables.cases(folds=(0, 1))
    table = table[(table["system"] == "segresmamba") | (table["fold"] == 0)]
    row, expected = (of_mean(rows).iloc[0] for rows in (table, table[table["fold"] == 0]))
    columns = ["n", "difference", "low", "high", "sd_cases", "signed_rank"]
    pd.testing.assert_series_equal(row[columns], expected[columns])
    assert row["df_seeds"] == expected["df_seeds"] + 2  # the other fold's say how much seeds matter


def test_a_difference_in_words_is_an_interval():
    (row,) = statistics.compare(case_tables.cases(), "segresmamba", DICE, [MEAN]).to_dict("records")
    text = statistics.in_words(row)
    assert text.startswith("none minus segresmamba, dice, mean of classes: -0.0")
    assert f"interval over 20 cases {row['low']:+.3f} to {row['high']:+.3f}; " in text
    assert f"{row['low_all']:+.3f} to {row['high_all']:+.3f} with other seeds" in text
    assert "one seed" in statistics.in_words(row | {"se_seeds": math.nan})


def test_signed_ranks_are_corrected_over_the_rows_of_a_call():
    table = statistics.compare(case_tables.cases(), "segresmamba", DICE)
    expected = multipletests(table["signed_rank"], method="holm")[1]
    np.testing.assert_array_equal(table["signed_rank_holm"], expected)
    assert (table["signed_rank_holm"] > table["signed_rank"]).any()


def test_what_is_compared_has_to_be_there():
    for asked in ({"classes": ["liver"]}, {"systems": ["unet"]}):
        with pytest.raises(ValueError, match=r"has no (class liver|system unet)"):
            statistics.compare(case_tables.cases(), "segresmamba", DICE, **asked)


def spoilt(**changes):
    return case_tables.cases().assign(**changes)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            spoilt(steps=lambda t: np.where(t["system"] == "segresmamba", 1500, 900)),
            "different budgets",
        ),
        (spoilt(dice=lambda t: t["dice"].where(t.index > 0)), "values that are missing"),
        (pd.concat([spoilt(), spoilt()]), "a run's case twice"),
        (spoilt(fold=lambda t: t["seed"]), "in more than one fold"),
        (spoilt().drop(columns="seed"), "lacks the columns seed"),
        (spoilt(case=lambda t: t["system"] + t["case"]), "'none' and 'segresmamba' share no case"),
        (
            spoilt(system="none"),
            "'segresmamba' and a system to compare it with are needed, got none",
        ),
    ],
)
def test_a_table_that_would_mislead_is_refused(table, message):
    table = table.drop_duplicates(statistics.KEYS) if (table["system"] == "none").all() else table
    with pytest.raises(ValueError, match=message):
        statistics.compare(table, "segresmamba", DICE)


def test_at_equal_time_steps_may_differ():
    table = case_tables.cases(minutes=12.0)
    table["steps"] = np.where(table["system"] == "segresmamba", 1500, 900)
    assert len(statistics.compare(table, "segresmamba", DICE)) == 3


ROW = {"difference": -0.01, "low_all": -0.014, "high_all": -0.006, "se_seeds": 0.001}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "worse"),
        ({"difference": 0.01, "low_all": 0.006, "high_all": 0.014}, "better"),
        ({"high_all": 0.001}, "no difference shown"),
        ({"se_seeds": float("nan")}, "one seed only"),
    ],
)
def test_an_effect_is_named_only_where_cases_and_seeds_leave_no_doubt(changed, words):
    assert statistics.effect(ROW | changed) == words


def test_the_interval_of_one_seed_is_over_cases():
    row = ROW | {"low": -0.012, "high": -0.008}
    assert statistics.interval_in_points(row) == pytest.approx((-1.4, -0.6))
    of_one_seed = statistics.interval_in_points(row | {"se_seeds": float("nan")})
    assert of_one_seed == pytest.approx((-1.2, -0.8))


@pytest.mark.parametrize(
    ("dataset", "told"),
    [
        ("cue-032", ("cue", 2, 32)),
        ("cue-032-axis1", ("cue", 1, 32)),
        ("mirror-048", ("mirror", 2, 48)),
    ],
)
def test_accuracy_is_the_share_of_the_called_voxels_that_is_called_right(dataset, told):
    key = {"system": "segresmamba", "title": "SegResMamba", "dataset": dataset, "seed": 1}
    found = {"sensitivity": [0.5, 0.25], "volume_ref_ml": 4.0, "volume_pred_ml": [4.0, 2.0]}
    (row,) = statistics.cue_accuracy(pd.DataFrame({**key, **found})).to_dict("records")
    assert (row["task"], row["axis"], row["distance"]) == told
    assert (row["accuracy"], row["found"]) == (3 / 6, 6 / 8)


def test_accuracies_that_differ_beyond_the_digits_of_the_files_are_equal():
    """Three wrong voxels of 13,827 and of 13,826, which decided a point of `distance`; and no more than all right."""
    key = {"system": "none", "title": "no ToM", "dataset": "cue-016", "seed": [0, 1, 2]}
    found = {"sensitivity": 1.0, "volume_ref_ml": [13.824, 13.823, 1.0000000003]}
    called = {"volume_pred_ml": [13.827, 13.826, 1.0]}
    accuracy = statistics.cue_accuracy(pd.DataFrame({**key, **found, **called}))["accuracy"]
    assert accuracy[0] == accuracy[1] < accuracy[2] == 1


def accuracies(at=("cue", 2, 16), **systems):
    """A row for each training: its accuracies by system, with seeds from 0."""
    point = dict(zip(statistics.POINT, at, strict=True))
    return pd.DataFrame(
        [
            point | {"system": system, "seed": seed, "accuracy": value}
            for system, values in systems.items()
            for seed, value in enumerate(values)
        ]
    )


def ruled(table, column, by="system"):
    """What a rule says of each system, or by other columns; `None` where it decides nothing."""
    rows = statistics.carried(table, "ours", 3).set_index(by)[column]
    return {name: None if pd.isna(said) else bool(said) for name, said in rows.items()}


HIGH, LOW = (0.9, 0.8, 1.0), (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("trainings", "carries"),
    [
        ((0.75, 0.75, 0.75), True),
        ((0.5, 0.75, 1.0), True),  # the mean counts, not each
        ((0.5, 0.74, 1.0), False),
        ((1.0, 1.0), None),
        ((1.0, 1.0, 1.0, 1.0), None),
    ],
)
def test_the_mark_is_carried_from_a_mean_of_three_quarters(trainings, carries):
    found = ruled(accuracies(ours=LOW, other=trainings), "carries")
    assert found == {"ours": False, "other": carries}


@pytest.mark.parametrize(
    ("ours", "other", "behind"),
    [
        (HIGH, LOW, True),
        (HIGH, (0.7, 0.79, 0.78), True),  # also one that carries the mark
        (HIGH, (0.1, 0.1, 0.8), False),  # as high as the lowest is not lower
        (HIGH, (0.1, 0.1, 0.95), False),
        (LOW, HIGH, False),
        ((0.7, 0.7, 0.7), LOW, False),  # higher, but lost, too
        (HIGH, LOW[:2], None),
        (HIGH[:2], LOW, None),
        (HIGH, (*LOW, 0.5), None),
        ((), LOW, None),
    ],
)
def test_behind_is_what_has_no_training_as_high_as_the_lowest_of_one_that_carries(
    ours, other, behind
):
    along_0 = accuracies(("cue", 0, 16), ours=HIGH, other=LOW)
    table = pd.concat([accuracies(ours=ours, other=other), along_0])
    found = ruled(table, "behind", ["axis", "system"])
    assert found[2, "other"] is behind
    assert (found[0, "ours"], found[0, "other"]) == (False, True)


@pytest.mark.parametrize(
    ("near", "nothing"),
    [
        ({"ours": LOW, "other": LOW}, True),
        ({"ours": LOW, "other": HIGH}, False),
        ({"ours": LOW[:1], "other": HIGH}, False),
        ({"ours": LOW, "other": HIGH[:2]}, None),
        ({"ours": LOW}, None),  # the other one is not there yet
        ({}, None),
    ],
)
def test_the_half_real_task_says_nothing_if_all_lose_its_shortest_distance(near, nothing):
    far = [accuracies((task, 2, 48), ours=HIGH, other=HIGH) for task in ("mirror", "cue")]
    lost = accuracies(("cue", 2, 8), ours=LOW, other=LOW)  # of which the rule does not speak
    table = pd.concat([*far, lost, accuracies(("mirror", 2, 8), **near)])
    found = ruled(table, "says_nothing", ["task", "distance", "system"])
    assert {said for (task, *_), said in found.items() if task == "cue"} == {False}
    assert {said for (task, *_), said in found.items() if task == "mirror"} == {nothing}


def test_rules_have_a_row_for_each_system_at_each_distance():
    table = pd.concat([accuracies(ours=HIGH, other=LOW), accuracies(("cue", 2, 64), ours=LOW[:2])])
    found = statistics.carried(table.assign(title="of no use"), "ours", 3)
    columns = ["distance", "system", "mean", "lowest", "highest", "trainings"]
    rows = [[16, "ours", 0.9, 0.8, 1.0, 3], [16, "other", 0.5, 0.5, 0.5, 3]]
    expected = pd.DataFrame([*rows, [64, "ours", 0.5, 0.5, 0.5, 2]], columns=columns)
    pd.testing.assert_frame_equal(found[columns], expected)
    assert ruled(accuracies(ours=HIGH), "behind") == {"ours": False}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (accuracies(ours=HIGH).drop(columns=["seed", "axis"]), "lacks the columns axis, seed"),
        (accuracies(ours=HIGH)[:0], "empty"),
        (pd.DataFrame(), "lacks the columns"),
        (accuracies(ours=(0.9, math.nan, 0.9)), "values that are missing"),
        (pd.concat([accuracies(ours=HIGH)] * 2), "a training twice"),
        (accuracies(none=HIGH, conv=LOW), "'ours' is needed, got none, conv"),
    ],
)
def test_accuracies_that_would_mislead_are_refused(table, message):
    with pytest.raises(ValueError, match=message):
        statistics.carried(table, "ours", 3)
