"""The repository itself: dependency files agree, notebooks can be checked, nothing of one machine is in it."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.main import get_command

import srlib
from srlib import cli
from srlib.book import collection
from srlib.files import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
CONDA_NAMES = {"torch": "pytorch"}
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))


def requirements(*extras: str) -> dict[str, Requirement]:
    """What pyproject.toml asks for, by canonical name."""
    lines = PROJECT["dependencies"] + [
        line for extra in extras for line in PROJECT["optional-dependencies"][extra]
    ]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so there is no list of the repository's files")
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True
    )
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [file for file in files if file.is_file()]


# --- Dependencies ----------------------------------------------------------------------------------


def test_lock_holds_an_exact_version_in_range_of_every_dependency():
    texts = [(ROOT / f"requirements{of}.lock").read_text() for of in ("", "-torch")]
    pins: dict[str, list[str]] = {}
    for line in "".join(texts).replace("\\\n", "").splitlines():
        if not line.startswith("#"):
            pin, *hashes = line.split(" --hash=sha256:")
            (specifier,) = Requirement(pin).specifier
            assert specifier.operator == "==", line
            assert hashes or pin.startswith("torch=="), f"{pin} has no hash"
            pins.setdefault(canonicalize_name(Requirement(pin).name), []).append(specifier.version)
    assert pins["torch"] == ["2.13.0"]
    for name, requirement in requirements("dev", "measure", "dask", "slurm", "export").items():
        assert name in pins, f"no lock holds {name}"
        for version in pins[name]:
            assert version in requirement.specifier, f"{name} {version}"


def test_conda_environment_asks_for_what_pyproject_asks_for():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = (entry["pip"] for entry in listed if isinstance(entry, dict))
    conda = {entry for entry in listed if isinstance(entry, str)}
    found = (conda | set(pip)) - {"pip", "pytorch-cpu", "--editable ."}
    expected = {f"python{PROJECT['requires-python']}"}
    for name, requirement in requirements("dev", "dask", "slurm", "export").items():
        expected.add(f"{CONDA_NAMES.get(name, name)}{requirement.specifier}")
    assert {canonical(entry) for entry in found} == {canonical(entry) for entry in expected}


def canonical(entry: str) -> tuple[str, str]:
    requirement = Requirement(entry)
    return requirement.name, str(requirement.specifier)


def test_each_dependency_says_what_needs_it():
    text = (ROOT / "pyproject.toml").read_text()
    for name in requirements("dev", "gpu", "measure", "dask", "slurm", "export", "nnunet", "view"):
        (line,) = (row for row in text.splitlines() if f'"{name}>=' in row)
        assert re.search(r"# \w.{15,}", line), line


def test_srlib_imports_only_what_is_declared():
    declared = set(requirements("gpu", "measure", "dask", "slurm", "export", "nnunet", "view")) | {
        "triton"
    }  # comes with torch where it can run
    owners = packages_distributions()
    for file in (ROOT / "srlib").rglob("*.py"):
        for module in imported(ast.parse(file.read_text())) - {"srlib"} - sys.stdlib_module_names:
            names = {canonicalize_name(owner) for owner in owners.get(module, [module])}
            assert names & declared, f"{file.name} imports {module}; pyproject.toml lacks {names}"


def test_training_needs_only_what_trains():
    """On a GPU's machine there may be no more than torch, MONAI, Fabric and what reads NIfTI."""
    absent = ["numba", "llvmlite", "nilearn", "SimpleITK", "statsmodels", "matplotlib", "papermill"]
    absent += ["nbconvert", "nbformat", "jupyterlab", "ipywidgets", "IPython", "distributed"]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
    code += "from srlib import SegResMamba, scan; from srlib.study import grid; print(scan.backends()['cpu'].reason)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "numba cannot be used" in done.stdout


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of the modules that a file imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


# --- What is in the repository ---------------------------------------------------------------------


def test_tree_is_complete():
    documents = ("README.md", "LICENSE", "NOTICE", "CITATION.cff", "data/README.md")
    environment = (
        "environment.yml",
        "pyproject.toml",
        "requirements.lock",
        "run_all.sh",
        ".ci/run",
    )
    for name in (
        *documents,
        *environment,
        "srlib/net/model.py",
        "srlib/net/tom.py",
        "srlib/scan/__init__.py",
    ):
        assert (ROOT / name).is_file(), name
    for name in ("run_all.sh", ".ci/run"):
        assert (ROOT / name).stat().st_mode & 0o111, f"{name} is not executable"


def test_the_readme_s_code_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    (shape,) = re.findall(r"# (\(.*\))", code)
    assert tuple(names["logits"].shape) == ast.literal_eval(shape)


PAGES = (
    "README.md",
    "SECURITY.md",
    "data/README.md",
    *(f"docs/{f.name}" for f in (ROOT / "docs").glob("*.md")),
)


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_to_files(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith("https://"):
            assert ((ROOT / page).parent / target).is_file(), target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_pages_name_every_command_option_and_variable():
    app = get_command(cli.app)
    options = (ROOT / "docs" / "options.md").read_text()
    maintainers = {"store-outputs", "store-reference", "collection"}
    for command in set(app.commands) - maintainers:
        assert re.search(rf"`{command}\b", options), command
    for option in app.commands["collection"].params:
        assert option.opts[0] in options, option.opts
    code = "".join(file.read_text() for file in (ROOT / "srlib").rglob("*.py"))
    assert set(re.findall(r"SRLIB_[A-Z]+", options)) == set(re.findall(r"SRLIB_[A-Z]+", code))


PACKAGES = [
    "files machine tables errors",
    "scan",
    "net",
    "data",
    "run",
    "study",
    "show",
    "export",
    "book",
    "cli __main__",
]


def test_imports_go_upwards_only():
    level = {name: number for number, names in enumerate(PACKAGES) for name in names.split()}
    for file in (ROOT / "srlib").rglob("*.py"):
        here = file.relative_to(ROOT / "srlib").with_suffix("").parts[0]
        if here == "__init__":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level or not node.module:
                continue
            package, *parts = node.module.split(".")
            names = parts[:1] or [alias.name for alias in node.names]
            above = [name for name in names if level.get(name, 0) > level[here]]
            assert package != "srlib" or not above, f"{file.name} imports {above}"


def test_the_page_for_developers_names_every_module():
    named = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "development.md").read_text()))
    modules = {path.stem for path in (ROOT / "srlib").rglob("*.py") if path.parent.name != "scan"}
    assert modules - {"__init__"} <= named


def test_citation_and_package_have_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == srlib.__version__
    assert citation["license"] == PROJECT["license"]


def test_nothing_of_one_machine_is_in_the_repository():
    home = re.compile(r"(?<![\w.~/])/(?:root|home|work|Users)/\w")
    registry = re.compile(r"(pypi|anaconda|pythonhosted)" + r"\.(org|com|io)")
    for file in tracked_files():
        if file.suffix in {".npz", ".png", ".safetensors"} or file == Path(__file__).resolve():
            continue
        text = file.read_text(encoding="utf-8")
        if file.name not in {"collection.py", "test_collection.py"}:  # their subject
            assert not home.search(text), f"{file.name}: {home.search(text)}"
        assert not registry.search(text), f"{file.name}: {registry.search(text)}"


def test_no_large_file_is_in_the_repository():
    for file in tracked_files():
        limit = 16e6 if file.name == "small.safetensors" else 5e6
        assert file.stat().st_size < limit, file.name


# --- Notebooks -------------------------------------------------------------------------------------


def test_there_are_notebooks_and_the_readme_names_them():
    readme = (ROOT / "README.md").read_text()
    for notebook in collection.find_notebooks():
        assert notebook.stem in readme


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_checked_cells_with_stored_outputs(path):
    """Without them nbval would compare nothing and pass."""
    cells = nbformat.read(path, as_version=4).cells
    checked = [
        cell
        for cell in cells
        if cell.cell_type == "code" and "NBVAL_CHECK_OUTPUT" in cell.source.splitlines()[0]
    ]
    assert checked, "no cell starts with '# NBVAL_CHECK_OUTPUT'"
    for cell in checked:
        assert cell.outputs, f"no stored output: {cell.source}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_was_run_from_top_to_bottom_without_errors(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert all(output.output_type != "error" for output in cell.outputs)
        assert not collection.ABSOLUTE_PATH.search(str(cell.outputs))


def test_notebooks_open_with_a_heading_and_can_be_given_parameters():
    plan = collection.plan("smoke", "mni152")
    for path in plan.notebooks:
        assert nbformat.read(path, as_version=4).cells[0].source.startswith("# ")
        assert collection.parameters_for(plan, path)["PROFILE"] == "smoke"
