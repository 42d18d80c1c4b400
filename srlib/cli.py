"""The command line: `python -m srlib -h`. Help comes before torch and MONAI are imported, which takes seconds."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from srlib import errors, files
from srlib.run import profiles

DEFAULT = profiles.get("default")
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


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


app = typer.Typer(
    cls=Commands,
    help="SegResMamba, executable: the collection of notebooks, data sets and measurements.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(
    help="List, get and check data sets.",
    epilog="Examples: data list; data get hippocampus; data check my_scans",
    no_args_is_help=True,
)
app.add_typer(data_app, name="data")

CheckpointFile = Annotated[
    Path,
    typer.Argument(metavar="CHECKPOINT", help="A model.safetensors, or the folder of its run."),
]
Profile = Annotated[str, typer.Option(help="How much is computed: smoke, default or full.")]
DatasetOption = Annotated[str, typer.Option("--dataset", help="Name of a data set.")]
DatasetName = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of a data set, or a folder's path.")
]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="NOTEBOOK", help="One notebook, as 03; may be repeated."),
]


@app.command(epilog="Through the script: ./run_all.sh [OPTIONS]")
def collection(
    profile: Profile = "default",
    dataset: DatasetOption = "mni152",
    only: Only = None,
    force: Annotated[bool, typer.Option("--force", help="Compute what is unchanged too.")] = False,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of every training; its results go apart.")
    ] = 0,
    list_: Annotated[bool, typer.Option("--list", help="List the notebooks and stop.")] = False,
) -> None:
    """Execute the notebooks in order; write figures, tables, pages and a manifest."""
    from srlib.data.catalog import CATALOG

    profiles.get(profile)  # before seconds of imports, as the data set's name
    if dataset not in CATALOG and not Path(dataset).is_dir():
        raise ValueError(f"unknown data set {dataset!r}; choose from {', '.join(CATALOG)}")
    from srlib.book.collection import is_current, plan, run

    chosen = plan(profile, dataset, only or (), seed=seed)
    if list_:
        for notebook in chosen.notebooks:
            state = "done" if is_current(chosen, notebook) else "to do"
            typer.echo(f"{state:<5}  {notebook.stem}")
        return
    run(chosen, force)


@app.command()
def grid(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Of srlib.study.grid.GRIDS.")
    ],
    list_: Annotated[bool, typer.Option("--list", help="List the runs and stop.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Runs computed at a time.")] = 1,
    executor: Annotated[
        str, typer.Option(help="What computes: process, dask or slurm.")
    ] = "process",
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Of a running Dask scheduler.")
    ] = None,
    job: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="What a SLURM job asks for; may be repeated."),
    ] = None,
) -> None:
    """Compute the runs of comparisons that results/reference lacks."""
    from srlib.study import grid

    configs = [config for name in names for config in grid.configs(name)]
    if list_:
        for config in configs:
            state = "done" if grid.is_done(config) else "to do"
            typer.echo(f"{state:<5}  {config.dataset}  {grid.run_name(config)}")
        return

    if wrong := [pair for pair in job or () if "=" not in pair]:
        raise ValueError(f"--job {wrong[0]!r}: expected NAME=VALUE, as gpus_per_node=1")
    parameters = dict(pair.split("=", 1) for pair in job or ())
    with grid.executor(executor, workers, scheduler, parameters) as made:
        grid.compute(names, made)


@app.command()
def claims() -> None:
    """The paper's claims, and what the repository's tables say of them."""
    from srlib.study import claims

    for _, row in claims.table(claims.findings()).iterrows():
        typer.echo(f"{row['claim']}: {row['verdict']}")


@app.command()
def verify(profile: Profile = "default", dataset: DatasetOption = "mni152") -> None:
    """Compare the last run's tables with those that the repository holds."""
    from srlib.book import collection
    from srlib.book import verify as reference

    done = collection.plan(profile, dataset).manifest["notebooks"]
    comparison = reference.compare(profile, dataset, done)
    typer.echo(reference.verdict(comparison))
    if not comparison["agrees"].all():
        raise typer.Exit(1)


@app.command()
def store_reference(profile: Profile = "default", dataset: DatasetOption = "mni152") -> None:
    """For maintainers: make the last run's tables what runs are compared with."""
    from srlib.book import verify as reference

    reference.store(profile, dataset)


@app.command()
def store_outputs(dataset: DatasetOption = "mni152", only: Only = None) -> None:
    """For maintainers: copy the default profile's last outputs into notebooks, solutions and README's figures."""
    from srlib.book.collection import plan, store_outputs
    from srlib.book.pages import store_figures

    chosen = plan("default", dataset, only or ())
    store_outputs(chosen)
    store_figures(chosen.results, files.REFERENCE / "figures")


@app.command(context_settings=PASS_ON)
def test(context: typer.Context) -> None:
    """Run the tests, and the notebooks in the smoke profile; further arguments go to pytest."""
    if any(find_spec(name) is None for name in ("pytest", "nbval", "xdist")):
        raise ImportError('the tests need the extra "dev": pip install -e ".[dev]"')
    os.chdir(files.ROOT)
    os.environ["SRLIB_PROFILE"] = "smoke"
    os.environ["SRLIB_INTERACTIVE"] = "1"  # cells with explorers are executed, too
    notebooks = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=1200"]
    notebooks += ["--nbval-sanitize-with", "tests/nbval_sanitize.cfg", "notebooks"]
    workers = min(os.cpu_count() or 1, 4)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    arguments = context.args or [f"-n{workers}", "--dist=loadscope", "tests", *notebooks]
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments])


@app.command(context_settings=PASS_ON)
def lab(context: typer.Context) -> None:
    """Open JupyterLab at 00_start_here, with the explorers; further arguments go to it, as --no-browser."""
    from tempfile import TemporaryDirectory

    from jupyterlab.labapp import main

    from srlib.book.collection import kernel_environment
    from srlib.run.profiles import current

    os.chdir(files.NOTEBOOKS)
    with kernel_environment(current().name), TemporaryDirectory() as folder:
        quiet = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}
        Path(folder, "overrides.json").write_text(json.dumps(quiet))
        options = {
            "default_url": "/lab/tree/00_start_here.ipynb",
            "workspaces_dir": folder,  # nothing of former sessions is opened
            "app_settings_dir": folder,
        }
        main([*(f"--LabApp.{name}={value}" for name, value in options.items()), *context.args])


@app.command(context_settings=PASS_ON)
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="One of benchmarks/, as scan.")],
) -> None:
    """Run a benchmark, which prints its table and may store it; further arguments go to it, as --quick."""
    scripts = {script.stem: script for script in (files.ROOT / "benchmarks").glob("*.py")}
    if name not in scripts:
        raise ValueError(f"benchmark {name!r} is not one of {', '.join(sorted(scripts))}")
    os.execv(sys.executable, [sys.executable, str(scripts[name]), *context.args])


@app.command(epilog="Examples: info; info results/runs/0123456789ab")
def info(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="[CHECKPOINT]", help="A trained network to tell of.")
    ] = None,
) -> None:
    """Versions, device, back ends of the scan, and the data sets that are here; or a network's facts."""
    from srlib import data, machine
    from srlib.run.train import load_trained
    from srlib.scan import backends

    if checkpoint:
        trained = load_trained(checkpoint)
        config, entry = dataclasses.asdict(trained.config), dataclasses.asdict(trained.entry)
        for fact, value in (config | entry | config).items():  # where both say it, what was trained
            typer.echo(f"{fact:<16}{value}")
        return
    facts = machine.describe()
    for name, number in facts.pop("versions").items():
        typer.echo(f"{name:<14}{number}")
    for name, fact in facts.items():
        typer.echo(f"{name:<14}{fact}")
    typer.echo(f"{'results':<14}{files.results_root()}")
    for name, state in backends().items():
        typer.echo(f"{'scan':<14}{name}: {'can run' if state.available else state.reason}")
    for root in files.data_roots():
        typer.echo(f"{'data root':<14}{root}{'' if root.is_dir() else ' (not there)'}")
    for name in data.CATALOG:
        typer.echo(f"{'data set':<14}{name}: {_place(name)}")


@data_app.command("list")
def data_list() -> None:
    """The data sets, what they are, and where they are on this machine."""
    from srlib.data.catalog import CATALOG

    for name, entry in CATALOG.items():
        typer.echo(f"{name}: {entry.title}\n  {entry.task}\n  licence: {entry.licence}")
        typer.echo(f"  here: {_place(name)}")


@data_app.command("get")
def data_get(name: DatasetName) -> None:
    """Download a data set from its official source, check it and unpack it."""
    from srlib import data

    typer.echo(data.download(name))


@data_app.command("check")
def data_check(name: DatasetName) -> None:
    """Check every case: readable files, shapes, affines, labels, finite voxels."""
    from srlib import data

    dataset = data.open(name)
    dataset.check()
    typer.echo(f"{name}: {len(dataset.cases)} cases, all in order")


@data_app.command("plan", epilog="Example: data plan my_scans --memory 8 --network paper")
def data_plan(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of scans and labels.")],
    memory: Annotated[
        float, typer.Option(min=0.1, help="GiB that a training step may take.")
    ] = 4.0,
    network: Annotated[str, typer.Option(help="Size of the network: tiny, small or paper.")] = (
        "small"
    ),
) -> None:
    """Look at a folder's cases and say how they will be trained on: channels, classes, voxels, patches.

    Trainings plan with 4 GiB; the patches of another memory are theirs by `train --patch X Y Z`.
    """
    from srlib.run import runs

    typer.echo(runs.plan_in_words(str(folder.resolve()), network, memory))


def _place(name: str) -> str:
    """Say where a data set is."""
    from srlib.data.catalog import CATALOG, find

    entry = CATALOG[name]
    if entry.virtual:
        return "built here when it is needed"
    try:
        return str(find(entry))
    except FileNotFoundError:
        return f"not found; {entry.how_to_get}"


def say(message: str) -> None:
    """Print a message, once when several processes of torchrun train together."""
    from srlib.machine import is_first_process

    if is_first_process():
        typer.echo(message)


@app.command(
    epilog="Examples: train --data my_scans; train --dataset hippocampus --model small --steps 1500 --fold 0"
)
def train(
    dataset: DatasetOption = "mni152",
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
    from srlib import data, machine
    from srlib.run import runs
    from srlib.run.train import train

    name = str(folder.resolve()) if folder else data.get(dataset).name
    settings: dict[str, Any] = {"model": model, "steps": steps, "batch_size": batch_size}
    settings["learning_rate"] = learning_rate
    if patch:
        settings["patch_size"] = patch
    config = runs.config_for("default", name, fold, seed, **settings)
    if folder:
        say(runs.plan_in_words(config.dataset, model))
    patches = " x ".join(map(str, config.patch_size))
    run = runs.run_dir(config)
    say(
        f"{config.dataset}: network {model!r}, {steps} steps of {batch_size} patches of {patches} voxels,"
        f" fold {fold}, seed {seed}\n{machine.device_name()}\nrun: {run}"
    )
    train(config)
    trained = run / "model.safetensors"
    say(f"trained: {trained}\n  evaluate it: python -m srlib evaluate {trained}")
    say(f"  segment with it: python -m srlib predict {trained} SCAN... --out DIR")


@app.command(epilog="Example: evaluate results/runs/0123456789ab/model.safetensors")
def evaluate(checkpoint: CheckpointFile) -> None:
    """Score a trained network on its held-out cases; the tables go beside it.

    metrics.csv has a row for each case and class. Printed is their spread over the cases. Of a file of another
    name than model.safetensors, they go into a folder NAME.scores.
    """
    from srlib.run.evaluate import evaluate, scores_folder, summarise
    from srlib.run.train import load_trained, network_file

    file = network_file(checkpoint)
    config = load_trained(file).config
    table = evaluate(config, checkpoint=file)
    typer.echo(f"{config.dataset}, fold {config.fold}: {table['case'].nunique()} held-out cases")
    typer.echo(summarise(table).to_string(index=False, float_format="{:.3f}".format))
    typer.echo(f"each case: {scores_folder(file) / 'metrics.csv'}")


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
    from srlib.run import predict

    segmenter = predict.load(checkpoint)
    cases = predict.find_cases(inputs, segmenter.entry.in_channels)
    targets = predict.targets(out, cases, overwrite)
    replaced = {path for path in targets.values() if os.path.lexists(path)}
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


@app.command(
    epilog="Examples: export results/runs/0123456789ab folder --to hub; export model.safetensors model.onnx"
)
def export(
    checkpoint: CheckpointFile,
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="A file model.onnx or a folder; not there yet.")
    ],
    to: Annotated[str | None, typer.Option(help="What the folder becomes: hub or bundle.")] = None,
) -> None:
    """Write a trained network for other tools: ONNX, a folder for a model hub, or a MONAI bundle.

    docs/export.md says what each can do. Nothing is uploaded.
    """
    kind = to or target.suffix.removeprefix(".")
    if kind not in ("hub", "bundle", "onnx") or (kind == "onnx") != (target.suffix == ".onnx"):
        raise ValueError(
            f"{target}: expected a file that ends in .onnx, or --to hub or --to bundle"
        )
    if os.path.lexists(target):
        raise ValueError(f"{target}: is there already; choose another name")
    from srlib.run.train import network_file

    import_module(f"srlib.export.{kind}").write(network_file(checkpoint), target)
    typer.echo(target)


@app.command(epilog="Example: nnunet hippocampus --fold 1 --epochs 100")
def nnunet(
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET", help="nnU-Net's, as 4; or a name in the catalogue or a folder."
        ),
    ],
    fold: Annotated[list[int] | None, typer.Option(help="Held out; may be repeated.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Of each training.")] = 100,
    iterations: Annotated[int, typer.Option(min=1, help="Of an epoch.")] = 250,
    size: Annotated[str, typer.Option(help="Of SegResMamba: tiny, small or paper.")] = "paper",
) -> None:
    """Train nnU-Net's own network and SegResMamba with and without Mamba in nnU-Net, and compare.

    One that was interrupted goes on after its last epoch; none is trained twice. docs/nnunet.md says more.
    """
    from srlib.export import nnunet
    from srlib.study import statistics

    folder, cases, table = nnunet.compare(dataset, fold or [0], epochs, iterations, size)
    each = cases.groupby("system", sort=False)[["dice", "minutes"]].mean()
    for system, dice, minutes in each.itertuples():
        typer.echo(f"{system}: Dice {dice:.4f}, {minutes:.1f} minutes a training")
    for row in table.to_dict("records"):
        typer.echo(statistics.in_words(row))
    typer.echo(f"tables: {folder}")
