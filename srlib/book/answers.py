"""Self-checks of the notebooks: a reader's answer, and whether it is right or what to think of."""

from __future__ import annotations

from collections.abc import Callable
from math import isclose, log
from typing import NamedTuple

from srlib.net.model import MINIMUM_DIVISOR


class Question(NamedTuple):
    """The right answer, computed when it is asked for, how near counts, and a hint."""

    right: Callable[[], float]
    tolerance: float
    hint: str


QUESTIONS = {
    "00-smallest": Question(
        lambda: MINIMUM_DIVISOR + 1, 0, "go down from 51 until the network refuses"
    ),
    "01-half-life": Question(
        lambda: log(2) / (0.01 * 2), 0.5, "after n tokens exp(-n 0.01 * 2) is left"
    ),
    "01-neighbours": Question(
        lambda: 16 * 24,
        0,
        "a row of W voxels lies between them, and each of its places is visited in all D slices",
    ),
    "01-tokens": Question(
        lambda: (96 // 2 // 2 // 2) ** 3,
        0,
        "the stem, the way to stage 1 and the block's inside halve each edge once",
    ),
    "02-step": Question(lambda: 17 // 4, 0, "items 0 to 3 belong to step 0"),
    "03-undecided": Question(lambda: log(3), 0.005, "each class has the probability 1/3"),
}


def check(name: str, answer: float | None) -> None:
    """Print if an answer is right, or else a hint.

    Args:
        name: of the question, as in the notebook.
        answer: a number; `None` as long as there is none.

    Raises:
        ValueError: no question of that name.
        TypeError: the answer is no number.
    """
    if name not in QUESTIONS:
        raise ValueError(f"question {name!r} is not one of {', '.join(QUESTIONS)}")
    if answer is None:
        print("Put your answer in the place of None and run the cell again.")
        return
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        raise TypeError(f"an answer is a number, got {answer!r}")
    question = QUESTIONS[name]
    right = isclose(answer, question.right(), rel_tol=0, abs_tol=question.tolerance)
    print("Right." if right else f"Not yet. Think of this: {question.hint}.")
