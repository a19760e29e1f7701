"""Attacks that make rows of tables: drawn, bisected, solved for; and the tree that one of them finds the leaves of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attack_toys import CLASSES, NAMES, TABLE, ToyTeacherOf, a_labelled_pool, an_apprentice, extracted
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import FEATURES

from distill.attacks._made import bisect, halvings
from distill.attacks.boundary_bisection import BoundaryBisection
from distill.attacks.equation_solving import EquationSolving, LinearModel, solved
from distill.attacks.marginals import Marginals
from distill.attacks.tree_paths import TreePaths
from distill.attacks.uniform_table import UniformTable
from distill.errors import DistillError
from distill.experiment import check_profile
from distill.provider.defenses.none import NoDefense
from distill.provider.defenses.rounding import Rounding
from distill.provider.oracle import serve
from distill.provider.provider import Provider
from distill.provider.teachers.tree import Tree
from distill.records import (
    Answers,
    Budget,
    Cost,
    Dataset,
    Examples,
    InputSpec,
    InterfaceProfile,
    Queries,
    Reveals,
    one_hot,
    softmax,
)
from distill.training import Trainer

ATTACKS: dict[str, Callable[[], Any]] = {
    "uniform_table": UniformTable,
    "marginals": Marginals,
    "boundary_bisection": lambda: BoundaryBisection(tolerance=0.2, pairs=3),
    "equation_solving": EquationSolving,
    "tree_paths": lambda: TreePaths(tolerance=0.2, rows_at_once=3),
}
POOL = a_labelled_pool("table", 30)
PROBS, LOGITS = InterfaceProfile(Reveals.PROBS), InterfaceProfile(Reveals.LOGITS)


@pytest.mark.parametrize("option", ATTACKS)
@settings(max_examples=8, deadline=None)
@given(queries=st.sampled_from([1, 2, CLASSES, 6, 7, 8, 11, 12, 13, 29, 30, 31, 64, 100]), seed=st.integers(0, 3))
def test_budgets_are_exact_and_seeds_reproduce(
    option: str, queries: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("p")
    if option == "equation_solving" and queries <= FEATURES:
        with pytest.raises(DistillError, match=f"^budget: pays for {queries} answers, but 6 columns take at least 7"):
            extracted(ATTACKS[option](), folder, "table", queries, POOL)
        assert not (folder / "provider_log").exists(), "it was refused before anything was asked"
        return
    asked, provider, _ = extracted(ATTACKS[option](), folder / "1", "table", queries, POOL, seed)
    assert len(asked) == provider.cost().queries == queries
    again, *_ = extracted(ATTACKS[option](), folder / "2", "table", queries, POOL, seed)
    other, *_ = extracted(ATTACKS[option](), folder / "3", "table", queries, POOL, seed + 1)
    np.testing.assert_array_equal(asked.inputs(POOL)[:], again.inputs(POOL)[:])
    np.testing.assert_array_equal(asked.posteriors, again.posteriors)
    assert queries < 6 or (asked.inputs(POOL)[:] != other.inputs(POOL)[:]).any()
    told = ToyTeacherOf("table").predict(asked.inputs(POOL)[:])
    np.testing.assert_allclose(asked.posteriors, softmax(told), atol=1e-6)


@pytest.mark.parametrize("option", ["equation_solving", "tree_paths"])
def test_what_reads_probabilities_is_refused_labels(option: str) -> None:
    choices = {"attack": option, "defense": "none", "access": "label"}
    with pytest.raises(DistillError, match=rf"attack: {option} requires probs, but .* reveals label only"):
        check_profile("attack", ATTACKS[option](), choices, InterfaceProfile(Reveals.LABEL))


@pytest.mark.parametrize(
    ("option", "kind", "options"),
    [
        ("feature_range", UniformTable, {"feature_range": [1, 1]}),
        ("seed_share", BoundaryBisection, {"seed_share": 1.0}),
        ("tolerance", BoundaryBisection, {"tolerance": 0.0}),
        ("pairs", BoundaryBisection, {"pairs": 0}),
        ("spread", EquationSolving, {"spread": 0.0}),
        ("tolerance", TreePaths, {"tolerance": 1.0}),
        ("rows_at_once", TreePaths, {"rows_at_once": 0}),
        ("max_depth", Tree, {"max_depth": 0}),
        ("min_samples_leaf", Tree, {"min_samples_leaf": 0}),
    ],
)
def test_options_out_of_range(option: str, kind: type, options: dict[str, Any]) -> None:
    with pytest.raises(DistillError, match=f"^{option} "):
        kind(**options)


# --- drawn ----------------------------------------------------------------------------------------------------------


def test_uniform_rows_fill_the_ranges_that_are_known(tmp_path: Path) -> None:
    made = extracted(UniformTable(), tmp_path / "pool", "table", 2000, POOL)[0].made
    assert made is not None
    assert made.dtype == np.float32
    low, high = POOL.inputs[:].min(axis=0), POOL.inputs[:].max(axis=0)
    assert ((made >= low) & (made <= high)).all()
    shares = (made - low) / (high - low)
    counts = np.stack([np.histogram(column, 10, (0, 1))[0] for column in shares.T])
    assert ((counts - 200) ** 2 / 200).sum(axis=1).max() < 30, "chi-squared of 9 degrees: 30 is its 0.9996 quantile"
    made = extracted(UniformTable([2, 3]), tmp_path / "stated", "table", 200, POOL)[0].made
    assert made is not None
    assert 2 <= made.min() < 2.1
    assert 2.9 < made.max() <= 3


def test_marginals_keep_each_columns_values_and_break_what_goes_together(tmp_path: Path) -> None:
    column = np.arange(30, dtype=np.float32)
    pool = Examples(np.stack([column, 100 + column, *[column] * 3, column % 2], axis=1), TABLE)
    made = extracted(Marginals(), tmp_path, "table", 3000, pool)[0].made
    assert made is not None
    for values, own in zip(made.T, pool.inputs[:].T, strict=True):
        assert set(values.tolist()) == set(own.tolist())
    assert abs(np.corrcoef(made[:, 0], made[:, 1])[0, 1]) < 0.08
    assert abs(made[:, 5].mean() - 0.5) < 0.05, "as often as in the pool"


@pytest.mark.parametrize("option", ["uniform_table", "marginals", "equation_solving"])
def test_a_smaller_budget_asks_the_first_rows_of_a_larger_one(option: str, tmp_path: Path) -> None:
    few, many = (extracted(ATTACKS[option](), tmp_path / str(n), "table", n, POOL)[0].made for n in (20, 40))
    assert few is not None
    assert many is not None
    np.testing.assert_array_equal(few, many[:20])


# --- bisected -------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), tolerance=st.floats(1e-4, 0.9))
def test_bisection_ends_within_its_tolerance_of_the_boundary(seed: int, tolerance: float) -> None:
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=3)
    low, high = rng.normal(size=(2, 200, 3)).astype(np.float32)
    apart = (low @ normal > 0) != (high @ normal > 0)
    low, high = low[apart], high[apart]
    side = low @ normal > 0
    one, other = bisect(lambda middles: (middles @ normal > 0) == side, low, high, halvings(tolerance))
    assert ((one @ normal > 0) != (other @ normal > 0)).all(), "the ends are still told apart"
    length = np.linalg.norm(high - low, axis=1)
    assert (np.linalg.norm(other - one, axis=1) <= tolerance * length + 1e-5).all()


def test_bisection_stops_where_the_answers_do() -> None:
    low, high = np.zeros((4, 1), np.float32), np.ones((4, 1), np.float32)
    calls = []

    def as_low(middles: np.ndarray) -> np.ndarray:
        calls.append(len(middles))
        return np.full(2 if len(calls) == 2 else 4, True)

    one, other = bisect(as_low, low, high, 5)
    assert calls == [4, 4]
    np.testing.assert_array_equal(one[:, 0], [0.75, 0.75, 0.5, 0.5])
    np.testing.assert_array_equal(other[:, 0], 1)


def test_pairs_of_different_labels_are_bisected_to_the_boundary(tmp_path: Path) -> None:
    """Each pair's probes go from the middle to within 1/32 of a change of the label."""
    attack, pool = BoundaryBisection(seed_share=0.2, tolerance=1 / 32, pairs=4), a_labelled_pool("table", 100)
    access = InterfaceProfile(Reveals.LABEL)
    asked, provider, _ = extracted(attack, tmp_path, "table", 100, pool, access=access)
    assert provider.cost().queries == len(asked) == 100
    seeds = asked.rows[asked.rows >= 0]
    assert len(seeds) == len(set(seeds.tolist())) == 20
    assert (asked.rows[20:] < 0).all()
    assert asked.made is not None
    probes = asked.made.reshape(4, 5, 4, FEATURES)  # rounds, steps, pairs
    table, told = pool.inputs[seeds], ToyTeacherOf("table").predict(pool.inputs[seeds]).argmax(axis=1)
    for probe in probes.transpose(0, 2, 1, 3).reshape(16, 5, FEATURES):
        ends = [(i, j) for i in range(20) for j in range(20) if np.array_equal((table[i] + table[j]) / 2, probe[0])]
        assert len(ends) == 2, "the first probe is the middle of a pair of rows"
        assert told[ends[0][0]] != told[ends[0][1]]
        one, other = table[ends[0][0]], table[ends[0][1]]
        along = np.linspace(0, 1, 3201)
        labels = ToyTeacherOf("table").predict(
            (one + along[:, None] * (other - one)).astype(np.float32)
        ).argmax(axis=1)  # fmt: skip
        changes = along[:-1][labels[1:] != labels[:-1]]
        at = (probe[-1] - one) @ (other - one) / np.sum((other - one) ** 2)
        assert np.abs(changes - at).min() <= 1 / 32 + 1 / 3200


def test_where_all_rows_have_one_label_the_pool_is_all_that_is_asked(tmp_path: Path) -> None:
    pool = Examples(np.tile(POOL.inputs[:1], (9, 1)), TABLE)
    asked, provider, _ = extracted(BoundaryBisection(), tmp_path, "table", 20, pool)
    assert provider.cost().queries == len(asked) == 9
    assert sorted(asked.rows.tolist()) == list(range(9))


# --- solved ---------------------------------------------------------------------------------------------------------


class ExactOracle:
    """Answers of a logistic model in float64, without a provider."""

    profile = PROBS

    def __init__(self, weights: np.ndarray, bias: np.ndarray, budget: int) -> None:
        self.weights, self.bias, self.left, self.classes = weights, bias, budget, len(bias)

    def affordable(self) -> int:
        return self.left

    def ask(self, queries: Queries, *, partial: bool = False) -> Answers:
        logits = queries.inputs().astype(np.float64) @ self.weights + self.bias
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        self.left -= len(logits)
        return Answers(exponents / exponents.sum(axis=1, keepdims=True))

    def spent(self) -> Cost:
        return Cost(0)


def error(model: LinearModel, weights: np.ndarray, bias: np.ndarray | float = 0.0) -> float:
    """The largest error of weights and bias in units of the queries' reach, over the largest of them."""
    true = np.vstack([weights * model.reach[:, None], model.centre @ weights + bias])
    true -= true.mean(axis=1, keepdims=True)
    return float(np.abs(np.vstack([model.weights, model.bias]) - true).max() / np.abs(true).max())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    columns=st.integers(1, 12),
    classes=st.integers(2, 9),
    scale=st.sampled_from([0.01, 1.0, 300.0]),
)
def test_equations_give_the_weights_of_a_logistic_teacher(seed: int, columns: int, classes: int, scale: float) -> None:
    """From d + 1 exact answers, for any number of classes and any scale of the columns."""
    rng = np.random.default_rng(seed)
    weights, bias = rng.normal(size=(columns, classes)) / scale, rng.normal(size=classes)
    spec = InputSpec("table", (columns,))
    table = (scale * rng.normal(size=(20, columns))).astype(np.float32)
    if scale >= 1:
        table[:, 0] = scale  # a constant column
    student = an_apprentice("table")
    for budget in (columns + 1, classes * (columns + 1)):
        oracle: Any = ExactOracle(weights, bias, budget)
        EquationSolving().extract(oracle, Examples(table, spec), student, seed)
        model = student.shown[-1][1]
        assert isinstance(model, LinearModel)
        assert student.shown[-1][0] == budget
        assert oracle.left == 0
        assert error(model, weights, bias) < 1e-9


@pytest.mark.parametrize("access", [PROBS, LOGITS], ids=str)
@pytest.mark.parametrize("budget", [FEATURES + 1, CLASSES * (FEATURES + 1), 500])
def test_equations_give_the_weights_through_float32_answers(
    access: InterfaceProfile, budget: int, tmp_path: Path
) -> None:
    """8e-8 was measured with d + 1 queries, 7e-9 with 1,000."""
    asked, _, student = extracted(EquationSolving(), tmp_path, "table", budget, POOL, access=access)
    shown = [queries for queries, _ in student.shown]
    assert shown == sorted(set(shown))
    assert shown[0] == FEATURES + 1
    assert shown[-1] == budget
    assert len(shown) <= 5
    for _, model in student.shown:
        assert isinstance(model, LinearModel)
        assert error(model, ToyTeacherOf("table").weights) < 2e-7
    rows = a_labelled_pool("table", 500, seed=1).inputs[:]
    own, teacher = softmax(student.shown[-1][1].predict(rows)), softmax(ToyTeacherOf("table").predict(rows))
    np.testing.assert_allclose(own, teacher, atol=2e-6)
    residual = float(asked.note.split("residual ")[1].split()[0])
    assert residual < 1e-6


def test_the_queries_are_well_conditioned(tmp_path: Path) -> None:
    made = extracted(EquationSolving(), tmp_path, "table", 3 * (FEATURES + 1), POOL)[0].made
    assert made is not None
    low, high = POOL.inputs[:].min(axis=0), POOL.inputs[:].max(axis=0)
    assert ((made >= low - 1e-6) & (made <= high + 1e-6)).all()
    units = (made - (low + high) / 2) / ((high - low) / 2)
    for block in np.split(units, 3):
        assert np.linalg.cond(np.column_stack([np.ones(len(block)), block])) < 1.42
    assert np.unique(made, axis=0).shape == made.shape, "blocks differ"


def test_other_teachers_get_the_best_linear_answer_and_are_told(tmp_path: Path) -> None:
    asked, _, student = extracted(EquationSolving(), tmp_path, "table", 200, POOL, defense=Rounding(1))
    assert float(asked.note.split("residual ")[1].split()[0]) > 0.1
    assert np.isfinite(student.shown[-1][1].predict(POOL.inputs)).all()


def test_answers_that_vanish_are_left_out_where_others_remain() -> None:
    rng = np.random.default_rng(0)
    weights, inputs = 150 * rng.normal(size=(2, 3)), rng.uniform(-1, 1, size=(200, 2)).astype(np.float32)
    posteriors = softmax(inputs.astype(np.float64) @ weights)
    assert 3 < (posteriors > 2.0**-126).all(axis=1).sum() < 150
    model, residual = solved(inputs, Answers(posteriors), np.zeros(2), np.ones(2))
    assert error(model, weights) < 1e-7
    assert residual < 1e-6
    model, residual = solved(inputs, Answers(one_hot(posteriors.argmax(axis=1), 3)), np.zeros(2), np.ones(2))
    assert np.isfinite(model.weights).all()
    assert residual > 1


# --- leaves ---------------------------------------------------------------------------------------------------------


def a_tree(rows: int = 2000, seed: int = 0, **options: Any) -> tuple[Tree, Dataset]:
    """Grown on the toy teacher's labels."""
    train, held_out = a_labelled_pool("table", rows, seed), a_labelled_pool("table", 300, seed + 1)
    data = Dataset("toy", TABLE, NAMES, train, held_out, held_out)
    tree = Tree(**options)
    tree.prepare(data, Trainer(device="cpu", progress=False), Path("unused"))
    return tree, data


def paths(tree: Tree, data: Dataset, folder: Path, queries: int) -> tuple[Any, Any, Any]:
    student = an_apprentice("table")
    provider = Provider(
        *(tree, NoDefense()),
        spec=TABLE,
        classes=CLASSES,
        access=PROBS,
        usd_per_query=0.0,
        budget=Budget(queries=queries),
        seed=0,
        cache=folder / "cache",
        log=folder / "provider_log",
        defense_id="none",
    )
    with serve(provider) as oracle:
        asked = TreePaths(tolerance=1e-4).extract(oracle, data.held_out, student, 0)
    return asked, provider, student.shown


@pytest.mark.parametrize("seed", range(3))
def test_all_leaves_of_a_small_tree_are_found(seed: int, tmp_path: Path) -> None:
    tree, data = a_tree(seed=seed, max_depth=4)
    grown = tree._tree.tree_
    leaves = int((grown.children_left < 0).sum())
    assert len(np.unique(grown.value[grown.children_left < 0], axis=0)) == leaves, "posteriors tell leaves apart"
    asked, provider, shown = paths(tree, data, tmp_path, 5000)
    assert asked.note.startswith(f"TreePaths ({leaves} leaves)")
    assert provider.cost().queries == len(asked) < 5000, "it ends with the pool when nothing is left to explore"
    own = shown[-1][1]
    thresholds = np.unique(grown.threshold[grown.children_left >= 0])
    edges = np.concatenate([own.low[np.isfinite(own.low)], own.high[np.isfinite(own.high)]])
    width = np.ptp(data.held_out.inputs[:], axis=0).max()
    assert np.abs(thresholds[:, None] - edges).min(axis=1).max() <= 1e-4 * width, "each threshold is an edge"
    assert np.abs(thresholds[:, None] - edges).min(axis=0).max() <= 1e-4 * width, "each edge is a threshold"
    rows = a_labelled_pool("table", 4000, seed=9).inputs[:]
    same = np.abs(softmax(own.predict(rows)) - tree.predict(rows)).max(axis=1) < 1e-6
    assert same.mean() > 0.995, "but for rows that lie closer to an edge than it was found"


def test_leaves_that_could_not_be_told_apart_are_found_by_rows_of_the_pool(tmp_path: Path) -> None:
    """A tree that was grown to the end answers with certainties, the same in many leaves."""
    tree, data = a_tree(rows=150, max_depth=None, min_samples_leaf=1)
    asked, _, shown = paths(tree, data, tmp_path, 20_000)
    assert len(np.unique(asked.posteriors, axis=0)) == CLASSES
    rows = a_labelled_pool("table", 2000, seed=9).inputs[:]
    told = tree.predict(rows).argmax(axis=1)
    assert (shown[-1][1].predict(rows).argmax(axis=1) == told).mean() > 0.7 > np.bincount(told).max() / 2000 + 0.2


@pytest.mark.parametrize("queries", [1, 13, 40, 300])
def test_a_tree_search_that_runs_out_of_budget_stops_there(queries: int, tmp_path: Path) -> None:
    tree, data = a_tree(max_depth=6)
    asked, provider, shown = paths(tree, data, tmp_path, queries)
    assert provider.cost().queries == len(asked) == queries
    counts = [at for at, _ in shown]
    assert counts == sorted(set(counts))
    assert counts[-1] == queries
    assert len(counts) <= 10
    own = asked.inputs(data.held_out)[:][asked.rows >= 0]
    np.testing.assert_allclose(softmax(shown[-1][1].predict(own)), tree.predict(own), atol=1e-6)


def test_the_tree_teacher_is_the_same_each_time_and_knows_itself() -> None:
    (one, data), (other, _), (deeper, _) = a_tree(), a_tree(), a_tree(max_depth=9)
    assert one.fingerprint == other.fingerprint != deeper.fingerprint
    posteriors = one.predict(data.test.inputs[:])
    np.testing.assert_allclose(posteriors.sum(axis=1), 1, atol=1e-6)
    assert posteriors.dtype == np.float32
    assert (posteriors.argmax(axis=1) == data.test_labels).mean() > 0.6
    assert one.predict(data.test.inputs[:0]).shape == (0, CLASSES)
    assert one.parameters is not None
    assert one.parameters > 0
    assert (one.latency_s(data.test.inputs[:1]) or 0) > 0
    images = replace(data, name="digits", spec=InputSpec("image", (8, 8, 1)))
    with pytest.raises(DistillError, match="teacher: tree reads tables, and digits holds images"):
        one.prepare(images, Trainer(device="cpu", progress=False), Path("unused"))
