"""ModelGuard-W against a linear-program solver, ModelGuard-S against one row at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.optimize import linprog
from test_defenses import perturbed, posteriors

from distill.provider.defenses.chain import Chain
from distill.provider.defenses.modelguard_s import ModelGuardS
from distill.provider.defenses.modelguard_w import ModelGuardW
from distill.provider.defenses.rounding import Rounding
from distill.records import Answers

MARGIN, FLOOR = 1e-4, 1e-6


def degenerate_and_random(classes: int, rows: int) -> np.ndarray:
    """Float64 rows that sum to one: those of `posteriors` (a tenth of them for many classes), and near ties."""
    clean = posteriors(classes, rows).astype(np.float64)[:: 10 if classes > 10 else 1]
    near = clean[:rows].copy()
    near[:, 0] = near.max(axis=1)
    near[:, -1] = near[:, 0] + np.random.default_rng(1).uniform(-2 * MARGIN, 2 * MARGIN, len(near))
    clean = np.concatenate([clean, np.abs(near)])
    return clean / clean.sum(axis=1, keepdims=True)


def optimum(clean: np.ndarray, l1_budget: float) -> np.ndarray:
    """(n,) the least cost of each row: independent programs, many of them handed to HiGHS at once."""
    found = []
    for rows in np.array_split(clean, max(1, clean.size // 400)):
        n, classes = rows.shape
        eye, ones = sparse.identity(classes), np.ones((1, classes))
        below, bounds = [], []
        for row in rows:  # the variables are the answer and, above it, how far each entry moves
            label = row.argmax()
            ahead = np.delete(np.eye(classes), label, axis=0)
            ahead[:, label] -= 1
            below.append(sparse.bmat([[eye, -eye], [-eye, -eye], [None, ones], [sparse.csr_matrix(ahead), None]]))
            bounds += [row, -row, [l1_budget], np.full(classes - 1, -MARGIN)]
        cost = np.log(rows + FLOOR)
        solved = linprog(
            np.concatenate([cost, np.zeros_like(cost)], axis=1).ravel(),
            A_ub=sparse.block_diag(below, format="csr"),
            b_ub=np.concatenate(bounds),
            A_eq=sparse.block_diag([np.concatenate([ones, 0 * ones], axis=1)] * n, format="csr"),
            b_eq=np.ones(n),
            bounds=(0, None),
            method="highs",
        )
        assert solved.status == 0
        found.append((solved.x.reshape(n, 2, classes)[:, 0] * cost).sum(axis=1))
    return np.concatenate(found)


@pytest.mark.parametrize(("classes", "rows"), [(2, 30), (3, 40), (10, 50), (100, 10)])
@pytest.mark.parametrize("l1_budget", [0.05, 0.4, 1.0, 1.6])
def test_modelguard_w_is_the_optimum_of_its_linear_program(classes: int, rows: int, l1_budget: float) -> None:
    clean = degenerate_and_random(classes, rows)
    answers = ModelGuardW(l1_budget).transform(torch.from_numpy(clean), None).numpy()
    picked = np.arange(len(clean)), clean.argmax(axis=1)
    assert answers.min() >= 0
    np.testing.assert_allclose(answers.sum(axis=1), 1, atol=1e-12)
    assert np.abs(answers - clean).sum(axis=1).max() <= l1_budget + 1e-12
    others = answers.copy()
    others[picked] = -1
    assert (answers[picked] - others.max(axis=1)).min() >= MARGIN - 1e-12
    cost = (answers * np.log(clean + FLOOR)).sum(axis=1)
    np.testing.assert_allclose(cost, optimum(clean, l1_budget), atol=1e-6)


@pytest.mark.parametrize(
    ("l1_budget", "clean", "expected"),
    [
        (0.2, [0.6, 0.3, 0.1], [0.5, 0.3, 0.2]),
        (1.0, [0.9, 0.1], [0.50005, 0.49995]),
        (1.0, [1.0, 0.0, 0.0], [0.5, 0.4999, 0.0001]),
        (0.4, [0.0, 0.0, 0.0, 1.0], [0.2, 0.0, 0.0, 0.8]),
        # The runner-up gives too where the label's lead is used up: both lose 0.05 + 0.00005 - 0.05 …
        (0.2, [0.45, 0.45, 0.1], [0.40005, 0.39995, 0.2]),
        # It pays to raise the label: that lets the cheap class rise as well, at the cost of the runner-up.
        (2.0, [0.36, 0.34, 0.30], [0.50005, 0.0, 0.49995]),
    ],
)
def test_modelguard_w_by_hand(l1_budget: float, clean: list[float], expected: list[float]) -> None:
    got = perturbed(ModelGuardW(l1_budget), Answers(np.array([clean], np.float32))).posteriors[0]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_modelguard_w_returns_the_clean_answer_where_nothing_else_is_allowed() -> None:
    clean = Answers(np.array([[0.2, 0.4, 0.4], [0.25, 0.34, 0.41], [1 / 3, 1 / 3, 1 / 3]], np.float32))
    answers = perturbed(ModelGuardW(0.04, margin=0.1), clean)
    np.testing.assert_array_equal(answers.posteriors[[0, 2]], clean.posteriors[[0, 2]])
    np.testing.assert_allclose(answers.posteriors[1], [0.26, 0.32, 0.42], atol=1e-6)  # just reaches it


@pytest.mark.parametrize("classes", [3, 10])
@pytest.mark.parametrize("l1_budget", [0.2, 1.0])
def test_modelguard_w_has_the_derivative_of_the_optimum(classes: int, l1_budget: float) -> None:
    random = np.random.default_rng(0)
    clean = torch.from_numpy(0.9 * random.dirichlet(np.full(classes, 0.5), size=200) + 0.1 / classes)
    defense, weights = ModelGuardW(l1_budget), torch.from_numpy(random.normal(size=classes))
    along = torch.from_numpy(random.normal(size=clean.shape))
    along -= along.mean(dim=1, keepdim=True)
    rows = clean.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((defense.transform(rows, None) @ weights).sum(), rows)
    step = 1e-7
    ahead, behind = (defense.transform(clean + sign * step * along, None) @ weights for sign in (1, -1))
    difference = (ahead - behind) / (2 * step)
    assert difference.abs().max() > 0.1
    torch.testing.assert_close((gradient * along).sum(dim=1), difference, atol=1e-6, rtol=0)


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_modelguard_w_keeps_its_claims_when_rounded(classes: int) -> None:
    clean = Answers(posteriors(classes))
    for l1_budget in (0.05, 1.0):
        answers = perturbed(ModelGuardW(l1_budget), clean).posteriors.astype(np.float64)
        assert np.abs(answers - clean.posteriors).sum(axis=1).max() <= l1_budget + 2e-7
        first, second = np.sort(answers, axis=1)[:, :-3:-1].T
        assert (first - second).min() >= MARGIN - 1e-7


def one_by_one(clean: np.ndarray, l1_budget: float, nearest: bool) -> tuple[np.ndarray, np.ndarray]:
    """The answers, and the codewords in order: the definition."""
    books: dict[int, list[np.ndarray]] = {}
    answers, codewords = [], []
    for row in clean:
        book = books.setdefault(int(row.argmax()), [])
        away = [float(np.abs(codeword.astype(np.float64) - row).sum()) for codeword in book]
        near = [i for i, distance in enumerate(away) if distance <= l1_budget]
        if near:
            answers.append(book[min(near, key=lambda i: away[i]) if nearest else near[0]])
        else:
            book.append(row)
            codewords.append(row)
            answers.append(row)
    return np.array(answers), np.array(codewords)


def in_batches(defense: ModelGuardS, clean: np.ndarray, seed: int) -> np.ndarray:
    cuts = np.sort(np.random.default_rng(seed).integers(0, len(clean), 5))
    return np.concatenate([perturbed(defense, Answers(part)).posteriors for part in np.split(clean, cuts)])


@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize("l1_budget", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_modelguard_s_answers_one_row_at_a_time(classes: int, l1_budget: float, nearest: bool) -> None:
    clean = np.random.default_rng(0).permutation(posteriors(classes, rows=100))
    answers, codewords = one_by_one(clean, l1_budget, nearest)
    for seed in range(2):
        defense = ModelGuardS(l1_budget, nearest)
        np.testing.assert_array_equal(in_batches(defense, clean, seed), answers)
        np.testing.assert_array_equal(defense.state()["codewords"], codewords)
        assert np.abs(answers.astype(np.float64) - clean).sum(axis=1).max() <= l1_budget


def test_modelguard_s_depends_on_the_order_of_asking_but_repeats_itself() -> None:
    clean = posteriors(10)
    forwards, backwards = ModelGuardS(), ModelGuardS()
    one = perturbed(forwards, Answers(clean)).posteriors
    other = perturbed(backwards, Answers(clean[::-1])).posteriors[::-1]
    assert (one != other).any()
    np.testing.assert_array_equal(perturbed(forwards, Answers(clean), repeat=1).posteriors, one)


def test_modelguard_s_goes_on_where_its_state_was_taken() -> None:
    clean = posteriors(10)
    before, after = clean[:150], clean[150:]
    defense, other = ModelGuardS(0.3), ModelGuardS(0.3)
    perturbed(defense, Answers(before))
    state = defense.state()
    expected = perturbed(defense, Answers(after)).posteriors
    assert len(state["codewords"]) < len(defense.state()["codewords"])  # what was taken stays as it was
    other.restore(state)
    np.testing.assert_array_equal(perturbed(other, Answers(after)).posteriors, expected)
    other.restore(ModelGuardS().state())
    np.testing.assert_array_equal(other.transform(torch.from_numpy(clean), None).numpy(), clean)


def test_the_codebook_of_modelguard_s_can_be_rebuilt_from_its_answers() -> None:
    clean = np.random.default_rng(0).permutation(posteriors(10))
    defense, rebuilt = ModelGuardS(0.5), ModelGuardS(0.5)
    answers = perturbed(defense, Answers(clean)).posteriors
    _, first = np.unique(answers, axis=0, return_index=True)
    rebuilt.restore({"codewords": answers[np.sort(first)]})
    np.testing.assert_array_equal(rebuilt.state()["codewords"], defense.state()["codewords"])
    students = torch.from_numpy(np.random.default_rng(1).dirichlet(np.ones(10), size=300))
    torch.testing.assert_close(rebuilt.transform(students, None), defense.transform(students, None))
    assert (rebuilt.transform(students, None) != students).any()


def test_modelguard_s_may_be_stacked() -> None:
    clean = Answers(posteriors(10))
    alone = perturbed(ModelGuardS(), clean)
    for second in (Rounding(1), ModelGuardW(0.5)):
        stacked = perturbed(Chain([ModelGuardS(), second]), clean)
        np.testing.assert_array_equal(stacked.posteriors, perturbed(second, alone).posteriors)
        np.testing.assert_array_equal(stacked.labels, clean.labels)
