from __future__ import annotations

import string
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from distill.errors import DistillError
from distill.language import Prompts, Task, texts
from distill.randomness import generator

LETTERS = string.ascii_lowercase
BLOCK = 64  # programs drawn at once, however many are wanted


class StraightLine:
    """Arithmetic that can't be done in one step: straight-line programs over digits modulo 10, steps written out.

    ``a=3;b=a+5;c=b-9;c?`` is answered ``a=3;b=3+5=8;c=8-9=9;.9``. Each variable is the one before it plus or minus a
    digit (or, with `variable_share`, another earlier variable: much harder to learn), so no assignment can be skipped.
    No two prompts are equal, and fewer rows of a part are a prefix of more. Chats of one user message; references and
    entries hold the answer.

    Args:
        train_rows: What a teacher that is trained here learns from.
        held_out_rows: What an attacker may hold.
        test_rows: What the evaluation asks.
        min_assignments, max_assignments: Every length between them (at most 26) is equally likely.
        variable_share: Chance of what is added to be an earlier variable instead of a digit.
        check_steps: An answer is right only with all of its steps right; else the digit after its last dot decides.
        split_seed: Which programs.

    Raises:
        DistillError: A number is out of range, or there are not enough programs of these lengths.
    """

    def __init__(
        self,
        train_rows: int = 50_000,
        held_out_rows: int = 10_000,
        test_rows: int = 500,
        min_assignments: int = 4,
        max_assignments: int = 9,
        variable_share: float = 0.0,
        check_steps: bool = False,
        split_seed: int = 0,
    ) -> None:
        self.rows = {"test": test_rows, "held_out": held_out_rows, "train": train_rows}
        for part, rows in self.rows.items():
            if rows < 1:
                raise DistillError(f"{part}_rows must be at least 1, not {rows}")
        if not 2 <= min_assignments <= max_assignments <= len(LETTERS):
            raise DistillError(
                f"min_assignments ({min_assignments}) must be at least 2 and at most max_assignments "
                f"({max_assignments}), which is at most {len(LETTERS)}"
            )
        if not 0 <= variable_share <= 1:
            raise DistillError(f"variable_share must be at least 0 and at most 1, not {variable_share}")
        # The shortest programs run out first; the others are as likely, and more.
        lengths = max_assignments - min_assignments + 1
        operands = [
            10 if i == 1 else 10 * (variable_share < 1) + (i - 1) * (variable_share > 0)
            for i in range(1, min_assignments)
        ]
        programs = lengths * 10 * prod(2 * choices for choices in operands)
        if 2 * sum(self.rows.values()) > programs:
            raise DistillError(f"{sum(self.rows.values())} programs are too many for their lengths; raise them")
        self.min_assignments, self.max_assignments = min_assignments, max_assignments
        self.variable_share, self.check_steps, self.split_seed = variable_share, check_steps, split_seed

    def load(self) -> Task:
        """Never raises."""
        seen: set[str] = set()
        test, held_out, train = (self._draw(part, rows, seen) for part, rows in self.rows.items())
        return Task("straight_line", train, held_out, test, steps_right if self.check_steps else answer_right)

    def _draw(self, part: str, rows: int, seen: set[str]) -> Prompts:
        """Programs that are not in `seen`, which grows by them."""
        rng = generator(self.split_seed, "straight_line", part)
        questions: list[str] = []
        answers: list[str] = []
        while len(questions) < rows:
            sizes = rng.integers(self.min_assignments, self.max_assignments + 1, size=BLOCK).tolist()
            draws = rng.random((BLOCK, self.max_assignments, 2)).tolist()
            for size, numbers in zip(sizes, draws, strict=True):
                question, answer = _program(numbers[:size], self.variable_share)
                if question not in seen and len(questions) < rows:
                    seen.add(question)
                    questions.append(question)
                    answers.append(answer)
        column = texts(answers)
        return Prompts.of_users(questions, references=column, entries=column, name=f"straight_line/{part}")


def _program(numbers: list[list[float]], variable_share: float) -> tuple[str, str]:
    """A program and its steps from two uniform numbers in [0, 1) an assignment: its sign and what it adds."""
    values = [int(10 * numbers[0][1])]
    program = steps = f"a={values[0]};"
    for i, (sign, operand) in enumerate(numbers[1:], start=1):
        if i == 1 or operand >= variable_share:  # b has no earlier variable beside a
            rest = operand if i == 1 else (operand - variable_share) / (1 - variable_share)
            value = int(10 * rest)
            written = str(value)
        else:
            earlier = int(operand / variable_share * (i - 1))
            value, written = values[earlier], LETTERS[earlier]
        operator = "+" if sign < 0.5 else "-"
        values.append((values[-1] + value if operator == "+" else values[-1] - value) % 10)
        program += f"{LETTERS[i]}={LETTERS[i - 1]}{operator}{written};"
        steps += f"{LETTERS[i]}={values[-2]}{operator}{value}={values[-1]};"
    return f"{program}{LETTERS[len(values) - 1]}?", f"{steps}.{values[-1]}"


def answer_right(prompts: Prompts, answers: np.ndarray) -> np.ndarray:
    """(n,) float64: 1 where what follows the last dot is the right digit."""
    return _score(prompts, answers, lambda answer: answer.rpartition(".")[1:])


def steps_right(prompts: Prompts, answers: np.ndarray) -> np.ndarray:
    """(n,) float64: 1 where the whole answer is right."""
    return _score(prompts, answers, lambda answer: answer)


def _score(prompts: Prompts, answers: np.ndarray, part: Callable[[str], Any]) -> np.ndarray:
    if prompts.entries is None:
        raise DistillError(f"{prompts.name} are no prompts of this task, so answers to them can't be checked", "data")
    pairs = zip(answers, prompts.entries, strict=True)
    return np.array([part(answer.strip()) == part(entry) for answer, entry in pairs], dtype=np.float64)
