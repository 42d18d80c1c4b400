"""Self-checks of the notebooks, and solutions that show the cells which they use."""

import nbformat
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from srlib import SegResMamba, TriOrientedMamba
from srlib.book.answers import QUESTIONS, check
from srlib.files import NOTEBOOKS
from srlib.scan import token_order

SOLUTIONS = sorted((NOTEBOOKS / "solutions").glob("*.ipynb"))


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_right_answer_is_right_and_others_get_a_hint(name, capsys):
    question = QUESTIONS[name]
    answers = question.right(), question.right() + 2 * question.tolerance + 1, None
    for answer in answers:
        check(name, answer)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "Right."
    assert said[1] == f"Not yet. Think of this: {question.hint}."
    assert said[2].startswith("Put your answer")


def test_answers_about_the_network_are_what_the_code_says():
    step = torch.argsort(token_order("inter_slice", 24 * 32 * 16, nslices=24)).view(24, 32, 16)
    (apart,) = step.diff(dim=1).abs().unique().tolist()
    assert QUESTIONS["01-neighbours"].right() == apart
    with FakeTensorMode(), torch.no_grad():
        network = SegResMamba(1, 3)
        tokens = []
        for layer in network.blocks[1].f3.modules():
            if isinstance(layer, TriOrientedMamba):
                layer.register_forward_hook(lambda _, __, out: tokens.append(out.shape[1]))
        network(torch.empty(1, 1, 96, 96, 96))
    assert [QUESTIONS["01-tokens"].right()] == tokens
    undecided = F.cross_entropy(torch.zeros(1, 3), torch.tensor([1])).item()
    assert QUESTIONS["03-undecided"].right() == pytest.approx(undecided)
    network = SegResMamba(1, 3, (8, 16, 32, 64))
    edge = int(QUESTIONS["00-smallest"].right())
    network(torch.zeros(1, 1, edge, 1, 1))
    with pytest.raises(ValueError, match="below the minimum"):
        network(torch.zeros(1, 1, edge - 1, edge - 1, edge - 1))


def test_what_is_no_number_and_no_question_is_refused():
    with pytest.raises(TypeError, match="got '24'"):
        check("01-neighbours", "24")
    with pytest.raises(ValueError, match="'07-x' is not one of 00-smallest"):
        check("07-x", 1)


def test_every_question_is_asked_in_its_notebook():
    for name in QUESTIONS:
        (notebook,) = NOTEBOOKS.glob(f"{name[:2]}_*.ipynb")
        cells = nbformat.read(notebook, as_version=4).cells
        assert any(f'check("{name}", answer)' in cell.source for cell in cells)


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_cells_that_solutions_take_over_are_those_of_the_notebook(path):
    notebook = NOTEBOOKS / f"{path.stem.removesuffix('_solutions')}.ipynb"
    solved, solution = (nbformat.read(file, as_version=4).cells for file in (notebook, path))
    source = {cell.id: cell.source for cell in solved if cell.cell_type == "code"}
    for cell in solution:
        if cell.cell_type == "code" and cell.id in source.keys() - {"setup", "parameters"}:
            assert cell.source == source[cell.id], cell.id
        assert "exec(" not in cell.source
