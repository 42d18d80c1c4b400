"""The command line: `python -m srlib -h`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # `python -m` looks for modules in the working directory first: those beside somebody's scans are not to be run.
    # `-P` would have kept it away; what is started from here is told by these variables.
    root, here = str(Path(__file__).resolve().parent.parent), str(Path.cwd())
    sys.path[:] = [root, *(entry for entry in sys.path if entry not in ("", here, root))]
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    named = [root, *(entry for entry in named if Path(entry).is_absolute() and entry != root)]
    os.environ |= {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(named)}

import dataclasses
import json
from importlib.util import find_spec
from typing import Annotated

from srlib import errors

if __name__ == "__main__":
    errors.take_over()  # before the imports that take time

import typer

from srlib import commands, paths

app = typer.Typer(
    cls=commands.Commands,
    help="SegResMamba, executable: the collection of notebooks, data sets and measurements.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
data_app = typer.Typer(
    help="List, get and check data sets.",
    epilog="Examples: data list; data get hippocampus; data check my_scans",
    no_args_is_help=True,
)
app.add_typer(commands.app)
app.add_typer(data_app, name="data")

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
    from srlib import datasets, profiles

    profiles.get(profile)  # before seconds of imports, as the data set's name
    datasets.get(dataset)
    from srlib.collection import is_current, plan, run

    chosen = plan(profile, dataset, only or (), seed=seed)
    if list_:
        for notebook in chosen.notebooks:
            state = "done" if is_current(chosen, notebook) else "to do"
            typer.echo(f"{state:<5}  {notebook.stem}")
        return
    run(chosen, force)


@app.command()
def grid(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Of srlib.grid.GRIDS.")],
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
    from srlib import grid

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
    from srlib import claims

    for _, row in claims.table().iterrows():
        typer.echo(f"{row['claim']}: {row['verdict']}")


@app.command()
def verify(profile: Profile = "default", dataset: DatasetOption = "mni152") -> None:
    """Compare the last run's tables with those that the repository holds."""
    from srlib import collection, reference

    done = collection.plan(profile, dataset).manifest["notebooks"]
    comparison = reference.compare(profile, dataset, done)
    typer.echo(reference.verdict(comparison))
    if not comparison["agrees"].all():
        raise typer.Exit(1)


@app.command()
def store_reference(profile: Profile = "default", dataset: DatasetOption = "mni152") -> None:
    """For maintainers: make the last run's tables what runs are compared with."""
    from srlib import reference

    reference.store(profile, dataset)


@app.command()
def store_outputs(dataset: DatasetOption = "mni152", only: Only = None) -> None:
    """For maintainers: copy the default profile's last outputs into notebooks, solutions and README's figure."""
    from srlib.collection import plan, store_outputs
    from srlib.site import store_figure

    chosen = plan("default", dataset, only or ())
    store_outputs(chosen)
    store_figure(chosen.results, paths.REFERENCE / "figures")


@app.command(context_settings=PASS_ON)
def test(context: typer.Context) -> None:
    """Run the tests, and the notebooks in the smoke profile; further arguments go to pytest."""
    if any(find_spec(name) is None for name in ("pytest", "nbval", "xdist")):
        raise ImportError('the tests need the extra "dev": pip install -e ".[dev]"')
    os.chdir(paths.ROOT)
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

    from srlib.collection import kernel_environment
    from srlib.profiles import current

    os.chdir(paths.NOTEBOOKS)
    os.environ["SRLIB_INTERACTIVE"] = "1"
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
    scripts = {script.stem: script for script in (paths.ROOT / "benchmarks").glob("*.py")}
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
    from srlib import data, provenance
    from srlib.checkpoints import load_trained
    from srlib.scan import backends

    if checkpoint:
        trained = load_trained(checkpoint)
        config, entry = dataclasses.asdict(trained.config), dataclasses.asdict(trained.entry)
        for fact, value in (config | entry | config).items():  # where both say it, what was trained
            typer.echo(f"{fact:<16}{value}")
        return
    facts = provenance.describe()
    for name, number in facts.pop("versions").items():
        typer.echo(f"{name:<14}{number}")
    for name, fact in facts.items():
        typer.echo(f"{name:<14}{fact}")
    typer.echo(f"{'results':<14}{paths.results_root()}")
    for name, state in backends().items():
        typer.echo(f"{'scan':<14}{name}: {'can run' if state.available else state.reason}")
    for root in paths.data_roots():
        typer.echo(f"{'data root':<14}{root}{'' if root.is_dir() else ' (not there)'}")
    for name in data.REGISTRY:
        typer.echo(f"{'data set':<14}{name}: {_place(name)}")


@data_app.command("list")
def data_list() -> None:
    """The data sets, what they are, and where they are on this machine."""
    from srlib.registry import REGISTRY

    for name, entry in REGISTRY.items():
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

    data.check(name)
    typer.echo(f"{name}: {len(data.case_ids(name))} cases, all in order")


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

    The plan is kept in the cache, where `data check DIR` and trainings find it.
    """
    from srlib import plans

    found = plans.make(folder.resolve(), memory, network)
    typer.echo("\n".join(found.summary))


def _place(name: str) -> str:
    """Where a data set is, in words."""
    from srlib import datasets

    entry = datasets.get(name)
    if entry.virtual:
        return "built here when it is needed"
    try:
        return str(datasets.find(name))
    except FileNotFoundError:
        return f"not found; {entry.how_to_get}"


if __name__ == "__main__":
    app(prog_name="python -m srlib")
