"""Runs: identity, bit-identical resumption after kill -9, nothing done twice."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from monai.losses import DiceLoss
from safetensors.torch import load_file

from srlib import data
from srlib.data.samples import AUTHORS
from srlib.run import runs, train
from srlib.run.runs import RunConfig

QUICK = RunConfig(
    "mni152",
    steps=6,
    model="tiny",
    tom="inner",
    batch_size=1,
    patch_size=(36, 20, 20),
    warmup=1 / 3,
)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path))
    return tmp_path


def weights(config):
    return load_file(runs.run_dir(config) / "model.safetensors")


def test_identity_changes_with_all_that_the_weights_depend_on(monkeypatch):
    ids = {runs.run_id(QUICK)}
    for change in (
        {"seed": 1},
        {"fold": 0, "steps": 7},
        {"tom": "none"},
        {"slice_axis": 1},
        {"augment": False},
        {"recipe": "authors"},
    ):
        ids.add(runs.run_id(dataclasses.replace(QUICK, **change)))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    ids.add(runs.run_id(QUICK))
    torch.set_num_threads(threads)
    monkeypatch.setattr(data.Dataset, "fingerprint", "other data")
    ids.add(runs.run_id(QUICK))
    monkeypatch.undo()
    monkeypatch.setattr(runs, "RECIPE", 0)
    ids.add(runs.run_id(QUICK))
    assert len(ids) == 10
    assert "recipe" not in json.loads(QUICK.to_json())  # or runs of the default one would be others


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "huge"}, "model 'huge' is not one of"),
        ({"recipe": "mine"}, "recipe 'mine' is not one of default, authors"),
        ({"steps": 0}, "steps must be positive"),
    ],
)
def test_bad_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(QUICK, **change)


def test_profiles_give_configurations():
    config = runs.config_for("smoke", "mni152", seed=3, tom="none")
    assert (config.model, config.seed, config.tom) == ("tiny", 3, "none")
    with pytest.raises(ValueError, match="profile 'huge' is not one of smoke, default, full"):
        runs.config_for("huge", "mni152")

    told = runs.config_for("default", "mni152")
    assert RunConfig("mni152") == told  # what is not told is the default profile's


def test_schedule_warms_up_and_decays():
    rates = [train.learning_rate(QUICK, step) for step in range(QUICK.steps)]
    assert rates[:2] == [QUICK.learning_rate / 2, QUICK.learning_rate]
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] > 0


def test_weight_decay_leaves_out_vectors_and_rates_of_forgetting():
    network = train.build_model(QUICK)
    decayed, exempt = train.parameter_groups(network, 0.1)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0)
    of = {id(parameter): name for name, parameter in network.named_parameters()}
    names = {of[id(parameter)] for parameter in exempt["params"]}
    assert {n.rpartition(".")[2] for n in names if network.get_parameter(n).ndim > 1} == {
        "A_log",
        "A_b_log",
        "A_s_log",
    }
    assert len(names) + len(decayed["params"]) == len(of)
    assert all(parameter.ndim > 1 for parameter in decayed["params"])


def test_the_average_is_the_sum_of_what_each_step_adds():
    network = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.BatchNorm1d(1)).double()
    average = train.WeightAverage(network)
    expected = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for step in range(5000):
        with torch.no_grad():
            network[0].weight += 0.01
            network[1].running_var += 0.01
            network[1].num_batches_tracked += 1
        average.update(step)
        kept = min(0.998, (1 + step) / (10 + step))
        for name in ("0.weight", "1.running_var"):
            expected[name] = kept * expected[name] + (1 - kept) * network.state_dict()[name]
    torch.testing.assert_close(
        average.values, expected | {"1.num_batches_tracked": torch.tensor(5000)}
    )
    assert average.values["0.weight"].mean() < network[0].weight.mean() - 4  # some 500 steps late


@pytest.fixture
def in_float64():
    """Fabric casts a float64 network's output to this."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_authors_recipe_is_that_of_their_script(results, in_float64):
    """Held to torch's and MONAI's own Adam, cosine and Dice, in float64: Adam makes much of rounding."""
    theirs = {"learning_rate": 1e-4, "weight_decay": 1e-5, "recipe": "authors"}
    theirs["precision"] = "64-true"
    config = dataclasses.replace(QUICK, **theirs)
    dataset = runs.open_data(config)
    assert dataset.entry.normalisation == ("nonzero",)
    assert data.open(QUICK.dataset).entry.normalisation == ("scan",)
    cases, network = dataset.split().train, train.build_model(config).double()
    adam = torch.optim.Adam(network.parameters(), 1e-4, weight_decay=1e-5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=config.steps)
    dice = DiceLoss(smooth_nr=0, smooth_dr=1e-5, squared_pred=True, to_onehot_y=True, sigmoid=True)
    budget = (config.patch_size, config.batch_size, config.steps, config.seed)
    samples = data.TrainingSamples(dataset, cases, *budget, augmentation=AUTHORS)
    for batch in torch.utils.data.DataLoader(samples, config.batch_size):
        adam.zero_grad()
        dice(network(batch["image"].double()), batch["label"]).backward()
        adam.step()
        cosine.step()
    result = train.train(config)
    rates = result.history["learning_rate"]
    assert rates.iloc[0] == 1e-4
    assert rates.is_monotonic_decreasing
    found, expected = (dict(n.state_dict()) for n in (result.model, network))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9, check_dtype=False)


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([0.2] * 100 + [150.0], True),
        ([1.5] * 20 + [0.1] * 200 + [1.6] * 30, True),
        ([1.5] * 20 + [0.1] * 200 + [1.6] * 3, False),  # a batch that is hard
        ([1.5] * 20 + [0.001] * 200 + [0.4] * 200, False),  # a few wrong voxels
        ([1.5] * 1000, False),
    ],
)
def test_a_training_whose_loss_rose_tenfold_has_diverged(losses, diverged):
    watch = train.Divergence()
    assert any(watch.add(loss) for loss in losses) is diverged


def test_a_training_that_diverges_stops_with_an_error(results, monkeypatch):
    monkeypatch.setattr(train, "DIVERGED", 0.5)
    with pytest.raises(
        FloatingPointError, match=r"step 0: the loss rose from .* diverged, and nothing more"
    ):
        train.train(QUICK)
    assert not runs.is_done(QUICK)


def test_a_run_is_done_once_and_reads_back(results):
    first = train.train(QUICK)
    stamp = (first.run_dir / "model.safetensors").stat().st_mtime_ns
    again = train.train(QUICK)
    assert (again.run_dir / "model.safetensors").stat().st_mtime_ns == stamp
    pd.testing.assert_frame_equal(first.history, again.history)
    assert first.history["step"].tolist() == list(range(QUICK.steps))
    assert not again.model.training
    record = json.loads((first.run_dir / "run.json").read_text())
    assert record["config"]["tom"] == "inner"
    assert not (first.run_dir / "checkpoint.pt").exists()


def test_kill_and_resume_gives_the_weights_of_the_undisturbed_run(results, monkeypatch):
    long = dataclasses.replace(QUICK, steps=40)
    # Each step of the run that is killed takes a while, so that no machine is too fast to kill it.
    code = (
        "import time; from srlib.run import train; from srlib.run.runs import RunConfig; "
        "rate = train.learning_rate; "
        "train.learning_rate = lambda *step: (time.sleep(0.1), rate(*step))[1]; "
        f"train.train({long!r}, checkpoint_seconds=0)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ))
    checkpoint = runs.run_dir(long) / "checkpoint.pt"
    while not checkpoint.exists():
        assert process.poll() is None, "the training ended before it could be killed"
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not runs.is_done(long)
    done = len(torch.load(checkpoint, weights_only=True)["history"])
    assert 0 < done < long.steps

    train.train(long)
    resumed = weights(long)
    monkeypatch.setenv("SRLIB_RESULTS", str(results / "undisturbed"))
    train.train(long)
    undisturbed = weights(long)
    assert resumed.keys() == undisturbed.keys()
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in resumed)


@pytest.mark.parametrize("step", [2, QUICK.steps - 1])
def test_a_training_that_diverges_stops_and_saves_no_numbers_that_are_none(
    results, monkeypatch, step
):
    """A NaN in the weights, from a step on; in the last one no loss tells."""
    spoilt = train.learning_rate

    def rate(config, now):
        return math.nan if now == step else spoilt(config, now)

    monkeypatch.setattr(train, "learning_rate", rate)
    with pytest.raises(FloatingPointError, match=r"step \d: loss or weights .* than 0.004"):
        train.train(QUICK, checkpoint_seconds=0)
    monkeypatch.undo()
    folder = results / "runs" / runs.run_id(QUICK)
    assert not (folder / "model.safetensors").exists()
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert len(saved["history"]) == step
    assert all(weight.isfinite().all() for weight in saved["model"].values())


def test_what_a_killed_process_left_half_written_is_removed(results):
    left = runs.run_dir(QUICK) / ".checkpoint-abcd_123.pt"
    left.parent.mkdir(parents=True)
    left.touch()
    train.train(QUICK)
    assert {file.name for file in left.parent.iterdir()} == {
        *(".lock", "history.csv", "model.safetensors", "run.json")
    }


def test_cases_are_checked_before_anything_is_computed(results, monkeypatch):
    def refuse(self, fold):
        raise data.DataError("bad.nii.gz: not a gzip file")

    monkeypatch.setattr(data.Dataset, "check", refuse)
    with pytest.raises(data.DataError, match=r"bad\.nii\.gz"):
        train.train(QUICK)
    assert not runs.run_dir(QUICK).exists()
