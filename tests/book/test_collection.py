"""The runner, on small notebooks that the tests write."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from srlib import data, files
from srlib.book import collection

ROOT = files.ROOT
PARAMETERS = 'PROFILE = "default"\nDATASET = "mni152"\nINTERACTIVE = True'
WRITE_TABLE = """
import os
from pathlib import Path
folder = Path(os.environ["SRLIB_RESULTS"]) / PROFILE / DATASET / "tables"
folder.mkdir(parents=True, exist_ok=True)
(folder / "{name}.csv").write_text("a,b\\n1,2\\n")
"""


def write_notebook(folder: Path, name: str, *cells: str, parameters: str = PARAMETERS) -> Path:
    """A notebook with a heading, a parameters cell and code cells."""
    tagged = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    heading = new_markdown_cell(f"# About {name}\n\n[next](01_second.ipynb)")
    notebook = new_notebook(cells=[heading, tagged, *map(new_code_cell, cells)])
    notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "any"}
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


@pytest.fixture
def tmp_path(tmp_path):
    """A folder whose name holds what people put into names."""
    folder = tmp_path / "a {} {b}"
    folder.mkdir()
    return folder


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """An empty folder for notebooks; results go beside it."""
    monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path / "results"))
    folder = tmp_path / "notebooks"
    folder.mkdir()
    return folder


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results" / "smoke" / "mni152"


def plan(notebooks: Path, *only: str) -> collection.Collection:
    return collection.plan("smoke", "mni152", only, notebooks)


def states(output: str) -> dict[str, str]:
    """Notebook -> what its line in the run's output says."""
    return {line.split()[0]: line.split()[-1] for line in output.splitlines() if line[:2] == "  "}


def test_run_executes_from_the_source_and_writes_everything_down(
    notebooks, results, tmp_path, monkeypatch, capsys
):
    # A kernel of the same name that belongs to another environment must not be taken.
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    show = "import os, sys\nprint(PROFILE, DATASET, INTERACTIVE, os.environ['SRLIB_PROFILE'])\n"
    show += "print(sys.executable)\nprint(os.getcwd())"
    source = write_notebook(notebooks, "00_first", show, WRITE_TABLE.format(name="one"))
    before = source.read_bytes()

    collection.run(plan(notebooks))

    output = capsys.readouterr().out
    assert states(output) == {"00_first": "s"}
    assert "1 computed, 0 unchanged" in output
    assert "0 figures and 1 tables" in output
    assert "index.html" in output.splitlines()[-1]
    folder = results / "notebooks"
    endings = (".ipynb", ".html", ".log")
    assert {file.name for file in folder.iterdir()} == {f"00_first{end}" for end in endings}
    log = (folder / "00_first.log").read_text()
    assert log == f"smoke mni152 False smoke\n{sys.executable}\n{notebooks}\n"
    page = (folder / "00_first.html").read_text()
    assert "About 00_first" in page
    assert 'href="01_second.html"' in page
    assert 'href="notebooks/00_first.html">About 00_first' in (results / "index.html").read_text()
    assert source.read_bytes() == before
    manifest = json.loads((results / "manifest.json").read_text())
    entry = manifest["notebooks"]["00_first"]
    assert entry["outputs"] == ["tables/one.csv"]
    assert {"commit", "dirty", "device", "threads", "versions", "seconds"} <= set(entry)
    assert manifest["data"]
    assert manifest["training"]["seed"] == 0
    assert "JUPYTER_PATH" not in os.environ


def test_only_what_changed_is_computed_again(notebooks, results, monkeypatch, capsys):
    def run(**options):
        collection.run(plan(notebooks), **options)
        found = states(capsys.readouterr().out)
        return {name for name, state in found.items() if state != "unchanged"}

    write_notebook(notebooks, "00_first", WRITE_TABLE.format(name="one"))
    write_notebook(notebooks, "01_second", "1 + 1")
    assert run() == {"00_first", "01_second"}
    assert run() == set()
    assert run(force=True) == {"00_first", "01_second"}
    (results / "tables" / "one.csv").unlink()
    assert run() == {"00_first"}
    write_notebook(notebooks, "01_second", WRITE_TABLE.format(name="two"))
    assert run() == {"01_second"}
    # A table that a notebook no longer makes does not stay behind.
    write_notebook(notebooks, "01_second", "1 + 2")
    assert run() == {"01_second"}
    assert [table.name for table in (results / "tables").iterdir()] == ["one.csv"]
    monkeypatch.setattr(files, "RECIPE", files.RECIPE + 1)
    assert not any(collection.is_current(plan(notebooks), file) for file in notebooks.iterdir())


def test_a_stamp_knows_the_reference_s_networks_and_which_data_sets_are_here(
    notebooks, tmp_path, monkeypatch
):
    """00 shows both."""
    notebook, reference = write_notebook(notebooks, "00_first"), tmp_path / "reference"
    monkeypatch.setattr(files, "REFERENCE", reference)
    for name in ("mni152", "smoke"):
        (reference / name).mkdir(parents=True)
    stamps = [collection.stamp(plan(notebooks), notebook)]
    for name in ("tiny.safetensors", "tiny.md"):
        (reference / "mni152" / name).touch()
        stamps.append(collection.stamp(plan(notebooks), notebook))
    (reference / "smoke" / "table.csv").touch()  # compared with, not read
    assert collection.stamp(plan(notebooks), notebook) == stamps[-1]
    monkeypatch.setattr(data, "present", lambda: ["another"])
    stamps.append(collection.stamp(plan(notebooks), notebook))
    assert len(set(stamps)) == 4


def test_a_failing_notebook_stops_the_run_and_is_named(notebooks, results, capsys):
    write_notebook(notebooks, "00_first", "1 + 1")
    write_notebook(notebooks, "01_second", "print('so far')", "1 / 0", "print('never')")
    write_notebook(notebooks, "02_third", "1 + 1")

    with pytest.raises(collection.NotebookError) as caught:
        collection.run(plan(notebooks))

    assert "01_second.ipynb: cell 4 failed: ZeroDivisionError" in str(caught.value)
    assert states(capsys.readouterr().out) == {"00_first": "s", "01_second": "stopped"}
    log = (results / "notebooks" / "01_second.log").read_text()
    assert log.startswith("so far\n")
    assert "1 / 0" in log
    failed = results / "notebooks" / "01_second.failed.ipynb"
    cells = collection._own_cells(failed)[1:]
    kinds = [[output.output_type for output in cell.outputs] for cell in cells]
    assert kinds == [[], ["stream"], ["error"], []]
    current = [collection.is_current(plan(notebooks), path) for path in plan(notebooks).notebooks]
    assert current == [True, False, False]

    write_notebook(notebooks, "01_second", "1 + 1")
    collection.run(plan(notebooks))
    assert states(capsys.readouterr().out)["00_first"] == "unchanged"
    assert not failed.exists()


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("import os\nos._exit(1)", "Kernel died"),
        ("import time\ntime.sleep(60)", "A cell timed out"),
    ],
)
def test_a_dying_kernel_and_a_hanging_cell_are_failures(notebooks, monkeypatch, cell, said):
    monkeypatch.setitem(collection.CELL_TIMEOUT, "smoke", 3)
    write_notebook(notebooks, "00_first", cell)
    with pytest.raises(collection.NotebookError, match=f"00_first.ipynb: cell 3 failed: {said}"):
        collection.run(plan(notebooks))


def test_interrupt_stops_within_seconds_and_keeps_what_is_finished(notebooks, tmp_path):
    marker = tmp_path / "started"
    long = f"open({str(marker)!r}, 'w'); import time; time.sleep(300)"
    write_notebook(notebooks, "00_first", "1 + 1")
    write_notebook(notebooks, "01_long", long)
    script = (
        "import sys\nfrom pathlib import Path\nfrom srlib.book import collection\n"
        "collection.run(collection.plan('smoke', 'mni152', (), Path(sys.argv[1])))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(notebooks)],
        cwd=ROOT,
        # a shell's job in the background ignores interrupts, and what it starts inherits that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 300
        while not marker.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
    assert set(plan(notebooks).manifest["notebooks"]) == {"00_first"}


def test_names_are_checked_before_anything_runs(notebooks, tmp_path, monkeypatch):
    first, second = (write_notebook(notebooks, name) for name in ("00_first", "01_second"))
    assert plan(notebooks).notebooks == (first, second)
    assert plan(notebooks, "01_second.ipynb", "0", "00_first").notebooks == (first, second)
    assert plan(notebooks, "1").notebooks == (second,)
    with pytest.raises(ValueError, match="smoke, default, full"):
        collection.plan("fast", "mni152", (), notebooks)
    with pytest.raises(ValueError, match="hippocampus"):
        collection.plan("smoke", "hippo", (), notebooks)
    with pytest.raises(ValueError, match="'07' is not one of 00_first, 01_second"):
        plan(notebooks, "07")
    with pytest.raises(ValueError, match="no notebooks"):
        plan(tmp_path)
    monkeypatch.setenv("SRLIB_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="data get hippocampus"):
        collection.plan("smoke", "hippocampus", (), notebooks)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("cell", "named"), [('PROFILE = "default"\nDATA_SET = "mni152"', "DATA_SET"), ("", "nothing")]
)
def test_parameters_that_cannot_be_filled_are_refused(notebooks, cell, named):
    first = write_notebook(notebooks, "00_first", parameters="import os\nINTERACTIVE = os")
    assert collection.parameters_for(plan(notebooks), first) == {"INTERACTIVE": False}
    write_notebook(notebooks, "00_first", parameters=cell)
    with pytest.raises(ValueError, match=f"00_first.ipynb.*declares {named}"):
        plan(notebooks)


def test_store_outputs_copies_outputs_and_nothing_else(notebooks):
    shown = "from IPython.display import HTML\nprint('text')\nHTML('<b>bold</b>')"
    source = write_notebook(notebooks, "00_first", shown, "6 * 7")
    sources = [cell.source for cell in nbformat.read(source, 4).cells]
    with pytest.raises(ValueError, match="run it first"):
        collection.store_outputs(plan(notebooks))
    collection.run(plan(notebooks))

    collection.store_outputs(plan(notebooks))

    stored = nbformat.read(source, as_version=4)
    nbformat.validate(stored)
    assert [cell.source for cell in stored.cells] == sources
    assert [cell.get("execution_count") for cell in stored.cells] == [None, 1, 2, 3]
    kinds = [output.output_type for output in stored.cells[2].outputs]
    assert kinds == ["stream", "execute_result"]
    assert stored.cells[3].outputs[0].data["text/plain"] == "42"
    assert stored.cells[3].outputs[0].execution_count == 3
    assert [dict(cell.metadata) for cell in stored.cells] == [{}, {"tags": ["parameters"]}, {}, {}]
    assert set(stored.metadata) == {"kernelspec", "language_info"}
    # Storing outputs does not make the notebook look changed.
    assert collection.is_current(plan(notebooks), source)


def test_store_outputs_executes_the_solutions_when_what_they_solve_has_changed(notebooks, capsys):
    (notebooks / "solutions").mkdir()
    write_notebook(notebooks, "00_first", "6 * 7")
    write_notebook(notebooks, "01_second", "1 + 1")
    source = write_notebook(notebooks / "solutions", "00_first_solutions", "print('solved')")

    def executed():
        collection.run(plan(notebooks, "00"))
        assert "solutions" not in capsys.readouterr().out
        collection.store_outputs(plan(notebooks, "00"))
        return states(capsys.readouterr().out)["00_first_solutions"] != "unchanged"

    assert executed()
    stored = nbformat.read(source, as_version=4)
    assert [cell.get("execution_count") for cell in stored.cells] == [None, 1, 2]
    assert stored.cells[2].outputs[0].text == "solved\n"
    assert not executed()
    write_notebook(notebooks, "00_first", "6 * 9")
    assert executed()


def test_store_outputs_refuses_paths_of_this_machine(notebooks):
    path = str(Path("/", "home", "somebody", "file"))
    source = write_notebook(notebooks, "00_first", f"print({path!r})")
    before = source.read_bytes()
    collection.run(plan(notebooks))
    with pytest.raises(ValueError, match="the output of cell 3"):
        collection.store_outputs(plan(notebooks))
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    "name", ["../../../mine", "figures/../../mine", "ABSOLUTE", "link/mine", "manifest.json"]
)
def test_a_manifest_that_names_files_outside_of_its_folder_is_refused(
    notebooks, results, tmp_path, name
):
    """Before anything is computed or deleted."""
    notebook = write_notebook(notebooks, "00_first")
    collection._record(plan(notebooks), notebook, {"stamp": "", "seconds": 1.0, "outputs": []})
    mine = tmp_path / "mine"
    for file in (mine, results.parent.parent / "mine", results.parent / "mine"):
        file.write_text("the user's")
    (results / "link").symlink_to(tmp_path)
    file = results / "manifest.json"
    manifest = json.loads(file.read_text())
    named = str(mine) if name == "ABSOLUTE" else name
    manifest["notebooks"]["00_first"]["outputs"].append(named)
    file.write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match=r"manifest\.json: names the output .*; expected files in figures"
    ):
        plan(notebooks)
    made = collection.Collection("smoke", "mni152", ())
    with pytest.raises(ValueError, match="names the output"):
        collection._record(made, notebook, {"outputs": []})
    assert mine.exists()
    assert file.exists()


@pytest.mark.slow
def test_the_smoke_profile_gives_the_same_tables_twice(tmp_path, monkeypatch):
    """Training and evaluation from scratch, both by 04, two times: every number agrees to the last bit."""
    tables = []
    for name in ("one", "two"):
        monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path / name))
        chosen = collection.plan("smoke", "mni152", ["04"])
        collection.run(chosen)
        written = sorted((chosen.results / "tables").iterdir())
        tables.append({table.name: table.read_text() for table in written})
    assert {name[:2] for name in tables[0]} == {"04"}
    assert tables[0] == tables[1]
