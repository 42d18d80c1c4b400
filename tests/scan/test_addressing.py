"""The token of every step: as integers for all lengths and numbers of slices up to 600, and in the gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scan_inputs import scan_checks

from srlib.scan import ORDERS, backends, mixer, token_order


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_visits_each_token_once_where_its_definition_says(order):
    for length in range(1, 601):
        # Up to as many slices as tokens; with more each token is a slice, as with so many.
        slices = np.arange(1, length + 1) if order == "inter_slice" else np.array([1, 600])
        tokens = np.stack([token_order(order, length, count).numpy() for count in slices.tolist()])
        slices = slices[:, None]
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


@given(length=st.integers(1, 60), nslices=st.integers(1, 70))
def test_inter_slice_order_is_slice_minor_and_skips_what_is_not_there(length, nslices):
    per_slice = math.ceil(length / nslices)
    pairs = [(i, s) for i in range(per_slice) for s in range(nslices)]
    expected = [s * per_slice + i for i, s in pairs if s * per_slice + i < length]
    assert token_order("inter_slice", length, nslices).tolist() == expected


CHUNK = 64  # of the kernels, at whose borders lengths are taken
LENGTHS = [*range(1, 21), *(border + k for border in (64, 128, 192) for k in (-1, 0, 1))]
LENGTHS += [
    60,
    90,
    256,
    414,
    496,
    512,
]  # maps of 3 x 4 x 5 to 8 x 8 x 8; ends that look consecutive


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
