from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from distill.attacks._made import Asked, column_ranges
from distill.contracts import Apprentice, Oracle
from distill.errors import DistillError
from distill.randomness import generator
from distill.records import Answers, Examples, Inputs, Queries, Reveals, TransferSet

SHOWN = 5  # points of its own curve
SMALLEST = 2.0**-126  # a smaller float32 has fewer digits


class EquationSolving:
    """Solve for the weights of a linear (logistic) teacher: the logarithms of its answers are linear in the query.

    Paper: Stealing Machine Learning Models via Prediction APIs, Tramèr et al., USENIX Security 2016, sec. 4.1:
    ``log p_k(x) - mean_j log p_j(x) = w_k x + b_k``, of which the mean over the classes is 0 (a softmax does not tell
    weights that differ by one vector for all classes). Threat model: whole posteriors or logits, the range of each
    column, which it reads off its pool; queries of its own. Of another teacher the solution is the best linear one on
    these queries in least squares, and the residual in the transfer set's note says how good that is.

    The paper counts K (d + 1) unknowns for d columns and K classes and asks as many queries. Each answer gives K
    equations, so d + 1 queries determine all of them, and every further one averages rounding away. Departs from the
    paper, whose queries are random, in designing them: blocks of d + 1 queries are rows of a cosine matrix with its
    columns permuted and mirrored, so that the system has condition number 1.4 from the first block on. A constant
    column is varied by 1 about its value. Answers that a float32 can't hold to its full precision are left out if
    enough others remain.

    Its own student is the solved model (`LinearModel`).

    Args:
        spread: How far the queries reach from the middle of each column's range, as a share of half of it. Less of it
            keeps classes from vanishing out of the answers of a confident teacher.

    Raises:
        DistillError: The spread is not more than 0, or the budget pays for fewer than d + 1 answers.
    """

    requires: ClassVar[Reveals] = Reveals.PROBS
    uses_teacher: ClassVar[bool] = True
    adapts: ClassVar[bool] = False
    inputs: ClassVar[tuple[str, ...]] = ("table",)

    def __init__(self, spread: float = 1.0) -> None:
        if not spread > 0:
            raise DistillError(f"spread is more than 0, not {spread}")
        self.spread = spread

    def extract(self, oracle: Oracle, pool: Examples, student: Apprentice, seed: int) -> TransferSet:
        """See `distill.contracts.Attack`. All inputs are made: float32 (n, features)."""
        asked, columns = Asked(oracle, pool), pool.spec.shape[0]
        if asked.total <= columns:
            raise DistillError(
                f"pays for {asked.total} answers, but {columns} columns take at least {columns + 1} equations", "budget"
            )
        low, high = (edge.astype(np.float64) for edge in column_ranges(pool))
        centre, reach = (low + high) / 2, self.spread * np.where(high > low, (high - low) / 2, 1.0)
        design = _designed(asked.total, columns, generator(seed, "attack", "equation_solving"))
        inputs = (centre + reach * design).astype(np.float32)
        answers = asked.ask(Queries.made(inputs))
        for n in np.unique(np.geomspace(columns + 1, len(answers), SHOWN).round().astype(int)):
            model, residual = solved(inputs[:n], answers[:n], centre, reach)
            student.show(model, int(n))
        return asked.transfer_set(f"EquationSolving (residual {residual:.1e} in log-probability)")


@dataclass(frozen=True)
class LinearModel:
    """``logits = weights.T ((x - centre) / reach) + bias``.

    Args:
        centre, reach: (features,) float64, reach above 0.
        weights: (features, classes) float64; each row has mean 0.
        bias: (classes,) float64 with mean 0.
    """

    centre: np.ndarray
    reach: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    def predict(self, inputs: Inputs) -> np.ndarray:
        """(n, classes) float32 logits."""
        columns = (inputs[: len(inputs)].astype(np.float64) - self.centre) / self.reach
        return (columns @ self.weights + self.bias).astype(np.float32)


def solved(inputs: np.ndarray, answers: Answers, centre: np.ndarray, reach: np.ndarray) -> tuple[LinearModel, float]:
    """The linear model whose log-probabilities are closest to those of n answers, and the root mean square of what is
    left. Probabilities of 0 count as 1e-12 where they can't be left out."""
    if answers.logits is not None:
        logs = answers.logits.astype(np.float64)
    else:
        whole = (answers.posteriors >= SMALLEST).all(axis=1)
        enough = whole.sum() > inputs.shape[1]
        if enough:
            inputs, answers = inputs[whole], answers[whole]
        logs = np.log(np.maximum(answers.posteriors.astype(np.float64), SMALLEST if enough else 1e-12))
    logs -= logs.mean(axis=1, keepdims=True)
    columns = np.column_stack([(inputs.astype(np.float64) - centre) / reach, np.ones(len(inputs))])
    solution, *_ = np.linalg.lstsq(columns, logs, rcond=None)
    residual = float(np.sqrt(np.mean((columns @ solution - logs) ** 2)))
    return LinearModel(centre, reach, solution[:-1], solution[-1]), residual


def _designed(n: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """(n, columns) in [-1, 1]: each block of ``columns + 1`` rows has orthogonal columns of mean 0."""
    size = columns + 1
    cosines = np.cos(np.pi * (np.arange(size)[:, None] + 0.5) * np.arange(1, size) / size)
    blocks = [
        cosines[:, rng.permutation(columns)] * rng.choice([-1.0, 1.0], size=columns) for _ in range(-(-n // size))
    ]
    return np.concatenate(blocks)[:n]
