"""What is kept and what runs again."""

import gc
import weakref
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from srlib.net.model import CMMB, Downsample, Skip, UpStage
from srlib.scan import recompute
from srlib.scan.recompute import recomputed


class Watched(nn.Module):
    """A function that remembers its calls, and its results as long as others hold them."""

    def __init__(self, function):
        super().__init__()
        self.function, self.results = function, []

    def forward(self, x):
        y = self.function(x)
        self.results.append(weakref.ref(y))
        return y

    @property
    def alive(self):
        gc.collect()
        return [result() is not None for result in self.results]


def layers():
    torch.manual_seed(0)
    functions = (F.instance_norm, F.relu, nn.Conv3d(2, 3, 3))
    return [Watched(f) for f in functions], torch.randn(1, 2, 5, 6, 7, requires_grad=True)


def test_inner_results_are_dropped_and_the_last_function_runs_once():
    (norm, act, conv), x = layers()
    y = recomputed(x, norm, act, conv)
    assert [norm.alive, act.alive, conv.alive] == [[False], [False], [True]]
    y.square().sum().backward()
    assert [len(layer.results) for layer in (norm, act, conv)] == [2, 2, 1]


def test_without_gradients_nothing_runs_twice(monkeypatch):
    """Nor is it prepared to: `checkpoint` imports torch's compiler, which takes longer than a scan."""
    monkeypatch.setattr(recompute, "checkpoint", None)
    (norm, act, conv), x = layers()
    with torch.no_grad():
        assert not recomputed(x, norm, act, conv).requires_grad
    assert [len(layer.results) for layer in (norm, act, conv)] == [1, 1, 1]


def test_differentiated_twice_it_is_still_right():
    (norm, _, conv), x = layers()
    functions = (norm.double(), torch.sigmoid, conv.double())
    x = x.detach()[:, :, :3, :3, :3].double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda t: recomputed(t, *functions), x)


def test_a_function_whose_tensors_cannot_be_found_is_refused():
    (norm, _, _), x = layers()
    with pytest.raises(TypeError, match="expected modules, methods of theirs or plain functions"):
        recomputed(x, lambda t: norm(t))


class Network(nn.Module):
    """One of each part that SegResMamba is made of, from map to map."""

    def __init__(self, fused):
        super().__init__()
        self.skip, self.block = Skip(8), CMMB(8, d_state=2, fused=fused)
        self.down, self.up = Downsample(8, 16), UpStage(16, 8)

    def forward(self, x):
        x = self.block(recomputed(x, self.skip))
        return self.up(self.down(x), x)


@pytest.mark.parametrize("fused", [True, False])
def test_what_changes_before_the_backward_pass_is_noticed(fused):
    """Any parameter, changed in place: an error, or the gradients that there would have been without the change."""
    torch.manual_seed(0)
    network = Network(fused)
    loss = network(torch.randn(1, 8, 3, 3, 3)).square().mean()
    parameters = dict(network.named_parameters())
    gradients = partial(torch.autograd.grad, loss, list(parameters.values()), retain_graph=True)
    expected, unnoticed = gradients(), []
    for name, parameter in parameters.items():
        before = parameter.detach().clone()
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(parameter):
            parameter.add_(1)
            with suppress(RuntimeError):
                found = gradients()
                assert all(map(torch.equal, found, expected)), name
                unnoticed.append(name)
            parameter.copy_(before)
    assert all(map(torch.equal, gradients(), expected))
    assert unnoticed == []


def test_plenty_of_memory_is_not_saved(monkeypatch):
    """By the rule: on CUDA, room for 200 tensors of the map's size."""
    monkeypatch.setattr(recompute, "checkpoint", lambda *_, **__: "again")
    properties = SimpleNamespace(total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def way(recompute, is_cuda, nbytes):
        x = SimpleNamespace(is_cuda=is_cuda, nbytes=nbytes, device="cuda:0")
        return recomputed(x, lambda x: "kept", recompute=recompute)

    assert [way("auto", True, n) for n in (2**22, 2**23)] == ["kept", "again"]
    assert way("auto", False, 1) == way(True, True, 1) == "again"
    assert way(False, True, 2**30) == "kept"
