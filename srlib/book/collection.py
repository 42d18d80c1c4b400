"""The collection: executes the notebooks in order and writes down what they made, and with what.

A run fills one folder, `results/<profile>/<dataset>/`:

- `figures/` and `tables/`: written by the notebooks through `srlib.show.plots`;
- `notebooks/`: each notebook as executed (`.ipynb`), its page (`.html`) and what it printed (`.log`);
- `manifest.json`: for each notebook what it was computed with, how long it took and what it wrote.

A notebook that is computed and unchanged is not computed again. Unchanged means that its *stamp* is: a hash of
its cells and parameters, of `RECIPE`, of the reference tables and networks, of the data and of which other data sets
are here, and of the versions and the device it runs with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nbformat
from nbformat import NotebookNode

from srlib import data, machine
from srlib import files as paths
from srlib.book import pages, verify
from srlib.book.pages import read_notebook
from srlib.run import profiles, runs

OUTPUTS = ("figures", "tables")  # folders of what notebooks write
PARAMETERS = ("PROFILE", "DATASET", "SEED", "INTERACTIVE")
# Seconds that one cell may take before the run is given up as hanging.
CELL_TIMEOUT = {"smoke": 20 * 60, "default": 3 * 3600, "full": int(paths.LONGEST_WAIT)}
# Tags of the cells that papermill adds to a notebook.
ADDED_CELLS = {"injected-parameters", "papermill-error-cell-tag"}
# What the manifest says of each notebook, at least.
ENTRY: dict[str, type] = {"stamp": str, "seconds": float, "outputs": list}
ENTRY |= {"finished": str, "device": str, "commit": str}
ABSOLUTE_PATH = re.compile(r"(?<![\w.~/])/(?:root|home|Users|work|tmp|private|opt|usr)/[\w.]")
ANSI_CODE = re.compile(r"\x1b\[[0-9;]*m")


class NotebookError(RuntimeError):
    """A notebook did not run to its end."""


@dataclass(frozen=True)
class Collection:
    """A profile, a data set and notebooks in order, as one run executes them."""

    profile: str
    dataset: str
    notebooks: tuple[Path, ...]
    seed: int = 0

    @property
    def results(self) -> Path:
        """The folder that the run fills."""
        return paths.results_dir(self.profile, self.dataset, self.seed)

    @property
    def manifest(self) -> dict[str, Any]:
        """Record of what is in that folder.

        Raises:
            ValueError: a manifest that is broken, or names an output that is outside of the folder's
                figures and tables, where what is out of date is deleted.
        """
        file, what = self.results / "manifest.json", "a manifest of the collection"
        if not file.exists():
            run = {"profile": self.profile, "dataset": self.dataset, "seed": self.seed}
            return run | {"notebooks": {}}
        found = paths.read_json(file, what, profile=str, dataset=str, seed=int, notebooks=dict)
        for entry in found["notebooks"].values():
            paths.require(file, what, entry, **ENTRY)
            for name in entry["outputs"]:
                place = (self.results / str(name)).resolve().parent
                if place not in [self.results.resolve() / kind for kind in OUTPUTS]:
                    raise ValueError(
                        f"{file}: names the output {name!r}; expected files in {' and '.join(OUTPUTS)}"
                        " only, since what is out of date is deleted"
                    )
        return found

    def executed(self, notebook: Path, suffix: str = ".ipynb") -> Path:
        """Path of the executed copy of a notebook; with another suffix, of its page or its log."""
        return self.results / "notebooks" / (notebook.stem + suffix)


def plan(
    profile: str,
    dataset: str,
    only: Sequence[str] = (),
    folder: Path = paths.NOTEBOOKS,
    seed: int = 0,
) -> Collection:
    """Check every name before anything runs.

    Args:
        profile: name of a profile.
        dataset: name of a data set, or a folder's path.
        only: numbers or names of notebooks (`3`, `03` or `03_training`); empty means all.
        folder: where the notebooks are.
        seed: of every training.

    Raises:
        ValueError: an unknown profile, data set or notebook, a notebook whose parameters cannot be filled, or what
            `Collection.manifest` refuses.
        FileNotFoundError: the data set is not on this machine.
    """
    profiles.get(profile)
    if not data.get(dataset).virtual:
        data.open(dataset)  # which says how to get it
    chosen = tuple(find_notebooks(folder, only))
    made = Collection(profile, data.get(dataset).name, chosen, seed)
    for notebook in chosen:
        parameters_for(made, notebook)
    made.manifest  # noqa: B018 - refused now rather than after the first notebook
    return made


def find_notebooks(folder: Path = paths.NOTEBOOKS, only: Sequence[str] = ()) -> list[Path]:
    """Notebooks (`00_start_here.ipynb` and so on) in reading order: those that `only` names, or all."""
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise ValueError(f"no notebooks named like 00_start_here.ipynb in {folder}")
    named = {name: n for n in found for name in (n.stem[:2], n.stem, n.name)}
    for name in only:
        if name.zfill(2) not in named:
            known = ", ".join(notebook.stem for notebook in found)
            raise ValueError(f"notebook {name!r} is not one of {known}")
    return sorted({named[name.zfill(2)] for name in only}) or found


def parameters_for(plan: Collection, notebook: Path) -> dict[str, Any]:
    """Values for what the notebook's cell tagged `parameters` declares; papermill only warns of other names.

    Raises:
        ValueError: no such cell, or a name in it that the collection does not know.
    """
    import papermill

    declared = papermill.inspect_notebook(_literal(notebook))
    unknown = sorted(set(declared) - set(PARAMETERS))
    if unknown or not declared:
        raise ValueError(
            f"{notebook.name}: its cell tagged 'parameters' declares {', '.join(unknown) or 'nothing'}; "
            f"expected are names out of {', '.join(PARAMETERS)}"
        )
    values = dict(zip(PARAMETERS, (plan.profile, plan.dataset, plan.seed, False), strict=True))
    return {name: values[name] for name in declared}


def stamp(plan: Collection, notebook: Path) -> str:
    """A hash of everything that the notebook's results depend on, see the text above."""
    made_with, sources, dataset = machine.describe(), [notebook], data.open(plan.dataset)
    if notebook.parent.name == "solutions":  # they execute cells of the notebook that they solve
        sources.append(notebook.parent.parent / notebook.name.replace("_solutions", ""))
    contents = {
        "cells": [
            (cell.cell_type, cell.source) for file in sources for cell in read_notebook(file).cells
        ],
        "parameters": parameters_for(plan, notebook),
        "run": [plan.profile, plan.dataset, dataset.fingerprint, *data.present()],
        "stated": dataset.entry.stated,
        "recipe": paths.RECIPE,
        "reference": [
            (file.relative_to(paths.REFERENCE).as_posix(), _hash(file.read_bytes()))
            for file in sorted(paths.REFERENCE.glob("*/**/*"))
            # Tables of profiles are what runs are compared with, not made from.
            if file.relative_to(paths.REFERENCE).parts[0] not in profiles.PROFILES
            and re.fullmatch(r"\.(csv|json.*|md|safetensors)", file.suffix)
        ],
        "made with": [made_with[key] for key in ("versions", "device", "threads")],
    }
    return _hash(json.dumps(contents, sort_keys=True).encode())[:16]


def is_current(plan: Collection, notebook: Path) -> bool:
    """True when the notebook was computed, nothing it depends on has changed and all it wrote is there."""
    entry = plan.manifest["notebooks"].get(notebook.stem)
    if entry is None or entry["stamp"] != stamp(plan, notebook):
        return False
    needed = [plan.results / name for name in entry["outputs"]]
    needed += [plan.executed(notebook), plan.executed(notebook, ".html")]
    return all(file.exists() for file in needed)


def run(plan: Collection, force: bool = False) -> None:
    """Check the data, execute the plan's notebooks in order, print one line for each, and sum up.

    Notebooks that are current are left as they are unless `force`. The results folder belongs to one process at a time.

    Raises:
        srlib.files.DataError: bad files in the data set.
        NotebookError: a notebook failed; what was computed before it stays.
    """
    print(f"profile {plan.profile}, data set {plan.dataset}, {machine.device_name()}")
    data.open(plan.dataset).check()
    with paths.locked(plan.results):
        start, computed = time.perf_counter(), 0
        width = max(len(notebook.stem) for notebook in plan.notebooks)
        for notebook in plan.notebooks:
            line = f"  {notebook.stem:<{width}}  "
            print(line, end="", flush=True)
            if not force and is_current(plan, notebook):
                print("unchanged")
                continue
            try:
                seconds = execute(plan, notebook)
            except BaseException:
                print("stopped")
                raise
            computed += 1
            rewritten = f"\r{line}" if sys.stderr.isatty() else ""  # over the progress bar
            print(rewritten + pages.duration(seconds))
        done = plan.manifest["notebooks"]
        outputs = [name for entry in done.values() for name in entry["outputs"]]
        figures, tables = (sum(name.endswith(end) for name in outputs) for end in (".png", ".csv"))
        print(
            f"{computed} computed, {len(plan.notebooks) - computed} unchanged, "
            f"{pages.duration(time.perf_counter() - start)} in all; "
            f"{figures} figures and {tables} tables\n"
            f"results: {_shown(plan.results)}\n"
            f"to read: {_shown(pages.write_index(plan.results, plan.manifest))}"
        )
    if plan.seed == 0 and verify.folder(plan.profile, plan.dataset).is_dir():
        print(verify.verdict(verify.compare(plan.profile, plan.dataset, done)))


def execute(plan: Collection, notebook: Path) -> float:
    """Execute one notebook from its source; write its page and its entry in the manifest.

    Returns:
        Seconds that it took.

    Raises:
        NotebookError: names the cell and the log; the notebook with the outputs so far is kept beside the log.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    log, failed = plan.executed(notebook, ".log"), plan.executed(notebook, ".failed.ipynb")
    working = plan.executed(notebook, ".running.ipynb")
    log.parent.mkdir(parents=True, exist_ok=True)
    mark, before, start = stamp(plan, notebook), _written(plan.results), time.perf_counter()
    with kernel_environment(plan.profile), log.open("w", encoding="utf-8") as stream:
        try:
            papermill.execute_notebook(
                _literal(notebook),
                _literal(working),
                parameters=parameters_for(plan, notebook),
                kernel_name="python3",
                language="python",
                cwd=notebook.parent,
                execution_timeout=CELL_TIMEOUT[plan.profile],
                progress_bar={"desc": f"  {notebook.stem}", "leave": False, "disable": None},
                stdout_file=stream,
                stderr_file=stream,
                extra_arguments=["--log-level=50"],  # what the kernel says of itself is no output
            )
        except Exception as error:
            message = ANSI_CODE.sub("", str(error)).strip() or type(error).__name__
            stream.write(f"\n{message}\n")
            states = [cell.metadata.papermill.status for cell in _own_cells(working)]
            begun = max((n for n, state in enumerate(states, 1) if state != "pending"), default=1)
            working.replace(failed)
            of_cell = isinstance(error, PapermillExecutionError)  # with its traceback
            raise NotebookError(
                f"{notebook.name}: cell {begun} failed: {message.splitlines()[-1 if of_cell else 0]}\n"
                f"log: {_shown(log)}\nas far as it came: {_shown(failed)}"
            ) from error
    seconds = time.perf_counter() - start
    paths.make_visible(working, plan.executed(notebook))
    failed.unlink(missing_ok=True)
    pages.write_page(plan.executed(notebook))
    outputs = sorted(dict(_written(plan.results).items() - before.items()))
    _record(plan, notebook, {"stamp": mark, "seconds": round(seconds, 1), "outputs": outputs})
    return seconds


def _literal(path: Path) -> str:
    """Write a path so that papermill, for which braces hold a parameter's name, reads them as they are."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _own_cells(executed: Path) -> list[NotebookNode]:
    """Cells that an executed notebook has from its source, without those that papermill added."""
    cells = read_notebook(executed).cells
    return [cell for cell in cells if not ADDED_CELLS & set(cell.metadata.get("tags", []))]


@contextmanager
def kernel_environment(profile: str) -> Iterator[None]:
    """Set the environment of the kernels that are started meanwhile.

    They get the profile and import this `srlib`, not an installed one. The kernel `python3` is this very
    interpreter: one of that name that is registered for another environment does not come first.
    """
    from ipykernel.kernelspec import write_kernel_spec

    with tempfile.TemporaryDirectory() as folder:
        write_kernel_spec(Path(folder) / "kernels" / "python3")
        added = {"JUPYTER_PATH": folder, "PYTHONPATH": str(paths.ROOT)}
        for name in added.keys() & os.environ.keys():
            added[name] += os.pathsep + os.environ[name]
        with patch.dict(os.environ, added, SRLIB_PROFILE=profile):
            yield


def store_outputs(plan: Collection) -> None:
    """Copy what the plan's last run displayed into the committed notebooks, for maintainers.

    Their solutions, which no run executes, are executed first. Outputs only: times and the kernel's version are left
    behind.

    Raises:
        ValueError: a notebook was not executed as it now stands, or an output holds an absolute path.
        NotebookError: solutions failed.
    """
    for notebook in plan.notebooks:
        if not is_current(plan, notebook):
            raise ValueError(f"{notebook.name} was not executed as it now stands; run it first")
    files = [n.parent / "solutions" / f"{n.stem}_solutions.ipynb" for n in plan.notebooks]
    solved = tuple(file for file in files if file.exists())
    if solved:
        run(dataclasses.replace(plan, notebooks=solved))
    for notebook in plan.notebooks + solved:
        source, executed, count = read_notebook(notebook), _own_cells(plan.executed(notebook)), 0
        for number, (cell, done) in enumerate(zip(source.cells, executed, strict=True), 1):
            for noise in ("execution", "papermill"):
                cell.metadata.pop(noise, None)
            if cell.cell_type != "code":
                continue
            if ABSOLUTE_PATH.search(json.dumps(done.outputs)):
                name = f"{notebook.name}: the output of cell {number}"
                raise ValueError(f"{name} holds an absolute path")
            count += 1
            cell.execution_count, cell.outputs = count, done.outputs
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = count
        source.metadata = NotebookNode(
            kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
            language_info={"name": "python"},
        )
        _write(source, notebook)


def _write(content: NotebookNode, notebook: Path) -> None:
    with paths.atomic_path(notebook) as temporary:
        nbformat.write(content, temporary)


def _record(plan: Collection, notebook: Path, entry: dict[str, Any]) -> None:
    """Put a notebook's entry into the manifest; remove what only its former version wrote."""
    manifest = plan.manifest
    former = manifest["notebooks"].get(notebook.stem, {"outputs": []})["outputs"]
    config = runs.config_for(plan.profile, plan.dataset, seed=plan.seed)
    manifest["training"] = dataclasses.asdict(config)
    manifest["data"] = data.open(plan.dataset).fingerprint
    entry["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    manifest["notebooks"][notebook.stem] = entry | machine.describe()
    with paths.atomic_path(plan.results / "manifest.json") as temporary:
        temporary.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    kept = {name for done in manifest["notebooks"].values() for name in done["outputs"]}
    for name in set(former) - kept:
        (plan.results / name).unlink(missing_ok=True)


def _written(results: Path) -> dict[str, int]:
    """Every figure and table of a results folder with the time it was written."""
    files = [file for kind in OUTPUTS for file in results.glob(f"{kind}/*")]
    return {file.relative_to(results).as_posix(): file.stat().st_mtime_ns for file in files}


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _shown(path: Path) -> str:
    """A path as people type it: from the working directory when it lies below."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
