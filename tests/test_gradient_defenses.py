"""MAD, MAD-argmax and GRAD²: against brute force, autograd and a linear program, and with surrogates that are real."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from scipy.optimize import linprog
from test_defenses import posteriors
from toys import SPEC, ToyTeacher, tables

from distill import contracts
from distill.config import CONFIG_DIR, build
from distill.errors import DistillError
from distill.provider.defenses import mad_argmax
from distill.provider.defenses._surrogate import AlongOnes
from distill.provider.defenses.grad2 import GRAD2
from distill.provider.defenses.mad import MAD, cosine, parts
from distill.provider.defenses.mad_argmax import MADArgmax
from distill.randomness import KeyedRandom
from distill.records import Answers, Dataset, Examples, Reveals, content_keys, softmax
from distill.students.mlp import MLP
from distill.training import Recipe, Trainer

KINDS = [MAD, MADArgmax, GRAD2]
CLASSES = 4


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(kind: type, l1_budget: float = 1.0, **options: object) -> MAD | GRAD2:
    return kind(MLP((16,)), Recipe(epochs=10, batch_size=32, lr=1e-2), l1_budget=l1_budget, **options)


def answered(defense: MAD | GRAD2, clean: np.ndarray, info: np.ndarray) -> np.ndarray:
    rng = KeyedRandom(0, content_keys(clean), np.zeros(len(clean), np.int64))
    return defense.perturb(Answers(clean), info, rng).posteriors


def pairs(classes: int, rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Flat and peaked answers, beside surrogates from random ones (nearly constant) to trained ones (peaked)."""
    random = np.random.default_rng(seed)
    answers = [random.dirichlet(np.full(classes, alpha), rows // 6) for alpha in (1.0, 0.1) for _ in range(3)]
    surrogates = [random.dirichlet(np.full(classes, alpha), rows // 6) for _ in range(2) for alpha in (100, 1, 0.2)]
    return np.concatenate(answers).astype(np.float32), np.concatenate(surrogates).astype(np.float32)


def angles(candidates: np.ndarray, y: np.ndarray, p: np.ndarray) -> np.ndarray:
    """The cosine for each candidate answer, as the equations have it: from the vectors themselves, in one row.

    A candidate within 1e-6 of p has no direction: infinity.
    """
    candidates, y, p = (np.asarray(values, np.float64) for values in (candidates, y, p))
    away = np.linalg.norm(candidates - p, axis=1)
    cosines = (candidates - p) @ (y - p) / np.maximum(away, 1e-6) / np.linalg.norm(y - p)
    return np.where(away > 1e-6, cosines, np.inf)


def uniform_sets(classes: int, label: int) -> np.ndarray:
    others = [k for k in range(classes) if k != label]
    sets = [(label, *more) for size in range(classes) for more in combinations(others, size)]
    vectors = np.zeros((len(sets), classes))
    for vector, members in zip(vectors, sets, strict=True):
        vector[list(members)] = 1 / len(members)
    return vectors


def vertices(kind: type, clean: np.ndarray, info: np.ndarray) -> np.ndarray:
    """Where a defense would go without a budget, the tie-break taken off."""
    far = answered(made(kind, l1_budget=2.0), clean, info) > 1e-7
    return far / far.sum(axis=1, keepdims=True)


# --- MAD and MAD-argmax ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 6, 10])
def test_mad_goes_to_the_best_vertex(classes: int) -> None:
    clean, info = pairs(classes, 3000)
    for vertex, y, p in zip(vertices(MAD, clean, info), clean, info, strict=True):
        assert angles(vertex[None], y, p)[0] <= angles(np.eye(classes), y, p).min() + 1e-7


@pytest.mark.parametrize("classes", [2, 3, 6, 10])
def test_mad_argmax_goes_to_the_best_set(classes: int) -> None:
    clean, info = pairs(classes, 1200 if classes == 10 else 3000)
    sets = [uniform_sets(classes, label) for label in range(classes)]
    for vertex, y, p in zip(vertices(MADArgmax, clean, info), clean, info, strict=True):
        assert angles(vertex[None], y, p)[0] <= angles(sets[y.argmax()], y, p).min() + 1e-7


def test_growing_a_set_comes_close_to_the_best_one() -> None:
    clean, info = pairs(12, 1200)
    sets = [uniform_sets(12, label) for label in range(12)]
    grown = vertices(MADArgmax, clean, info)
    rows = list(zip(grown, clean, info, strict=True))
    gaps = np.array([angles(v[None], y, p)[0] - angles(sets[y.argmax()], y, p).min() for v, y, p in rows])
    assert gaps.min() > -1e-7
    assert (gaps < 1e-7).mean() > 0.9
    assert gaps.mean() < 1e-3
    assert gaps.max() < 0.05


def test_growing_finds_what_enumerating_finds_where_there_is_little_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    clean, info = pairs(3, 600)
    exact = vertices(MADArgmax, clean, info)
    monkeypatch.setattr(mad_argmax, "EXACT", 2)
    np.testing.assert_array_equal(vertices(MADArgmax, clean, info), exact)


def test_the_closed_form_is_the_angle_between_gradients() -> None:
    """The Jacobian of a real network's log-posteriors in its last layer's weights, by autograd."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 7, generator=generator, dtype=torch.float64).tanh()
    weights = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    p = (hidden @ weights.T).softmax(dim=1)
    y = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(5), 20))
    far = {kind: answered(made(kind, 2.0), y.float().numpy(), p.float().numpy()) for kind in (MAD, MADArgmax)}
    along, squared = parts(y, p)
    for row in range(len(y)):

        def log_posterior(w: torch.Tensor, h: torch.Tensor = hidden[row]) -> torch.Tensor:
            return (w @ h).log_softmax(dim=0)

        jacobian = torch.autograd.functional.jacobian(log_posterior, weights).flatten(1)
        clean = torch.nn.functional.normalize(y[row] @ jacobian, dim=0)
        for kind, candidates in ((MAD, np.eye(5)), (MADArgmax, uniform_sets(5, int(y[row].argmax())))):
            gradients = torch.nn.functional.normalize(torch.from_numpy(candidates) @ jacobian, dim=1)
            turned = (gradients - clean).square().sum(dim=1)  # what the paper maximises
            members = torch.from_numpy(candidates > 0)
            score = cosine(
                torch.stack([along[row][some].sum() for some in members]),
                torch.stack([1 + squared[row][some].sum() for some in members]),
                members.sum(dim=1),
            )
            cosines = score.sign() * score.abs().sqrt() / (y[row] - p[row]).norm()
            torch.testing.assert_close(2 - 2 * cosines, turned, rtol=0, atol=1e-6)
            chosen = torch.from_numpy(far[kind][row]).double() @ jacobian
            chosen = (torch.nn.functional.normalize(chosen, dim=0) - clean).square().sum()
            assert chosen >= turned.max() - 1e-4, "the tie-break of 1e-5 is all that is lost"


@pytest.mark.parametrize("kind", [MAD, MADArgmax])
def test_mad_moves_towards_the_vertex_as_far_as_the_budget_allows(kind: type) -> None:
    clean, info = pairs(6, 600)
    far = answered(made(kind, 2.0), clean, info).astype(np.float64)
    distance = np.abs(far - clean).sum(axis=1, keepdims=True)
    for budget in (0.1, 0.7, 1.5):
        share = np.minimum(1, budget / np.maximum(distance, 1e-12))
        expected = (1 - share) * clean + share * far
        np.testing.assert_allclose(answered(made(kind, budget), clean, info), expected, atol=1e-6)


def test_hand_computed_values() -> None:
    p = np.full((1, 4), 0.25, np.float32)
    y = np.array([[0.7, 0.1, 0.1, 0.1]], np.float32)
    # All wrong classes are as far; half of the L1 distance of 1.8 to the first of them.
    np.testing.assert_allclose(answered(made(MAD, 0.9), y, p), [[0.35, 0.55, 0.05, 0.05]], atol=1e-6)
    # With a uniform p every set with the label agrees with y; the largest proper one does so least.
    np.testing.assert_allclose(answered(made(MADArgmax, 2.0), y, p)[0].tolist()[0], 1 / 3, atol=1e-5)
    s = np.array([[3.0, -1.0, 2.0, 0.0]], np.float32)
    y = np.array([[0.1, 0.2, 0.3, 0.4]], np.float32)
    np.testing.assert_allclose(answered(made(GRAD2, 1.0), y, s), [[0.6, 0, 0.3, 0.1]], atol=1e-6)
    np.testing.assert_allclose(answered(made(GRAD2, 0.2), y, s), [[0.2, 0.1, 0.3, 0.4]], atol=1e-6)
    np.testing.assert_allclose(answered(made(GRAD2, 2.0), y, s), [[1, 0, 0, 0]], atol=1e-6)


# --- GRAD² ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
@pytest.mark.parametrize("budget", [0.1, 1.0, 2.0])
def test_grad2_solves_its_linear_program(classes: int, budget: float) -> None:
    """Variables: the answer, and for each class a bound on how far it moves."""
    every = posteriors(classes, rows=20)
    clean = every[np.random.default_rng(0).permutation(len(every))[: 10 if classes == 100 else 60]]
    s = np.random.default_rng(1).normal(size=clean.shape).round(1).astype(np.float32)  # with ties
    answers = answered(made(GRAD2, budget), clean, s).astype(np.float64)
    eye, row = np.eye(classes), np.r_[np.zeros(classes), np.ones(classes)][None]
    for y, score, answer in zip(clean.astype(np.float64), s.astype(np.float64), answers, strict=True):
        best = linprog(
            np.r_[-score, np.zeros(classes)],
            A_ub=np.r_[np.c_[eye, -eye], np.c_[-eye, -eye], row],
            b_ub=np.r_[y, -y, budget],
            A_eq=1 - row,
            b_eq=[y.sum()],
            method="highs",
        )
        assert score @ answer == pytest.approx(-best.fun, abs=1e-6)


def network(seed: int = 0) -> torch.nn.Module:
    return Trainer(progress=False).build(MLP((16, 8)), SPEC, CLASSES, seed).eval()


def test_the_derivative_along_ones_is_what_slower_ways_find() -> None:
    module, inputs = network(), torch.from_numpy(tables(30))
    fast = Trainer(progress=False).predict(AlongOnes(module), MLP().encode(inputs.numpy(), SPEC))
    module, inputs = module.double(), inputs.double()
    derivative = AlongOnes(module)(inputs=inputs).detach()

    weights = list(module.parameters())
    answer = torch.zeros(len(inputs), CLASSES, dtype=torch.float64, requires_grad=True)
    total = (answer * module(inputs).log_softmax(dim=1)).sum()  # the gradient of row i is linear in its answer
    gradients = torch.autograd.grad(total, weights, create_graph=True)
    twice = torch.autograd.grad(sum(gradient.sum() for gradient in gradients), answer)[0]
    torch.testing.assert_close(derivative, twice, rtol=0, atol=1e-6)

    with torch.no_grad():
        sides = []
        for step in (1e-6, -2e-6):
            for weight in weights:
                weight.add_(step)
            sides.append(module(inputs).log_softmax(dim=1))
    torch.testing.assert_close(derivative, (sides[0] - sides[1]) / 2e-6, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(fast, derivative.numpy(), rtol=1e-5, atol=1e-5 * float(derivative.abs().max()))


def test_grad2_pushes_the_weights_up() -> None:
    """The sign: one step of gradient descent on the attacker's loss moves its weights along +v, and further than the
    step that the clean answers would have made."""
    module, inputs = network(), torch.from_numpy(tables(50))
    clean = np.random.default_rng(0).dirichlet(np.ones(CLASSES), 50).astype(np.float32)
    s = Trainer(progress=False).predict(AlongOnes(module), MLP().encode(inputs.numpy(), SPEC))

    def along(answers: np.ndarray) -> float:
        loss = torch.nn.functional.cross_entropy(module(inputs), torch.from_numpy(answers), reduction="sum")
        return -sum(float(gradient.sum()) for gradient in torch.autograd.grad(loss, list(module.parameters())))

    returned = answered(made(GRAD2), clean, s)
    assert along(returned) == pytest.approx(float((s.astype(np.float64) * returned).sum()), rel=1e-4)
    assert along(returned) > max(along(clean), 0)


# --- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [2, 3, 10, 12, 100])
def test_claims_hold_on_degenerate_rows(kind: type, classes: int) -> None:
    """Whatever the surrogate says: the clean answer itself, a vertex, nothing at all, anything."""
    clean = posteriors(classes, rows=40)
    random = np.random.default_rng(classes).dirichlet(np.full(classes, 0.5), len(clean)).astype(np.float32)
    label = np.eye(classes, dtype=np.float32)[clean.argmax(axis=1)]
    for info in (clean, label, np.roll(label, 1, axis=1), np.full_like(clean, 1 / classes), random):
        for budget in (1e-3, 1.0, 2.0):
            defense = made(kind, budget)
            returned = answered(defense, clean, info)
            assert returned.dtype == np.float32
            assert np.isfinite(returned).all()
            assert (returned >= 0).all()
            np.testing.assert_allclose(returned.sum(axis=1, dtype=np.float64), 1, atol=1e-6)
            moved = np.abs(returned.astype(np.float64) - clean).sum(axis=1)
            assert moved.max() <= budget + 5e-7  # float32
            if defense.keeps_argmax:
                np.testing.assert_array_equal(returned.argmax(axis=1), clean.argmax(axis=1))
        for row in range(0, len(clean), len(clean) // 5):
            part = slice(row, row + 1 + row % 3)
            np.testing.assert_array_equal(answered(defense, clean[part], info[part]), returned[part])


@pytest.mark.parametrize("kind", KINDS)
def test_the_formula_is_differentiable(kind: type) -> None:
    """Where the choice among candidates is fixed: against finite differences."""
    clean, info = (torch.from_numpy(values[:12]).double() for values in pairs(5, 60))
    clean = clean.requires_grad_()
    assert torch.autograd.gradcheck(lambda y: made(kind, 0.3).transform(y, info), (clean,), eps=1e-9, atol=1e-4)
    edges = torch.cat([torch.eye(5), torch.full((1, 5), 0.2)]).double().requires_grad_()
    made(kind).transform(edges, edges.detach()).square().sum().backward()
    assert torch.isfinite(edges.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_that_is_none_is_refused(kind: type) -> None:
    for budget in (0.0, -1.0, 2.5, float("nan")):
        with pytest.raises(DistillError, match=r"defense\.l1_budget: must be more than 0 and at most 2"):
            made(kind, budget)


def toy_data(rows: int = 400) -> Dataset:
    examples = Examples(tables(rows), SPEC, None, tuple("abcd"), "toy")
    return Dataset("toy", SPEC, tuple("abcd"), examples, examples.take(np.arange(50)), examples.take(np.arange(0)))


@pytest.mark.parametrize("kind", KINDS)
def test_surrogates_are_made_once_and_imitate_the_teacher(kind: type, tmp_path: Path) -> None:
    trainer, data = Trainer(progress=False), toy_data()
    inputs = tables(300, seed=1)
    options: dict = {} if kind is GRAD2 else {"trained": True}
    info, fingerprints = [], []
    for output, seed, new in ((Reveals.LOGITS, 0, True), (Reveals.LOGITS, 0, False), (Reveals.PROBS, 1, True)):
        defense, teacher = made(kind, **options), ToyTeacher(CLASSES, output)
        assert isinstance(defense, contracts.NetworkDefense)
        assert isinstance(defense, contracts.TensorDefense)
        assert defense.prepare(teacher, data, trainer, tmp_path, seed) is teacher
        assert teacher.forwards == (len(data.train) if new else 0), "it is asked about each input once, ever"
        info.append(defense.query_info(inputs))
        fingerprints.append(defense.fingerprint)
        surrogate = defense._surrogate.predict(inputs).argmax(axis=1)
        assert (surrogate == teacher.predict(inputs).argmax(axis=1)).mean() > 0.85
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    np.testing.assert_array_equal(info[0], info[1])
    assert len(list(tmp_path.glob("networks/*/model.safetensors"))) == 2
    cut = np.concatenate([defense.query_info(inputs[i : i + 7]) for i in range(0, 300, 7)])
    np.testing.assert_allclose(cut, info[2], rtol=1e-5, atol=1e-5)
    if kind is not GRAD2:
        np.testing.assert_array_equal(info[2], softmax(defense._surrogate.predict(inputs)))


@pytest.mark.parametrize("kind", [MAD, MADArgmax])
def test_an_untrained_surrogate_asks_the_teacher_nothing(kind: type, tmp_path: Path) -> None:
    trainer, data = Trainer(progress=False), toy_data()
    infos = []
    for seed in (0, 0, 1):
        defense, teacher = made(kind), ToyTeacher(CLASSES)
        defense.prepare(teacher, data, trainer, tmp_path, seed)
        assert teacher.forwards == 0
        infos.append(defense.query_info(tables(50)))
    np.testing.assert_array_equal(infos[0], infos[1])
    assert np.abs(infos[0] - infos[2]).max() > 1e-3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mad", "mad_argmax", "grad2"])
def test_options_are_composed(name: str) -> None:
    overrides = ["+experiment=quickstart", f"defense={name}", "student@defense.architecture=mlp"]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        config = compose("train", overrides=overrides)
    defense = build(config.defense, "defense")
    assert defense.recipe.epochs == (10 if name == "grad2" else 20)
    assert isinstance(defense.architecture, MLP)
    assert defense.l1_budget == 1.0
    config.defense.l1_budget = 3
    with pytest.raises(DistillError, match="at most 2"):
        build(config.defense, "defense")
