"""Sliding windows over an image of any size in bounded memory: class scores come slab by slab.

MONAI's `sliding_window_inference` holds the scores of the whole image, 8.8 GB for 14 classes of a CT
with 512 x 512 x 600 voxels. Here it walks over one row of windows at a time, and the rows are blended
along the remaining axis as it blends within them. The weight of a window is a Gaussian along each axis
(standard deviation an eighth of the window), so the weights of a row factor out.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from itertools import product
from math import prod

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor

Predictor = Callable[[Tensor], Tensor]
OVERLAP = 0.5  # of neighbouring windows, as a share of their length


def starts(size: int, window: int, overlap: float = OVERLAP) -> list[int]:
    """First voxels of the windows along an axis: evenly spaced, the last one ends with the axis."""
    last = max(size - window, 0)
    return [*range(0, last, max(int(window * (1 - overlap)), 1)), last]


def count(size: Sequence[int], patch_size: Sequence[int], overlap: float = OVERLAP) -> int:
    """How many windows an image of that size is looked at through."""
    return prod(len(starts(n, window, overlap)) for n, window in zip(size, patch_size, strict=True))


def scores_by_slab(
    predictor: Predictor,
    image: Tensor,
    patch_size: Sequence[int],
    device: torch.device | str = "cpu",
    axis: int = 0,
    overlap: float = OVERLAP,
) -> Generator[Tensor, None, None]:
    """Blended scores of an image, in consecutive slabs that together make up the whole.

    Memory: the scores of two slabs of one window's length, wherever `image` lies.

    Args:
        predictor: a window (1, C, *patch_size) -> scores (1, K, *patch_size), on `device`.
        image: (C, X, Y, Z), float; where it is smaller than the window it is padded with zeros, its
            mean after normalisation.
        patch_size: of the window, voxels.
        device: where windows and scores are.
        axis: spatial axis (0 to 2) that is walked along.
        overlap: of neighbouring windows, from 0 to below 1.

    Yields:
        Scores (K, X, Y, Z) with as many planes along `axis` as are complete, on `device`.
    """
    size, window = image.shape[1 + axis], min(patch_size[axis], image.shape[1 + axis])
    lengths = [window if k == axis else n for k, n in enumerate(patch_size)]
    weights = [
        _gaussian(n).view([-1 if j == k else 1 for j in range(3)]).to(device)
        for k, n in enumerate(lengths)
    ]
    along = weights.pop(axis)
    within_row = prod(weights, start=torch.ones((), device=device)).expand(*patch_size)[None, None]

    first = starts(size, window, overlap)
    rest = rest_weights = None
    for start, following in zip(first, [*first[1:], size], strict=True):
        with torch.inference_mode():
            row = image.narrow(1 + axis, start, window)[None].to(device)
            scores = sliding_window_inference(
                row, tuple(patch_size), 1, predictor, overlap, roi_weight_map=within_row
            )[0]
            scores *= along
            total = along.clone()
            if rest is not None and rest_weights is not None:
                scores.narrow(1 + axis, 0, rest.shape[1 + axis]).add_(rest)
                total.narrow(axis, 0, rest.shape[1 + axis]).add_(rest_weights)
            done = following - start
            rest = scores.narrow(1 + axis, done, window - done).clone()
            rest_weights = total.narrow(axis, done, window - done)
            complete = scores.narrow(1 + axis, 0, done).div_(total.narrow(axis, 0, done))
        del scores
        yield complete
        del complete


def mirrored(predictor: Predictor, axes: Sequence[int]) -> Predictor:
    """The mean of a predictor's scores over all mirrorings along spatial axes (0 to 2)."""
    subsets = [
        [2 + axis for axis, flip in zip(axes, choice, strict=True) if flip]
        for choice in product((False, True), repeat=len(axes))
    ]

    def mean_of_mirrorings(window: Tensor) -> Tensor:
        total = predictor(window)
        for dims in subsets[1:]:  # the first is empty
            total = total + predictor(window.flip(dims)).flip(dims)
        return total / len(subsets)

    return mean_of_mirrorings


def _gaussian(length: int) -> Tensor:
    """Weights along a window's axis, (length,)."""
    offsets = torch.arange(length) - (length - 1) / 2
    return torch.exp(-0.5 * (offsets / (length / 8)) ** 2)
