"""Sliding windows slab by slab: the same scores as MONAI's over the whole image."""

import pytest
import torch
from monai.inferers import sliding_window_inference

from srlib.run import windows


def scores_of(window):
    """Scores (1, 3, ...) of a window (1, 1, ...) that depend on the place within it."""
    ramp = torch.linspace(-1, 1, window[0, 0].numel()).view_as(window)
    return torch.cat([window, window * ramp, ramp.sin()], dim=1)


def whole(image, patch_size, overlap):
    """What MONAI computes at once, with the same weights."""
    weights = torch.ones(())
    for k, n in enumerate(patch_size):
        shape = [-1 if j == k else 1 for j in range(3)]
        weights = weights * windows._gaussian(n).view(shape)
    return sliding_window_inference(
        image[None], patch_size, 1, scores_of, overlap, roi_weight_map=weights[None, None]
    )[0]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    ("size", "overlap"), [((23, 11, 17), 0.5), ((30, 8, 9), 0.7), ((5, 20, 12), 0.25)]
)
def test_slabs_are_what_monai_computes_at_once(size, overlap, axis):
    """Also where the image is smaller than the window, along the walked axis or another."""
    image, patch_size = torch.randn(1, *size), (8, 8, 8)
    slabs = list(windows.scores_by_slab(scores_of, image, patch_size, "cpu", axis, overlap))
    expected = whole(image, patch_size, overlap)
    torch.testing.assert_close(torch.cat(slabs, dim=1 + axis), expected, rtol=1e-4, atol=1e-5)


def test_count_is_the_number_of_windows():
    seen = []

    def counted(window):
        seen.append(window)
        return window

    image = torch.randn(1, 23, 11, 6)
    list(windows.scores_by_slab(counted, image, (8, 8, 8), "cpu", 0, 0.6))
    assert len(seen) == windows.count((23, 11, 6), (8, 8, 8), 0.6)


def test_mirrored_averages_over_all_mirrorings():
    window = torch.randn(1, 1, 4, 5, 6)
    kernel = torch.randn(2, 1, 3, 3, 3)

    def predictor(x):
        return torch.conv3d(x, kernel, padding=1)

    dims = [(), (2,), (4,), (2, 4)]
    expected = sum(predictor(window.flip(d)).flip(d) for d in dims) / 4
    torch.testing.assert_close(windows.mirrored(predictor, (0, 2))(window), expected)
    assert torch.equal(windows.mirrored(predictor, ())(window), predictor(window))
