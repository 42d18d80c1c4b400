"""Commands for one network on one data set: train, evaluate, predict. `python -m srlib -h` lists all."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from srlib import errors, profiles

DEFAULT = profiles.get("default")
app = typer.Typer()

CheckpointFile = Annotated[
    Path,
    typer.Argument(metavar="CHECKPOINT", help="A model.safetensors, or the folder of its run."),
]


def say(message: str) -> None:
    """Print a message, once when several processes of torchrun train together."""
    from srlib.runs import is_first_process

    if is_first_process():
        typer.echo(message)


class Commands(TyperGroup):
    """The program; an error is told as `srlib.errors` says."""

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        standalone_mode: bool = True,
        **options: Any,
    ) -> Any:
        """Run a command; a wrong option is one line too."""
        arguments = sys.argv[1:] if args is None else list(args)
        try:
            status = super().main(arguments, standalone_mode=False, **options) or 0
            if status == 130:  # as Typer hands on Ctrl-C
                status = errors.tell(KeyboardInterrupt(), arguments)
        except SystemExit:
            raise
        except typer.Abort:  # as Click does
            status = errors.tell(KeyboardInterrupt(), arguments)
        except BaseException as error:
            status = errors.tell(error, arguments)
        if standalone_mode:
            sys.exit(status)
        return status


@app.command(
    epilog="Examples: train --data my_scans; train --dataset hippocampus --model small --steps 1500 --fold 0"
)
def train(
    dataset: Annotated[str, typer.Option("--dataset", help="Name of a data set.")] = "mni152",
    folder: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="A folder of scans and labels instead."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Size of the network: tiny, small or paper.")
    ] = DEFAULT.model,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = DEFAULT.steps,
    fold: Annotated[
        int, typer.Option(min=0, help="Cases that are held out, see data/README.md.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of initial weights and samples.")] = 0,
    patch: Annotated[
        tuple[int, int, int] | None, typer.Option(metavar="X Y Z", help="Voxels of a patch.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Patches a step.")] = DEFAULT.batch_size,
    learning_rate: Annotated[
        float, typer.Option(help="Peak of the schedule.")
    ] = DEFAULT.learning_rate,
) -> None:
    """Train a network, or go on with a training that was interrupted.

    It says where the run is, saves its state every minute, and ends with model.safetensors: weights
    and everything that `predict` needs to know.
    """
    from srlib import data, plans, provenance, runs
    from srlib.train import train

    def configure() -> runs.RunConfig:
        name = str(folder.resolve()) if folder else data.get(dataset).name
        settings: dict[str, Any] = {"model": model, "steps": steps, "batch_size": batch_size}
        settings |= {"learning_rate": learning_rate, "warmup": max(1, min(50, steps // 10))}
        if patch:
            settings["patch_size"] = patch
        return runs.config_for("default", name, fold, seed, **settings)

    config = configure()
    if folder:
        say("\n".join(plans.load(folder.resolve()).summary))
    patches = " x ".join(map(str, config.patch_size))
    run = runs.run_dir(config)
    say(
        f"{config.dataset}: network {model!r}, {steps} steps of {batch_size} patches of {patches} voxels,"
        f" fold {fold}, seed {seed}\n{provenance.device_name()}\nrun: {run}"
    )
    train(config)
    trained = run / "model.safetensors"
    say(f"trained: {trained}\n  evaluate it: python -m srlib evaluate {trained}")
    say(f"  segment with it: python -m srlib predict {trained} SCAN... --out DIR")


@app.command(epilog="Example: evaluate results/runs/0123456789ab/model.safetensors")
def evaluate(checkpoint: CheckpointFile) -> None:
    """Score a trained network on its held-out cases; the tables go beside it.

    metrics.csv has a row for each case and class. Printed is their spread over the cases.
    """
    from srlib.checkpoints import load_trained
    from srlib.evaluate import evaluate, summarise

    file = checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint
    config = load_trained(file).config
    table = evaluate(config, checkpoint=file)
    typer.echo(f"{config.dataset}, fold {config.fold}: {table['case'].nunique()} held-out cases")
    typer.echo(summarise(table).to_string(index=False, float_format="{:.3f}".format))
    typer.echo(f"each case: {file.parent / 'metrics.csv'}")


@app.command(
    epilog="Examples: predict model.safetensors scan.nii.gz --out masks; predict results/runs/0123456789ab"
    " new_scans dicom_folder --out masks --flips"
)
def predict(
    checkpoint: CheckpointFile,
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT...", help="Scans, folders of scans, folders of a DICOM series."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="Where the masks go; not among the scans or labels."
        ),
    ],
    overlap: Annotated[
        float, typer.Option(min=0, max=0.9, help="Of neighbouring windows; less is faster.")
    ] = 0.5,
    flips: Annotated[
        bool, typer.Option("--flips", help="Average over mirrored images, where anatomy allows.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace masks that are there; never a scan.")
    ] = False,
) -> None:
    """Segment scans; each mask has its scan's grid, orientation and format (DICOM: NIfTI).

    NIfTI, NRRD, MetaImage or DICOM, of any size and orientation. Several channels of a case are files
    NAME_0000, NAME_0001 and so on, in the order of the training, or one 4D NIfTI file.
    """
    from srlib import predict

    segmenter = predict.load(checkpoint)
    cases = predict.find_cases(inputs, segmenter.entry.in_channels)
    targets = predict.targets(out, cases, overwrite)
    replaced = {path for path in targets.values() if path.exists()}
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in cases:
        try:
            mask = predict.segment(segmenter, cases[name], overlap, flips)
            path = targets[name]
            predict.write_mask(mask, cases[name][0], path, overwrite=path in replaced)
            typer.echo(path)
        except Exception as error:  # the others can still be segmented
            errors.tell(error, ["predict"], name)
            failed += 1
    if failed:
        raise ValueError(f"{failed} of {len(cases)} cases could not be segmented")
