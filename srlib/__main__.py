"""The command line: `python -m srlib -h`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer

from srlib import paths

T = TypeVar("T")
app = typer.Typer(
    help="SegResMamba, executable: the collection of notebooks, data sets and measurements.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
data_app = typer.Typer(help="List, get and check data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Profile = Annotated[str, typer.Option(help="How much is computed: smoke, default or full.")]
DatasetOption = Annotated[str, typer.Option("--dataset", help="Name of a data set.")]
DatasetName = Annotated[str, typer.Argument(metavar="NAME", help="Name of a data set.")]
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
    seed: Annotated[int, typer.Option(help="Seed of every training; its results go apart.")] = 0,
    list_: Annotated[bool, typer.Option("--list", help="List the notebooks and stop.")] = False,
) -> None:
    """Execute the notebooks in order; write figures, tables, pages and a manifest."""
    from srlib.collection import NotebookError, is_current, plan, run
    from srlib.data import DataError

    chosen = _checked(lambda: plan(profile, dataset, only or (), seed=seed))
    if list_:
        for notebook in chosen.notebooks:
            state = "done" if is_current(chosen, notebook) else "to do"
            typer.echo(f"{state:<5}  {notebook.stem}")
        return
    try:
        run(chosen, force)
    except (DataError, NotebookError) as error:
        _stop(str(error), status=1)
    except KeyboardInterrupt:
        _stop("stopped; the notebooks that were finished are kept", status=130)


@app.command()
def verify(profile: Profile = "default", dataset: DatasetOption = "mni152") -> None:
    """Compare the last run's tables with those that the repository holds."""
    from srlib import collection, reference

    done = _checked(lambda: collection.plan(profile, dataset).manifest["notebooks"])
    comparison = _checked(lambda: reference.compare(profile, dataset, done))
    typer.echo(reference.verdict(comparison))
    if not comparison["agrees"].all():
        raise typer.Exit(1)


@app.command()
def store_reference(profile: Profile = "default", dataset: DatasetOption = "mni152") -> None:
    """For maintainers: make the tables of seeds 0, 1 and 2 what runs are compared with."""
    from srlib import reference

    _checked(lambda: reference.store(profile, dataset))


@app.command()
def store_outputs(dataset: DatasetOption = "mni152") -> None:
    """For maintainers: copy the default profile's last outputs into the notebooks."""
    from srlib.collection import plan, store_outputs

    _checked(lambda: store_outputs(plan("default", dataset)))


@app.command(context_settings=PASS_ON)
def test(context: typer.Context) -> None:
    """Run the tests, and the notebooks in the smoke profile; further arguments go to pytest."""
    if find_spec("nbval") is None or find_spec("pytest") is None:
        _stop('the tests need the extra "dev": pip install -e ".[dev]"')
    os.chdir(paths.ROOT)
    os.environ["SRLIB_PROFILE"] = "smoke"
    notebooks = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=1200"]
    notebooks += ["--nbval-sanitize-with", "tests/nbval_sanitize.cfg", "notebooks"]
    arguments = context.args or ["tests", *notebooks]
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
    """Run a benchmark, which prints and stores its table; further arguments go to it, as --quick."""
    scripts = {script.stem: script for script in (paths.ROOT / "benchmarks").glob("*.py")}
    if name not in scripts:
        _stop(f"benchmark {name!r} is not one of {', '.join(sorted(scripts))}")
    os.execv(sys.executable, [sys.executable, str(scripts[name]), *context.args])


@app.command()
def info() -> None:
    """Versions, device, back ends of the scan, and the data sets that are here."""
    from srlib import data, provenance
    from srlib.scan import backends

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
    from srlib import data

    for name, entry in data.REGISTRY.items():
        typer.echo(f"{name}: {entry.title}\n  {entry.task}\n  licence: {entry.licence}")
        typer.echo(f"  here: {_place(name)}")


@data_app.command("get")
def data_get(name: DatasetName) -> None:
    """Download a data set from its official source, check it and unpack it."""
    from srlib import data

    typer.echo(_checked(lambda: data.download(name)))


@data_app.command("check")
def data_check(name: DatasetName) -> None:
    """Check every case: readable files, shapes, affines, labels, finite voxels."""
    from srlib import data

    _checked(lambda: data.check(name))
    typer.echo(f"{name}: {len(data.case_ids(name))} cases, all in order")


def _place(name: str) -> str:
    """Where a data set is, in words."""
    from srlib import data

    entry = data.get(name)
    if entry.virtual:
        return "built here when it is needed"
    try:
        return str(data.find(name))
    except FileNotFoundError:
        return f"not found; {entry.how_to_get}"


def _checked(action: Callable[[], T]) -> T:
    """Run `action`; a user's mistake ends the program with its message instead of a traceback."""
    try:
        return action()
    except (ValueError, FileNotFoundError) as error:
        _stop(str(error))


def _stop(message: str, status: int = 2) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(status)


if __name__ == "__main__":
    app(prog_name="python -m srlib")
