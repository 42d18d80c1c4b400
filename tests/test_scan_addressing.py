"""Which token goes where, as integers: every length and number of slices up to 600."""

from __future__ import annotations

import numpy as np
import pytest

from srlib.scan import ORDERS, backends, token_order

LONGEST = 600


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
