"""What is kept and what runs again."""

import gc
import weakref

import torch
import torch.nn.functional as F
from torch import nn

from srlib.recompute import recomputed


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


def test_same_result_and_gradients_as_without():
    (norm, act, conv), x = layers()
    found = recomputed(x, norm, act, conv)
    expected = conv(act(norm(x)))
    assert torch.equal(found, expected)
    inputs = (x, *conv.parameters())
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_without_gradients_nothing_runs_twice():
    (norm, act, conv), x = layers()
    with torch.no_grad():
        assert not recomputed(x, norm, act, conv).requires_grad
    assert [len(layer.results) for layer in (norm, act, conv)] == [1, 1, 1]
