"""Files of a training: the state that it resumes from, and the trained network that needs nothing else.

| file | what it holds |
|---|---|
| `checkpoint.pt` | weights, optimizer and history of an unfinished run, and its configuration |
| `model.safetensors` | trained weights; as metadata the run's configuration and its data set's entry |

Neither is ever read as a pickle, which could run code: PyTorch loads the first with `weights_only`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from srlib import data
from srlib.paths import atomic_path
from srlib.registry import tuples
from srlib.runs import RunConfig


class CheckpointError(ValueError):
    """A file of a training that cannot be used; the message names it and says why."""


class Trained(NamedTuple):
    """A trained network as its file holds it.

    Attributes:
        config: what was trained.
        entry: the data set that it was trained on: channels, classes, spacing, normalisation.
        weights: the network's state dict, on the CPU.
    """

    config: RunConfig
    entry: data.Dataset
    weights: dict[str, Tensor]


def save_state(path: Path, config: RunConfig, state: Mapping[str, Any]) -> None:
    """Write the state of an unfinished run; tensors and plain values only."""
    _write(path, lambda temporary: torch.save({"config": config.to_json(), **state}, temporary))


def load_state(path: Path, config: RunConfig) -> dict[str, Any]:
    """Read what `save_state` wrote for the same configuration.

    Raises:
        CheckpointError: a file that is cut short or no checkpoint, or one of another configuration.
    """
    try:
        if not is_zipfile(path):
            raise ValueError("neither torch's format nor whole")
        state = torch.load(path, map_location="cpu", weights_only=True)
        made_for = state.pop("config")
    except Exception as error:  # torch, zip and pickle know many kinds of broken file
        raise CheckpointError(
            f"{path}: not a whole checkpoint of srlib ({type(error).__name__});"
            " move it away to train this run from its start"
        ) from error
    if made_for != config.to_json():
        raise CheckpointError(
            f"{path}: the checkpoint of another configuration, it differs in"
            f" {_differences(made_for, config.to_json())}; move it away to train from the start"
        )
    return state


def save_trained(path: Path, trained: Trained) -> None:
    """Write a trained network and all that a prediction needs to know of it."""
    # cloned, since DynUNet has one tensor under two names, which safetensors refuses
    weights = {name: tensor.cpu().clone() for name, tensor in trained.weights.items()}
    about = {"config": asdict(trained.config), "dataset": asdict(trained.entry)}
    # One entry, since safetensors writes several in an order that changes: equal networks are equal files.
    metadata = {"srlib": json.dumps(about, sort_keys=True)}
    _write(path, lambda temporary: save_file(weights, temporary, metadata=metadata))


def load_trained(path: Path) -> Trained:
    """Read a trained network: the file, or the folder of its run.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: a file that is cut short, of another kind, or without what prediction needs.
    """
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no trained network here: {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole file of safetensors ({error})") from error
    try:
        parts = {key: json.loads(value) for key, value in metadata.items()}
        about = tuples(parts.get("srlib", parts))  # the latter in files of the first day
        config, entry = RunConfig(**about["config"]), data.Dataset(**about["dataset"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its metadata hold no run of this version of srlib ({error})"
        ) from error
    return Trained(config, entry, weights)


def _differences(one: str, other: str) -> str:
    """Names of the settings in which two configurations differ."""
    first, second = json.loads(one), json.loads(other)
    names = sorted(first.keys() | second.keys())
    return ", ".join(name for name in names if first.get(name) != second.get(name))


def _write(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file whole or not at all; torch and safetensors do not name a full disk as Python does."""
    with atomic_path(path) as temporary:
        try:
            write(temporary)
        except (RuntimeError, SafetensorError) as error:
            raise OSError(f"{path}: could not be written; is the disk full? ({error})") from error
