"""Labels and their meaning: values in files, label maps in this library, and classes, which may overlap.

values in a file --encode--> label map 0, 1, 2, ... --class_masks--> one mask a class
<--decode--                                 <--label_scores-- the network's outputs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from srlib.data.catalog import Entry
from srlib.data.scans import Scan
from srlib.files import DataError

MOST_VALUES = 255  # of a label map in uint8, beside the background


def values_in(path: Path, label: Scan, known: dict[int, str] | None = None) -> list[int]:
    """Label values that occur in a file, besides 0.

    Args:
        path: of the file.
        label: what is in it.
        known: names of the values; `None` allows any whole numbers.

    Raises:
        DataError: fractions, negative or too many values, or values that are not known.
    """
    found = np.unique(label.array)
    wrong = found[(found < 0) | (found % 1 != 0)]
    expected = "whole numbers, one for each of a few classes"
    if known is not None:
        wrong = found[~np.isin(found, [0, *known])]
        expected = ", ".join(f"{k} {name}" for k, name in {0: "background", **known}.items())
    if len(wrong) or np.count_nonzero(found) > MOST_VALUES:
        shown = (wrong if len(wrong) else found)[:5]
        listed = ", ".join(
            str(value) if shown.dtype.kind in "iu" else np.format_float_positional(value, trim="-")
            for value in shown
        )
        raise DataError(f"{path}: unknown label values [{listed}]; expected {expected}")
    return [int(value) for value in found if value]


def known_values(entry: Entry) -> dict[int, str]:
    """Names of the label values in the files of a data set; of a region's, all classes that hold it."""
    return {
        value: " + ".join(
            name for name, of in zip(entry.classes, entry.members, strict=True) if label in of
        )
        for label, value in enumerate(entry.values, start=1)
    }


def encode(array: NDArray, entry: Entry) -> NDArray[np.uint8]:
    """Values of a file -> label map 0, 1, 2, ... of the same shape."""
    labels = np.zeros(array.shape, np.uint8)
    for label, value in enumerate(entry.values, start=1):
        labels[array == value] = label
    return labels


def decode(labels: NDArray[np.uint8], entry: Entry) -> NDArray:
    """Label map -> the values that the data set's files have, in the smallest type that holds them."""
    values = (0, *entry.values)
    return np.array(values, np.min_scalar_type(max(values)))[labels]


def class_masks(labels: Tensor, members: Sequence[Sequence[int]]) -> Tensor:
    """Label map (B, 1, X, Y, Z) -> masks (B, K, X, Y, Z), bool; class k is the union of `members[k]`."""
    masks = [torch.isin(labels, torch.tensor(of, device=labels.device)) for of in members]
    return torch.cat(masks, dim=1)


def label_scores(outputs: Tensor, entry: Entry) -> Tensor:
    """The network's outputs (B, K, X, Y, Z) -> scores (B, 1 + labels, X, Y, Z); the largest is the label.

    Where classes exclude each other these are the outputs. Of regions, each label's score is the log
    of its probability, with every region for itself a sigmoid, up to what all labels have in common:
    the sum of the outputs of the regions that it belongs to. For regions inside each other whose
    outputs agree with that, the label map is the one of thresholds at 0.5. The map is linear, so that
    scores may be averaged and interpolated like outputs.
    """
    if not entry.regions:
        return outputs
    belongs = torch.zeros(1 + len(entry.values), len(entry.classes))
    for k, of in enumerate(entry.members):
        belongs[list(of), k] = 1
    return torch.einsum("lk,bk...->bl...", belongs.to(outputs), outputs)


class Scoring(nn.Module):
    """A network of regions whose outputs are `label_scores`, as of any other network."""

    def __init__(self, network: nn.Module, entry: Entry) -> None:
        super().__init__()
        self.network, self.entry = network, entry

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, C, X, Y, Z) -> scores (B, 1 + labels, X, Y, Z)."""
        return label_scores(self.network(x), self.entry)


def scoring(network: nn.Module, entry: Entry) -> nn.Module:
    """The network as predictions use it: the largest of its outputs is the label."""
    return Scoring(network, entry) if entry.regions else network


def loss_function(entry: Entry, authors: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """Loss of outputs (B, K, X, Y, Z) against a label map (B, 1, X, Y, Z): Dice and cross-entropy.

    Of softmax, the background left out of Dice; of regions, each class by its own sigmoid.

    Args:
        entry: the data set's.
        authors: the paper's authors' loss, which they have for regions: Dice alone, of sigmoids, with squares in the
            denominator. Where classes exclude each other the background is one of them, since the largest output is
            the label.
    """
    from monai.losses import DiceCELoss, DiceLoss

    if authors:
        options: dict[str, Any] = {"sigmoid": True, "squared_pred": True}
        options |= {"smooth_nr": 0, "smooth_dr": 1e-5}
        if not entry.regions:
            return DiceLoss(to_onehot_y=True, **options)
        theirs = DiceLoss(**options)
        return lambda outputs, labels: theirs(
            outputs, class_masks(labels, entry.members).to(outputs)
        )
    if not entry.regions:
        return DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
    dice = DiceLoss(sigmoid=True)

    def of_regions(outputs: Tensor, labels: Tensor) -> Tensor:
        masks = class_masks(labels, entry.members).to(outputs)
        return dice(outputs, masks) + binary_cross_entropy_with_logits(outputs, masks)

    return of_regions
