"""A captured step gives the weights of steps without a graph, and says why it is not captured where it is not."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from srlib import data
from srlib.run import train
from srlib.run.captured import WARM_UP, CapturedStep, capturable, set_learning_rate
from srlib.run.runs import config_for


def weights_after(
    steps: int, device: str, captured: bool
) -> tuple[list[torch.Tensor], CapturedStep]:
    """Weights after some steps with a new batch and learning rate each."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1)).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    capturable(optimizer)

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = (network(x) - y).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    take_step = CapturedStep(step, "" if captured else "as it is")
    for i in range(steps):
        set_learning_rate(optimizer, 0.1 / (i + 1))
        x = torch.randn(4, 8).to(device)
        take_step(x, x.sum(1, keepdim=True))
    return list(network.parameters()), take_step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing can be captured")
def test_captured_steps_give_the_weights_of_steps_as_they_are():
    expected, _ = weights_after(WARM_UP + 5, "cuda", captured=False)
    found, step = weights_after(WARM_UP + 5, "cuda", captured=True)
    assert step.graph is not None, step.reason
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: a CPU's bits are tested")
def test_two_trainings_on_a_gpu_give_the_same_weights(tmp_path, monkeypatch):
    found = []
    for name in ("first", "second"):
        monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path / name))
        run = train.train(config_for("default", "cue-008", steps=WARM_UP + 20), progress=False)
        found.append(train.load_trained(run.run_dir).weights)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing can be captured")
def test_a_training_s_captured_steps_give_the_weights_of_its_steps_as_they_are():
    config, found = config_for("default", "cue-008", steps=1, model="tiny"), []
    image = torch.randn(2, 1, 24, 24, 96, device="cuda")
    label = torch.randint(3, (2, 1, 24, 24, 96), device="cuda")
    for refusal in ("as it is", ""):
        network, adam, step = train.training_step(train.launch(config), config, data.get("cue-008"))
        capturable(adam)
        take_step = CapturedStep(step, refusal)
        with train.same_bits():
            for _ in range(WARM_UP + 5):
                take_step(image, label)
        assert (take_step.graph is None) == bool(refusal), take_step.reason
        found.append([p.detach() for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: a CPU's bits are tested")
def test_a_resumed_training_on_a_gpu_gives_the_weights_of_the_undisturbed_one(
    tmp_path, monkeypatch
):
    config = config_for("default", "cue-008", steps=2 * (WARM_UP + 5))
    monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path / "undisturbed"))
    expected = train.load_trained(train.train(config, progress=False).run_dir).weights
    monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path / "resumed"))
    rate = train.learning_rate

    def stop(config, step):
        if step == WARM_UP + 5:  # some of its steps were captured
            raise KeyboardInterrupt
        return rate(config, step)

    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", stop)
        with pytest.raises(KeyboardInterrupt):
            train.train(config, progress=False, checkpoint_seconds=0)
    found = train.load_trained(train.train(config, progress=False).run_dir)
    assert all(torch.equal(found.weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("before", [False, True])
def test_cudnn_is_deterministic_in_a_training_and_as_before_afterwards(
    monkeypatch, tmp_path, before
):
    def training(*given):
        assert torch.backends.cudnn.deterministic
        raise KeyError

    monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", before)
    monkeypatch.setattr(train, "_train", training)
    with pytest.raises(KeyError):
        train.train(config_for("smoke", "cue-008", steps=1))
    assert torch.backends.cudnn.deterministic == before


def test_elsewhere_steps_run_as_they_are_and_the_log_says_why(caplog):
    with caplog.at_level(logging.INFO, logger="srlib"):
        found, step = weights_after(5, "cpu", captured=True)
    assert step.graph is None
    assert [record.getMessage() for record in caplog.records] == [
        "training steps are not captured: tensors are on cpu"
    ]
    expected, _ = weights_after(5, "cpu", captured=False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
