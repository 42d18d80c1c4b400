"""Files of a training: the state that it resumes from, and the trained network that needs nothing else.

| file | what it holds |
|---|---|
| `checkpoint.pt` | weights, optimizer and history of an unfinished run, and its configuration |
| `model.safetensors` | trained weights; as metadata what was trained, on which data and cases, and with what |

Neither is ever read as a pickle, which could run code: PyTorch loads the first with `weights_only`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

import torch
from torch import Tensor

from srlib import __version__, data, machine
from srlib.data.catalog import tuples
from srlib.files import BrokenFile, atomic_path, load_tensors, save_tensors
from srlib.run.runs import RunConfig

# Types of weights: as trained, rounded as in the repository's small networks, and counters.
WEIGHTS = (torch.float32, torch.float16, torch.int64)
logger = logging.getLogger("srlib")


class CheckpointError(ValueError):
    """A file of a training that cannot be used; the message names it and says why."""


class Trained(NamedTuple):
    """A trained network as its file holds it.

    Attributes:
        config: what was trained.
        entry: the data set that it was trained on: channels, classes, spacing, normalisation.
        weights: the network's state dict, on the CPU.
        fingerprint: of the data that it was trained on (`srlib.data.cases.fingerprint`).
        split: the cases that it was trained on, and those that were held out.
        versions: of what it was trained with.
    """

    config: RunConfig
    entry: data.Entry
    weights: dict[str, Tensor]
    fingerprint: str
    split: data.Split
    versions: dict[str, str]


def about_to_train(config: RunConfig, dataset: data.Dataset) -> Trained:
    """State what will be known of a network that is trained here and now, without its weights."""
    facts = dataset.fingerprint, dataset.split(config.fold), versions()
    return Trained(config, dataset.entry, {}, *facts)


def versions() -> dict[str, str]:
    """Versions of what trained weights depend on, as they are recorded with a run."""
    known = machine.versions()
    return {"srlib": __version__} | {name: known[name] for name in ("torch", "monai", "numpy")}


def data_changes(trained: Trained) -> list[str]:
    """Say how the data set, as it is now, differs from the one of a training."""
    dataset = data.open(trained.config.dataset)
    entry, split = dataset.entry, dataset.split(trained.config.fold)
    found = [
        f"{field} {getattr(trained.entry, field)} then, {getattr(entry, field)} now"
        for field in ("modalities", "classes", "label_values", "spacing", "normalisation")
        if getattr(trained.entry, field) != getattr(entry, field)
    ]
    for kind, then, now in zip(("training", "held-out"), trained.split, split, strict=True):
        for what, ids in (("new", set(now) - set(then)), ("missing", set(then) - set(now))):
            if ids:
                listed = ", ".join(sorted(ids)[:5]) + (", ..." if len(ids) > 5 else "")
                found.append(f"{len(ids)} {what} {kind} cases ({listed})")
    if (fingerprint := dataset.fingerprint) != trained.fingerprint:
        found.append(f"fingerprint {trained.fingerprint} then, {fingerprint} now")
    return found


def require_same_data(trained: Trained, file: Path) -> None:
    """`DataError` when the data set is not as it was when the network in `file` was trained."""
    if changes := data_changes(trained):
        raise data.DataError(
            f"{file}: {trained.config.dataset} is not what it was trained on: {'; '.join(changes)}"
        )


def save_state(path: Path, config: RunConfig, state: Mapping[str, Any]) -> None:
    """Write the state of an unfinished run; tensors and plain values only."""
    with atomic_path(path) as temporary:
        try:
            torch.save({"config": config.to_json(), **state}, temporary)
        except RuntimeError as error:  # which does not name a full disk as Python does
            raise OSError(f"{path}: could not be written; is the disk full? ({error})") from error


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
    facts = {"fingerprint": trained.fingerprint, "split": trained.split._asdict()}
    save_tensors(path, weights, about | facts | {"versions": trained.versions})


def load_trained(path: Path) -> Trained:
    """Read a trained network: the file, or the folder of its run; versions that differ from those here are logged.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: a file that is cut short, changed, of another kind, or without what prediction needs;
            weights that are no finite numbers, or of another type than trainings leave.
    """
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no trained network here: {path}")
    try:
        weights, metadata = load_tensors(path)
    except BrokenFile as error:
        raise CheckpointError(str(error)) from error
    try:
        about = tuples(metadata)
        facts = about["fingerprint"], data.Split(**about["split"]), about["versions"]
        about["dataset"].pop("patch_size", None)  # of networks from before it was planned apart
        config, entry = RunConfig(**about["config"]), data.Entry(**about["dataset"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its metadata hold no run of this version of srlib ({error})"
        ) from error
    types = (*WEIGHTS, torch.float64) if config.precision == "64-true" else WEIGHTS
    for name, tensor in weights.items():
        if tensor.dtype not in types:
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}; expected one of {types}")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinity; expected finite weights")
    trained = Trained(config, entry, weights, *facts)
    here = versions()
    for name, then in trained.versions.items():
        if (
            then.partition("+")[0] != here[name].partition("+")[0]
        ):  # the build, as +cpu, is the device's
            logger.warning("%s: trained with %s %s, here is %s", path, name, then, here[name])
    return trained


def _differences(one: str, other: str) -> str:
    """Names of the settings in which two configurations differ."""
    first, second = json.loads(one), json.loads(other)
    names = sorted(first.keys() | second.keys())
    return ", ".join(name for name in names if first.get(name) != second.get(name))
