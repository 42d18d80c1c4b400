"""A MONAI bundle: a folder that `python -m monai.bundle run` takes, where MONAI, `fire` and srlib are installed.

| file | content |
|---|---|
| `configs/metadata.json` | what goes in and comes out, versions |
| `configs/inference.json` | scans to masks by `infer`, which does as `python -m srlib predict` |
| `configs/train.json` | the training again, by `retrain` |
| `models/model.pt` | the state dict, plain tensors |
| `docs/README.md` | the card, as a hub's |

Both configurations call srlib, as its windows and its way back to a scan's own grid have no match in MONAI.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from srlib import __version__, data, machine
from srlib.data import labels
from srlib.data.catalog import tuples
from srlib.export.hub import card, new_folder, published
from srlib.run import predict
from srlib.run.evaluate import stored_scores
from srlib.run.runs import RunConfig
from srlib.run.train import Trained, load_trained, network_arguments, train

USE = """`python -m monai.bundle run --config_file configs/inference.json --bundle_root . --scans SCANS --masks DIR`
  in this folder, where `monai`, `fire` and `srlib` are installed"""
SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)
INFERENCE = {
    "imports": [
        "$import torch",
        "$from srlib.machine import device",
        "$from srlib.export.bundle import infer",
    ],
    "bundle_root": ".",
    "scans": "$@bundle_root + '/scans'",
    "masks": "$@bundle_root + '/masks'",
    "overlap": predict.OVERLAP,
    "flips": False,
    "device": "$device()",
    "weights": "$torch.load(@bundle_root + '/models/model.pt', 'cpu', weights_only=True)",
}
RUN = (
    "$infer(@network_def, @weights, @device, @data, @patch_size, @scans, @masks, @overlap, @flips)"
)


def write(checkpoint: Path, folder: Path) -> None:
    """Write the bundle of a trained SegResMamba.

    Args:
        checkpoint: file of the trained network; what `evaluate` wrote beside it goes into the card.
        folder: must not be there.

    Raises:
        ValueError: the network is a peer, or a text of its data set would be code in a bundle.
        FileExistsError: the folder is there, perhaps only since the export was begun.
        OSError: it cannot be written.
    """
    trained = load_trained(checkpoint)
    known = published(trained)
    _require_plain([asdict(known.entry), asdict(known.config)], checkpoint)
    network = {"_target_": "srlib.SegResMamba"} | network_arguments(trained.config, trained.entry)
    inference = INFERENCE | {"network_def": network, "data": asdict(known.entry)}
    inference |= {"patch_size": trained.config.patch_size, "run": [RUN]}
    retraining: dict[str, Any] = {
        "imports": ["$from srlib.export.bundle import retrain"],
        "bundle_root": ".",
    }
    retraining |= {"config": asdict(known.config)}
    retraining |= {"run": ["$retrain(@config)"]}
    files = {"metadata": metadata(known), "inference": inference, "train": retraining}
    with new_folder(folder) as made:
        for part in ("configs", "models", "docs"):
            (made / part).mkdir()
        for name, content in files.items():
            (made / "configs" / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        try:
            torch.save(trained.weights, made / "models" / "model.pt")
        except RuntimeError as error:  # which does not name a full disk as Python does
            raise OSError(f"{folder}: could not be written; is the disk full? ({error})") from error
        text = card(trained, stored_scores(checkpoint), USE)
        (made / "docs" / "README.md").write_text(text, encoding="utf-8")


def _require_plain(value: Any, checkpoint: Path) -> None:
    """ValueError where a text begins as MONAI's expressions and references do, and so would be run or looked up."""
    if isinstance(value, str) and value.startswith(("$", "@", "%")):
        raise ValueError(
            f"{checkpoint}: holds the text {value!r:.80}, which MONAI would take for code or a reference;"
            " expected none that begins with $, @ or %"
        )
    for part in value.values() if isinstance(value, dict) else ():
        _require_plain(part, checkpoint)
    for part in value if isinstance(value, (list, tuple)) else ():
        _require_plain(part, checkpoint)


def metadata(trained: Trained) -> dict[str, Any]:
    """Metadata of a bundle, after MONAI's specification; sizes are those of the windows that `infer` takes."""
    entry, config = trained.entry, trained.config
    versions = {name: text.partition("+")[0] for name, text in machine.versions().items()}
    outputs = [*([] if entry.regions else ["background"]), *entry.classes]
    window = {"type": "image", "dtype": "float32", "value_range": [], "is_patch_data": True}
    window |= {"spatial_shape": list(config.patch_size)}
    modality = ", ".join(entry.modalities)
    return {
        "schema": SCHEMA,
        "version": __version__,
        "changelog": {__version__: "written by srlib"},
        "monai_version": versions["monai"],
        "pytorch_version": versions["torch"],
        "numpy_version": versions["numpy"],
        "required_packages_version": {"srlib": __version__, "nibabel": versions["nibabel"]},
        "optional_packages_version": {},
        "supported_apps": {},
        "name": f"SegResMamba for {entry.title}",
        "task": entry.task,
        "description": f"SegResMamba, size {config.model}, trained on: {entry.title}",
        "authors": "srlib",
        "copyright": "the code: Apache-2.0; the weights: see docs/README.md",
        "data_source": entry.source,
        "intended_use": "research; it is no medical device",
        "references": ["Das et al., SegResMamba, MIDL 2025, arXiv:2503.07766"],
        "network_data_format": {
            "inputs": {
                "image": window
                | {"format": "magnitude", "modality": modality, "num_channels": entry.in_channels}
                | {"channel_def": _numbered(entry.modalities)}
            },
            "outputs": {
                "pred": window
                | {"format": "classes" if entry.regions else "labels"}
                | {"num_channels": len(outputs), "channel_def": _numbered(outputs)}
            },
        },
    }


def _numbered(names: Sequence[str]) -> dict[str, str]:
    return {str(number): name for number, name in enumerate(names)}


def infer(
    network: nn.Module,
    weights: Mapping[str, torch.Tensor],
    device: torch.device,
    entry: Mapping[str, Any],
    patch_size: Sequence[int],
    scans: str | Sequence[str],
    masks: str,
    overlap: float = predict.OVERLAP,
    flips: bool = False,
) -> list[Path]:
    """Segment scans as `python -m srlib predict` does; for `configs/inference.json`.

    Args:
        network: SegResMamba.
        weights: its state dict.
        device: that it runs on.
        entry: fields of `srlib.data.Entry`.
        patch_size: of the windows, voxels.
        scans: a file or folder, or several.
        masks: folder that they go to; none may be there.
        overlap: of neighbouring windows.
        flips: average over mirrored images, where the data set allows.

    Returns:
        The masks' paths.

    Raises:
        SystemExit: with a line that says why; MONAI would hide another error behind its own.
    """
    network.load_state_dict(weights)
    about = data.Entry(**tuples(dict(entry)))
    ready = labels.scoring(network, about).to(device).eval()
    segmenter = predict.Segmenter(ready, about, tuples(list(patch_size)))
    several = scans if isinstance(scans, (list, tuple)) else [scans]
    try:
        # a name of digits comes as a number from the command line
        cases = predict.find_cases([Path(str(scan)) for scan in several], about.in_channels)
        paths = predict.targets(Path(str(masks)), cases)
        for name, files in cases.items():
            mask = predict.segment(segmenter, files, overlap, flips)
            predict.write_mask(mask, files[0], paths[name])
            print(paths[name])
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    return list(paths.values())


def retrain(config: Mapping[str, Any]) -> Path:
    """Train as the bundle's network was trained; for `configs/train.json`.

    Args:
        config: fields of `srlib.run.runs.RunConfig`; its `dataset` is a name in the catalogue or a folder.

    Returns:
        The run's folder.
    """
    settings = tuples(dict(config))
    settings["dataset"] = data.get(settings["dataset"]).name  # a folder's whole path
    run = train(RunConfig(**settings)).run_dir
    print(run)
    return run
