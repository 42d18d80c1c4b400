"""Effective receptive field: how much each voxel of the input moves one voxel of the output (Luo et al. 2016).

The field is the absolute gradient of the logits at one voxel with respect to the image, averaged over images and
classes. It says what a network listens to, not what it could reach: the theoretical receptive field of every network
here is the whole map, since InstanceNorm alone lets each voxel see the mean of all.

And what a scan remembers: how much of what each token wrote into the state is still in it some steps later.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from monai.transforms import ResizeWithPadOrCrop
from numpy.typing import NDArray
from torch import Tensor, nn

from srlib import data
from srlib.net.model import SegResMamba
from srlib.net.tom import ToMLayer, TriOrientedMamba
from srlib.scan import channel_norm, scan_arguments

Influence = Callable[[Sequence[int]], NDArray[np.float64]]


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


# --- One voxel, with and without parts of the network ----------------------------------------------


def influence(network: nn.Module, image: Tensor) -> Influence:
    """A function from a voxel of the output (D, H, W) to what moves the decision there.

    That is the absolute gradient of the largest logit at the voxel with respect to the image, (D, H, W), summing to 1.
    The image passes the network once, whatever number of voxels is asked for.

    Args:
        network: maps (1, C_in, D, H, W) to logits of the same size; its mode is left as it is.
        image: (C_in, D, H, W) on the network's device.
    """
    image = image[None].detach().requires_grad_()
    logits = network(image)[0]

    def of_voxel(voxel: Sequence[int]) -> NDArray[np.float64]:
        largest = logits[:, *voxel].max()
        (gradient,) = torch.autograd.grad(largest, image, retain_graph=True)
        field = gradient[0].abs().sum(0).double().cpu().numpy()
        return field / field.sum()

    return of_voxel


def without_recurrence(network: nn.Module) -> nn.Module:
    """A copy of a network whose scans forget their state at each token, its weights as they are."""
    changed = copy.deepcopy(network)
    for module in changed.modules():
        if isinstance(module, TriOrientedMamba):
            module.recurrence = False
    return changed


def without_tom(network: SegResMamba) -> SegResMamba:
    """A copy of a network that leaves its ToM layers out, its other weights as they are."""
    changed = copy.deepcopy(network)
    for block in changed.blocks:
        block.register_module("f3", None)
        block.tom = nn.Identity()
    return changed


# --- What a scan remembers -------------------------------------------------------------------------


class ScanInputs(NamedTuple):
    """What one order of a ToM layer computes from the tokens, in the order of the visits.

    Attributes:
        visits: (L,), the places in memory of the tokens visited.
        u, delta: (E, L).
        A: (E, N), negative.
        B, C: (N, L).
    """

    visits: Tensor
    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor


@torch.no_grad()
def scan_inputs(layer: TriOrientedMamba, tokens: Tensor, order: str, nslices: int) -> ScanInputs:
    """The arguments with which a ToM layer calls one of its scans, for tokens (L, C).

    Raises:
        ValueError: the layer has no such order.
    """
    if order not in layer.scan_orders:
        raise ValueError(f"order: expected one of the layer's {layer.scan_orders}, got {order!r}")
    weights = layer.weights()[layer.scan_orders.index(order)]
    x = F.linear(tokens, layer.in_proj.weight.chunk(2)[0])  # (L, C) -> (L, E)
    visits, *batched = scan_arguments(weights, order, nslices, x[None])
    u, delta, B, C = (tensor[0] for tensor in batched)
    delta = F.softplus(delta + weights.dt_bias[:, None])
    return ScanInputs(visits, u, delta, weights.A, B, C)


class ScanMemory(NamedTuple):
    """What a scan wrote into its states, and how time passed for them.

    Attributes:
        shape: (D, H, W) of the map.
        visits: (L,), the places in memory of the tokens visited.
        written: (L, E, N), absolute values of delta B u.
        time: (L, E), sums of delta up to each token.
        A: (E, N), negative.
    """

    shape: tuple[int, ...]
    visits: Tensor
    written: Tensor
    time: Tensor
    A: Tensor

    def remembered(self, step: int) -> NDArray[np.float32]:
        """The share of what each token wrote that is in the state after a step, in order of the visits, (step + 1,).

        A token writes delta B u into each state; by step t exp(A (time since)) of it is left. The share is the sum
        of what is left over the sum of what was written, in absolute values.
        """
        since = self.time[step] - self.time[: step + 1]  # (step + 1, E)
        left = (since[:, :, None] * self.A).exp_().mul_(self.written[: step + 1])
        return (left.sum((1, 2)) / self.written[: step + 1].sum((1, 2))).cpu().numpy()

    def as_map(self, step: int) -> NDArray[np.float32]:
        """`remembered` at the voxels' places (D, H, W); NaN where the scan has not been yet."""
        volume = np.full(len(self.visits), np.nan, dtype=np.float32)
        volume[self.visits[: step + 1].cpu().numpy()] = self.remembered(step)
        return volume.reshape(self.shape)


@torch.no_grad()
def scan_memory(network: SegResMamba, image: Tensor, order: str = "forward") -> ScanMemory:
    """The memory of one scan of the first stage's outer ToM layer while the network reads an image.

    Args:
        network: with an outer ToM layer that has a recurrence.
        image: (C_in, D, H, W) on the network's device.
        order: one of `srlib.scan.ORDERS`.
    """
    layer, maps = network.blocks[0].tom, []
    if not isinstance(layer, ToMLayer) or not layer.mamba.recurrence:
        raise ValueError("network: its first stage has no outer ToM layer with a recurrence")
    hook = layer.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    try:
        network.encode(image[None])
    finally:
        hook.remove()
    tokens = channel_norm(maps[0], layer.norm)[0]
    nslices = layer.mamba.nslices or maps[0].shape[2]
    visits, u, delta, A, B, _ = scan_inputs(layer.mamba, tokens, order, nslices)
    written = ((delta * u).T[:, :, None] * B.T[:, None]).abs()
    # The layer's map begins with the network's slice axis; the places are those of the image's axes.
    shape = tuple(maps[0][0, 0].movedim(0, network.slice_axis).shape)
    places = torch.arange(len(tokens), device=tokens.device).view(shape)
    visits = places.movedim(network.slice_axis, 0).flatten()[visits]
    return ScanMemory(shape, visits, written, delta.T.cumsum(0), A)
