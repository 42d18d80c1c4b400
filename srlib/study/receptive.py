"""Effective receptive field: how much each voxel of the input moves one voxel of the output (Luo et al. 2016).

The field is the absolute gradient of the logits at one voxel with respect to the image, averaged over images and
classes. It says what a network listens to, not what it could reach: the theoretical receptive field of every network
here is the whole map, since InstanceNorm alone lets each voxel see the mean of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from monai.transforms import ResizeWithPadOrCrop
from numpy.typing import NDArray
from torch import Tensor, nn

from srlib import data


def effective_field(network: nn.Module, images: Iterable[Tensor]) -> NDArray[np.float64]:
    """Mean absolute gradient of the logits at the middle voxel.

    Args:
        network: maps (1, C_in, D, H, W) to logits of the same size; its mode is left as it is.
        images: (C_in, D, H, W) each, all of one size, on the network's device.

    Returns:
        (D, H, W), summing to 1: the mean over images, classes and channels, each image and class with equal weight.

    Raises:
        ValueError: there is no image, or no logit at the middle voxel depends on one of them.
    """
    fields = [field for image in images for field in _fields(network, image)]
    if not fields:
        raise ValueError("the effective receptive field needs at least one image")
    return np.mean(fields, axis=0)


def _fields(network: nn.Module, image: Tensor) -> list[NDArray[np.float64]]:
    """The field of one image (C_in, D, H, W) for each class, (D, H, W), summing to 1."""
    image = image[None].detach().requires_grad_()
    middle = tuple(n // 2 for n in image.shape[2:])
    fields = []
    for logit in network(image)[0, :, *middle]:
        (gradient,) = torch.autograd.grad(logit, image, retain_graph=True)
        field = gradient[0].abs().sum(0).double().cpu().numpy()
        if not field.sum() > 0:
            raise ValueError("no voxel of the image moves the logit at its middle")
        fields.append(field / field.sum())
    return fields


def distances(shape: Sequence[int], spacing: Sequence[float]) -> NDArray[np.float64]:
    """Distance (mm) of each voxel from the middle one, for `shape` and `spacing` (mm) of three axes."""
    axes = [mm * (np.arange(n) - n // 2) for n, mm in zip(shape, spacing, strict=True)]
    return np.sqrt(sum(np.square(axis) for axis in np.meshgrid(*axes, indexing="ij")))


def radius(field: NDArray[np.float64], spacing: Sequence[float], share: float = 0.95) -> float:
    """The smallest radius (mm) of a ball about the middle voxel that holds `share` of the field."""
    distance = distances(field.shape, spacing).ravel()
    order = np.argsort(distance)
    held = np.cumsum(field.ravel()[order]) / field.sum()
    return float(distance[order][np.searchsorted(held, share)])


def share_by_radius(field: NDArray[np.float64], spacing: Sequence[float]) -> pd.DataFrame:
    """The share of the field within each radius: columns `radius_mm` (0, 1, 2, ...) and `share`."""
    distance = distances(field.shape, spacing).ravel()
    shells = np.bincount(np.ceil(distance).astype(int), weights=field.ravel())
    held = np.cumsum(shells) / field.sum()
    return pd.DataFrame({"radius_mm": np.arange(len(held)), "share": held})


def centred_images(
    dataset: data.Dataset, case_ids: Iterable[str], size: Sequence[int]
) -> list[Tensor]:
    """Preprocessed images (C, *size), each padded with zeros or cropped about its middle."""
    fit = ResizeWithPadOrCrop(size)
    fitted = [fit(dataset.load(case_id)["image"]) for case_id in case_ids]
    return [image.as_tensor() for image in fitted]  # type: ignore[attr-defined]
