"""Which token goes where: as integers for all lengths and numbers of slices up to 600, and in the gradients."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from srlib.files import ROOT
from srlib.scan import ORDERS, backends, mixer, token_order

LONGEST = 600
_file = ROOT / "benchmarks" / "scan_checks.py"
_spec = importlib.util.spec_from_file_location("scan_checks", _file)
scan_checks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(scan_checks)


def visited(order: str, length: int, slices: np.ndarray) -> np.ndarray:
    """The tokens in the order of visit, (numbers of slices, L)."""
    return np.stack([token_order(order, length, count).numpy() for count in slices.tolist()])


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_visits_each_token_once_where_its_definition_says(order):
    for length in range(1, LONGEST + 1):
        # Up to as many slices as tokens; with more each token is a slice, as with so many.
        slices = np.arange(1, length + 1) if order == "inter_slice" else np.array([1, 600])
        tokens, slices = visited(order, length, slices), slices[:, None]
        per_slice = -(-length // slices)
        rank = {
            "forward": tokens,
            "reverse": -tokens,
            "inter_slice": tokens % per_slice * slices + tokens // per_slice,
        }[order]
        # Ranks that rise, of L numbers that are tokens: each token comes once, and in this order.
        assert tokens.min() == 0
        assert tokens.max() == length - 1
        assert (np.diff(rank) > 0).all()
        assert np.array_equal(token_order(order, length, 1000), tokens[-1])


@pytest.mark.skipif(not backends()["cpu"].available, reason=backends()["cpu"].reason)
def test_the_kernels_take_from_and_bring_to_every_orders_places():
    """Steps are numbered, and each way of copying a chunk is held to numpy's indexing.

    An order is the same for all numbers of slices of the same length: one of each is taken.
    """
    from numba import njit

    from srlib.scan import kernels
    from srlib.scan.kernels import CHUNK, LANES

    @njit
    def travel(orders, by_token, by_channel, copies, sums, states):
        tile = np.zeros((CHUNK, LANES), np.float32)
        for k in range(len(orders)):
            for start in range(0, orders.shape[1], CHUNK):
                places = orders[k, start : start + CHUNK]
                kernels._gather(tile, by_token, 0, 0, places)
                kernels._scatter(copies[k : k + 1], tile, 0, 0, places)
                kernels._gather(tile, by_channel, 0, 0, places)
                kernels._scatter(copies[k : k + 1, LANES : 2 * LANES], tile, 0, 0, places)
                in_vectors = kernels._whole_and_consecutive(places)
                row = start // LANES
                kernels._scatter_tokens(states[k : k + 1], sums[row:], 0, 0, places, in_vectors)

    numbers = np.arange(1024, dtype=np.float32)
    for length in range(1, LONGEST + 1):
        _, first = np.unique(-(-length // np.arange(1, length + 1)), return_index=True)
        orders = visited("inter_slice", length, first + 1)
        orders = np.concatenate([orders, orders[:1, ::-1]])
        by_channel = np.arange(LANES * length, dtype=np.float32).reshape(1, LANES, length)
        by_token = by_channel.swapaxes(1, 2).copy().swapaxes(1, 2)
        copies = np.full((len(orders), length, 2 * LANES), -1, np.float32).swapaxes(1, 2)
        states = np.full((len(orders), 1, length), -1, np.float32)
        travel(orders, by_token, by_channel, copies, numbers.reshape(-1, LANES), states)
        assert (copies == np.tile(by_channel, (1, 2, 1))).all()
        steps = np.take_along_axis(states[:, 0], orders, 1)
        assert (steps == numbers[:length]).all(), length


CHUNK = 64  # of the kernels, at whose borders lengths are taken
LENGTHS = [
    *range(1, 21),
    *(border + k for border in (CHUNK, 2 * CHUNK, 3 * CHUNK) for k in (-1, 0, 1)),
    *(
        60,
        90,
        4 * CHUNK,
        414,
        496,
        8 * CHUNK,
    ),  # maps of 3 x 4 x 5, ..., 8 x 8 x 8; ends that look consecutive
]


@pytest.mark.skipif(not backends()["cpu"].available, reason=backends()["cpu"].reason)
@pytest.mark.parametrize("chunk_by_chunk", [False, True])
def test_output_and_all_gradients_follow_the_definition_in_every_order(monkeypatch, chunk_by_chunk):
    if chunk_by_chunk:
        monkeypatch.setattr(mixer, "STRETCH", 1)
    compared = 0
    for length in LENGTHS:
        channels, states = (16, 2) if chunk_by_chunk else (17, 3)
        for operator, found in scan_checks.length_errors(length, channels, states).items():
            assert max(map(scan_checks.largest, found)) < 2e-5, (operator, length)
            compared += len(found)
    assert compared > 900


def test_a_chunk_whose_ends_alone_look_consecutive_is_among_them():
    """With these the gradients of B and C were once wrong."""
    for length, slices in ((64, 4), (64, 2), (414, 21), (496, 9)):
        assert length in LENGTHS
        tokens = token_order("inter_slice", length, slices)
        assert any(part[-1] - part[0] == CHUNK - 1 for part in tokens.split(CHUNK))
