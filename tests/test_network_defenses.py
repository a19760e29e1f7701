"""The defenses that train networks: their losses against formulas, and what the trained networks do, on real digits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_defenses import posteriors

from distill.config import cache_dir
from distill.contracts import NetworkDefense, Teacher, TensorDefense
from distill.data.digits import Digits
from distill.data.pools.noise import Noise
from distill.errors import DistillError
from distill.provider.defenses._networks import OUTLIER, Joined, Members, logits_of, with_outliers
from distill.provider.defenses.adaptive_misinformation import (
    AdaptiveMisinformation,
    _Misinformation,
    _OutlierExposure,
)
from distill.provider.defenses.edm import EDM, _Diverse, hashed
from distill.provider.defenses.misleader import Misleader, _Misleading, variants
from distill.provider.defenses.nasty_teacher import NastyTeacher, _SelfUndermining
from distill.provider.teachers.torch_classifier import TorchClassifier
from distill.randomness import KeyedRandom
from distill.records import Answers, Dataset, Examples, InputSpec, Reveals, content_keys, softmax
from distill.students.mlp import MLP
from distill.training import Recipe, Trainer

RECIPE = Recipe(epochs=8, lr=1e-2)
ARCHITECTURE = MLP((32,))
OUTLIERS = Noise(1000)


def misinformation(**options: Any) -> AdaptiveMisinformation:
    return AdaptiveMisinformation(**({"architecture": ARCHITECTURE, "recipe": RECIPE, "outliers": OUTLIERS} | options))


def edm(**options: Any) -> EDM:
    return EDM(**({"architecture": ARCHITECTURE, "recipe": RECIPE, "outliers": OUTLIERS} | options))


def misleader(**options: Any) -> Misleader:
    return Misleader(**({"defenders": [MLP((32,)), MLP((16,)), MLP((48,))], "recipe": RECIPE} | options))


MADE: dict[str, Any] = {
    "adaptive_misinformation": misinformation,
    "edm": edm,
    "nasty_teacher": NastyTeacher,
    "misleader": misleader,
}


@dataclass
class Bench:
    """Real digits, a teacher of them, and the defenses, each trained once."""

    cache: Path
    data: Dataset = field(default_factory=lambda: Digits().load())
    trainer: Trainer = field(default_factory=lambda: Trainer(device="cpu", progress=False))

    def __post_init__(self) -> None:
        self.teacher = TorchClassifier(ARCHITECTURE, RECIPE)
        self.teacher.prepare(self.data, self.trainer, self.cache)
        self.inputs, self.labels = self.data.test.inputs[:], self.data.test_labels
        self.noise = Noise(400, seed=1).load(self.data).inputs[:]  # none of the outliers that were trained on
        self.clean = softmax(self.teacher.predict(self.inputs))
        self.defenses: dict[str, Any] = {name: make() for name, make in MADE.items()}
        self.teachers = {name: self.prepare(defense) for name, defense in self.defenses.items()}

    def prepare(self, defense: Any, teacher: Any = None, data: Dataset | None = None, seed: int = 0) -> Teacher:
        return defense.prepare(teacher or self.teacher, data or self.data, self.trainer, self.cache, seed)

    def answers(self, name: str, inputs: np.ndarray) -> np.ndarray:
        """What an honest user gets."""
        clean = softmax(logits_of(self.teachers[name], inputs, self.cache))
        return returned(self.defenses[name], clean, self.defenses[name].query_info(inputs))

    def accuracy(self, answers: np.ndarray) -> float:
        return float((answers.argmax(axis=1) == self.labels).mean())


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(cache_dir())


def returned(defense: Any, clean: np.ndarray, info: np.ndarray | None) -> np.ndarray:
    keys = content_keys(np.arange(len(clean), dtype=np.float32)[:, None])
    return defense.perturb(Answers(clean), info, KeyedRandom(0, keys, np.zeros(len(clean), np.int64))).posteriors


def kl(of: np.ndarray, to: np.ndarray) -> float:
    of, to = of.astype(np.float64), np.maximum(to.astype(np.float64), 1e-12)
    return float((of * np.log(np.maximum(of, 1e-12) / to)).sum(axis=1).mean())


# --- what every one of them must do ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_it_fits_the_contract_before_and_after_it_is_prepared(name: str, bench: Bench) -> None:
    for defense in (MADE[name](), bench.defenses[name]):
        assert isinstance(defense, NetworkDefense)
        assert isinstance(defense, TensorDefense) == (name != "edm")  # whose answers do not depend on the teacher's
    assert {*Teacher.__annotations__, "prepare", "predict", "latency_s"} <= set(dir(bench.teachers[name]))
    assert len(bench.defenses[name].fingerprint) == 32


@pytest.mark.parametrize("name", MADE)
def test_honest_users_get_distributions_that_are_almost_as_right(name: str, bench: Bench) -> None:
    answers = bench.answers(name, bench.inputs)
    assert answers.dtype == np.float32
    assert (answers >= 0).all()
    np.testing.assert_allclose(answers.sum(axis=1, dtype=np.float64), 1, atol=1e-6)
    assert bench.accuracy(bench.clean) > 0.9
    # Misinformation answers what the teacher is unsure of, more of it in a teacher that was taught to doubt.
    assert bench.accuracy(answers) > bench.accuracy(bench.clean) - (0.1 if name == "adaptive_misinformation" else 0.04)


@pytest.mark.parametrize("name", MADE)
def test_an_answer_is_the_same_in_every_batch(name: str, bench: Bench) -> None:
    whole = bench.answers(name, bench.inputs)
    order = np.random.default_rng(0).permutation(len(bench.inputs))
    for rows in np.split(order, [1, 4, 90]):
        np.testing.assert_array_equal(bench.answers(name, bench.inputs[rows]), whole[rows])


@pytest.mark.parametrize("name", MADE)
def test_networks_are_trained_once(name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = MADE[name]()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", None)
        teacher = bench.prepare(fresh)
    assert fresh.fingerprint == bench.defenses[name].fingerprint
    assert teacher.fingerprint == bench.teachers[name].fingerprint
    np.testing.assert_array_equal(teacher.predict(bench.inputs), bench.teachers[name].predict(bench.inputs))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("adaptive_misinformation", {"outliers": Noise(500)}),
        ("edm", {"diversity": 0.0}),
        ("edm", {"members": 3}),
        ("edm", {"hash_classes": 7}),
        ("nasty_teacher", {"omega": 0.01}),
        ("nasty_teacher", {"tau": 2.0}),
        ("misleader", {"separation": (0.1, 0.05, 0.01)}),
    ],
)
def test_other_options_are_other_networks(name: str, change: dict[str, Any], bench: Bench) -> None:
    usual, other = MADE[name](), MADE[name](**change)
    teacher = TorchClassifier(ARCHITECTURE, Recipe(epochs=1))
    teacher.prepare(bench.data, bench.trainer, bench.cache)
    for defense in (usual, other):
        defense.recipe = Recipe(epochs=1)
        bench.prepare(defense, teacher)
    assert usual.fingerprint != other.fingerprint


@dataclass
class Stolen:
    """An attacker's student, in the teacher's place."""

    student: Any
    output: Reveals = Reveals.PROBS
    rows_at_once: int = 4096
    fingerprint: str = "a student that was stolen"

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        return softmax(self.student.predict(inputs))


@pytest.mark.parametrize("name", ["adaptive_misinformation", "edm", "misleader"])
def test_an_attacker_makes_a_copy_from_its_own_queries(name: str, bench: Bench) -> None:
    queries = bench.data.train.inputs[:200] / np.float32(255)  # made by the attack, not of the pool's type
    asked = Examples(queries, bench.data.spec, softmax(bench.teacher.predict(queries)).argmax(axis=1))
    data = Dataset("queries", bench.data.spec, bench.data.class_names, asked, asked, asked)
    student = Stolen(bench.teacher)
    copy = MADE[name]()
    answering = bench.prepare(copy, student, data, seed=7)
    if name != "misleader":
        assert answering is student
    info = copy.query_info(bench.inputs)
    if info is not None:
        assert (info != bench.defenses[name].query_info(bench.inputs)).any()
    answers = returned(copy, softmax(logits_of(answering, bench.inputs, bench.cache)), info)
    np.testing.assert_allclose(answers.sum(axis=1), 1, atol=1e-5)
    assert copy.fingerprint != bench.defenses[name].fingerprint


def test_only_a_teacher_that_is_trained_here_becomes_nasty(bench: Bench) -> None:
    with pytest.raises(DistillError, match="torch_classifier") as error:
        bench.prepare(NastyTeacher(), Stolen(bench.teacher))
    assert error.value.key == "defense"


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        (lambda: misinformation(tau=1.5), "defense.tau"),
        (lambda: misinformation(nu=0.0), "defense.nu"),
        (lambda: misinformation(exposure=-1.0), "defense.exposure"),
        (lambda: misinformation(architecture=torch.nn), "defense.architecture"),
        (lambda: edm(members=1), "defense.members"),
        (lambda: edm(diversity=math.nan), "defense.diversity"),
        (lambda: edm(hash_bins=0), "defense.hash_bins"),
        (lambda: NastyTeacher(omega=0.0), "defense.omega"),
        (lambda: NastyTeacher(tau=math.inf), "defense.tau"),
        (lambda: misleader(defenders=[MLP((8,))]), "defense.separation"),
        (lambda: misleader(alpha=(0.3, 0.9, 1.3)), "defense.alpha"),
        (lambda: misleader(temperature=(6.0, 0.0, 1.0)), "defense.temperature"),
    ],
)
def test_wrong_options_are_named(wrong: Any, key: str) -> None:
    with pytest.raises(DistillError) as error:
        wrong()
    assert error.value.key == key


# --- adaptive misinformation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.5, 0.75])
@pytest.mark.parametrize("nu", [1000.0, 20.0])
def test_misinformation_is_the_papers_formula(tau: float, nu: float) -> None:
    clean = torch.tensor(
        [[1, 0, 0], [0, 0, 0], [tau, 1 - tau, 0], [tau + 1 / 512, 0.25, 0], [0.375, 0.375, 0.25]], dtype=torch.float64
    )
    wrong = torch.tensor([[0, 0.25, 0.75]] * 5, dtype=torch.float64)
    got = misinformation(tau=tau, nu=nu).transform(clean, wrong)
    for row, y, f in zip(got.tolist(), clean.tolist(), wrong.tolist(), strict=True):
        exponent = nu * (max(y) - tau)
        a = 0.0 if exponent > 700 else 1 / (1 + math.exp(exponent))
        np.testing.assert_allclose(row, [(1 - a) * p + a * q for p, q in zip(y, f, strict=True)], atol=1e-12)
    if nu == 1000.0:
        saturated = np.stack([clean[0], wrong[1]])
        np.testing.assert_allclose(got[:2].numpy(), saturated, rtol=0, atol=1e-100)
    np.testing.assert_array_equal(got[2].numpy(), (clean[2] + wrong[2]).numpy() / 2)


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_misinformation_returns_distributions_whatever_the_posteriors(classes: int) -> None:
    clean = posteriors(classes)
    info = np.random.default_rng(0).permutation(clean)
    for tau in (0.0, 1 / classes, 0.5, 1.0):
        answers = returned(misinformation(tau=tau), clean, info)
        assert np.isfinite(answers).all()
        assert (answers >= 0).all()
        np.testing.assert_allclose(answers.sum(axis=1, dtype=np.float64), 1, atol=1e-5)


def test_an_attacker_can_train_through_misinformation() -> None:
    clean = torch.rand(20, 4, dtype=torch.float64).softmax(dim=1).requires_grad_()
    info = torch.rand(20, 4, dtype=torch.float64).softmax(dim=1)
    assert torch.autograd.gradcheck(lambda y: misinformation(tau=0.3, nu=5.0).transform(y, info), (clean,))


def test_the_losses_of_misinformation() -> None:
    logits = torch.randn(6, 5, dtype=torch.float64) * 3
    p = logits.softmax(dim=1)
    labels = torch.tensor([0, 3, 4, 1, 1, 2])
    by_hand = sum(-math.log(1 - p[i, labels[i]]) for i in range(6))
    assert _Misinformation().loss(logits, {"labels": labels}).item() == pytest.approx(by_hand)
    sure = torch.tensor([[200.0, 0.0, 0.0]])
    assert _Misinformation().loss(sure, {"labels": torch.tensor([0])}).item() == pytest.approx(200 - math.log(2))
    labels[3:] = OUTLIER
    known = F.cross_entropy(logits[:3], labels[:3])
    unknown = F.cross_entropy(logits[3:], torch.full((3, 5), 0.2, dtype=torch.float64))
    exposure = _OutlierExposure(0.7)
    mean = exposure.loss(logits, {"labels": labels}) / exposure.positions({"labels": labels})
    assert mean.item() == pytest.approx((known + 0.7 * unknown).item())


def test_the_misinformation_is_wrong_and_outliers_are_what_the_teacher_doubts(bench: Bench) -> None:
    defense, exposed = bench.defenses["adaptive_misinformation"], bench.teachers["adaptive_misinformation"]
    assert bench.accuracy(defense.query_info(bench.inputs)) < 0.02  # chance is 0.1
    before, after = (softmax(t.predict(bench.noise)).max(axis=1) for t in (bench.teacher, exposed))
    assert after.mean() < before.mean() - 0.03
    # So outliers are mostly answered with misinformation, and test rows mostly not.
    doubted = (after < defense.tau).mean()
    assert doubted > 0.95
    assert (softmax(exposed.predict(bench.inputs)).max(axis=1) < defense.tau).mean() < 0.15
    returned_label = bench.answers("adaptive_misinformation", bench.noise).argmax(axis=1)
    clean_label = exposed.predict(bench.noise).argmax(axis=1)
    assert (returned_label == clean_label).mean() < 0.2


# --- EDM ------------------------------------------------------------------------------------------------------------


def test_the_loss_of_edm() -> None:
    logits = torch.randn(5, 3 * 4, dtype=torch.float64) * 2
    labels = torch.tensor([1, OUTLIER, 3, OUTLIER, 0])
    members = logits.view(5, 3, 4)
    known = np.mean([F.cross_entropy(members[i, j], labels[i]).item() for i in (0, 2, 4) for j in range(3)])
    similar = []
    for i in (1, 3):
        p = members[i].softmax(dim=1)
        pairs = [F.cosine_similarity(p[a], p[b], dim=0).item() for a, b in ((0, 1), (0, 2), (1, 2))]
        similar.append(math.log(sum(map(math.exp, pairs))))
    got = _Diverse(3, 0.3).loss(logits, {"labels": labels}).item() / 2
    assert got == pytest.approx(3 * known + 0.3 * sum(similar))


def test_the_hash_is_the_formula() -> None:
    rows = np.full((5, 10), 0.0)
    rows[0, 3] = 1.0  # 2 * 3 + floor(9 * 2 / 9)
    rows[1] = 0.1  # the least sure that there is
    rows[2, 7], rows[2, 1] = 0.56, 0.44  # (5.6 - 1) * 2 / 9 = 1.02
    rows[3, 7], rows[3, 1] = 0.54, 0.46  # 0.98
    rows[4, 9], rows[4, 0] = 0.99, 0.01
    assert hashed(rows, 2).tolist() == [8, 0, 15, 14, 19]
    assert hashed(np.full((1, 3), 1 / 3, np.float32) - np.float32(1e-7), 2).tolist() == [0]


def test_the_hash_spreads_queries_over_the_members_and_never_changes(bench: Bench) -> None:
    defense = bench.defenses["edm"]
    chosen = defense.chosen(bench.noise)
    assert np.bincount(chosen, minlength=5).min() > 0.1 * len(bench.noise)
    assert len(np.unique(defense.chosen(bench.inputs))) == 5
    np.testing.assert_array_equal(defense.chosen(bench.noise[::-1].copy()), chosen[::-1])
    every = softmax_of_members(defense, bench.noise)
    np.testing.assert_array_equal(defense.query_info(bench.noise), every[np.arange(len(chosen)), chosen])
    np.testing.assert_array_equal(bench.answers("edm", bench.noise), every[np.arange(len(chosen)), chosen])


def softmax_of_members(defense: EDM, inputs: np.ndarray) -> np.ndarray:
    logits = defense._ensemble.predict(inputs).reshape(len(inputs) * defense.members, -1)
    return softmax(logits).reshape(len(inputs), defense.members, -1)


def test_the_members_disagree_on_outliers_and_agree_on_data(bench: Bench) -> None:
    independent = edm(diversity=0.0)
    bench.prepare(independent)

    def coherence(defense: EDM, inputs: np.ndarray) -> float:
        p = torch.from_numpy(softmax_of_members(defense, inputs))
        pairs = F.cosine_similarity(p[:, :, None], p[:, None], dim=3) - 2 * torch.eye(defense.members)
        return pairs.amax(dim=(1, 2)).mean().item()

    diverse = bench.defenses["edm"]
    assert coherence(independent, bench.noise) > 0.9
    assert coherence(diverse, bench.noise) < 0.3
    assert coherence(diverse, bench.inputs) > 0.95


def test_members_are_what_they_would_be_alone() -> None:
    spec = InputSpec("table", (3,))
    torch.manual_seed(0)
    module = Members(MLP((4,)), 3).build(spec, 6)
    inputs = torch.randn(7, 3)
    alone = [network(inputs=inputs) for network in module.networks]  # type: ignore[operator, union-attr]
    assert all(logits.shape == (7, 2) for logits in alone)
    torch.testing.assert_close(module(inputs=inputs), torch.cat(alone, dim=1), rtol=0, atol=0)


# --- defenses of training -------------------------------------------------------------------------------------------


def test_the_loss_of_a_nasty_teacher() -> None:
    nasty, normal = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    labels = torch.tensor([0, 3, 4, 1, 1, 2])
    # The direction and the constants of the authors' code.
    far = F.kl_div((normal / 4).log_softmax(dim=1), (nasty / 4).softmax(dim=1), reduction="batchmean") * 4 * 4
    expected = F.cross_entropy(nasty, labels) - 0.04 * far
    loss = _SelfUndermining(0.04, 4.0)
    targets = {"labels": labels, "normal": normal}
    assert loss.loss(nasty, targets).item() / loss.positions(targets) == pytest.approx(expected.item())


def test_a_nasty_teacher_is_as_right_and_further_away(bench: Bench) -> None:
    far = {}
    for omega in (0.005, 0.02, 0.04):
        nasty = bench.prepare(NastyTeacher(omega))
        answers = softmax(nasty.predict(bench.inputs))
        assert bench.accuracy(answers) > bench.accuracy(bench.clean) - 0.04
        far[omega] = kl(bench.clean, answers)
    assert far[0.005] < far[0.02] < far[0.04]
    assert far[0.04] > 0.005
    np.testing.assert_array_equal(bench.answers("nasty_teacher", bench.inputs).argmax(axis=1),
                                  bench.teachers["nasty_teacher"].predict(bench.inputs).argmax(axis=1))  # fmt: skip


def test_the_losses_of_misleader_reach_each_network_alone() -> None:
    output = (torch.randn(6, 8, dtype=torch.float64) * 2).requires_grad_()
    teacher = torch.randn(6, 4, dtype=torch.float64)
    labels = torch.tensor([0, 3, 1, OUTLIER, OUTLIER, OUTLIER])
    loss = _Misleading(0.1, 4.0, 0.9)
    targets = {"labels": labels, "teacher": teacher}
    total = loss.loss(output, targets) / loss.positions(targets)
    got = torch.autograd.grad(total, output)[0]

    d, a = (half.detach().requires_grad_() for half in output.chunk(2, dim=1))
    taught = F.kl_div((d[:3] / 4).log_softmax(dim=1), (teacher[:3] / 4).softmax(dim=1), reduction="batchmean")
    far = F.kl_div(a[3:].detach().log_softmax(dim=1), d[3:].softmax(dim=1), reduction="batchmean")
    defender = 0.9 * 16 * taught + 0.1 * F.cross_entropy(d[:3], labels[:3]) - 0.1 * far
    attacker = F.kl_div(a[3:].log_softmax(dim=1), d[3:].detach().softmax(dim=1), reduction="batchmean")
    expected = torch.cat([torch.autograd.grad(defender, d)[0], torch.autograd.grad(attacker, a)[0]], dim=1)
    torch.testing.assert_close(got, expected)


def test_misleader_answers_with_the_mean_of_its_defenders(bench: Bench) -> None:
    ensemble: Any = bench.teachers["misleader"]
    assert ensemble.output is Reveals.PROBS
    each = [softmax(network.predict(bench.inputs)[:, :10]) for network in ensemble._kept]
    np.testing.assert_allclose(ensemble.predict(bench.inputs), np.mean(each, axis=0), atol=1e-6)
    # A second softmax of ten probabilities would leave none above e / (e + 9).
    assert np.median(ensemble.predict(bench.inputs).max(axis=1)) > 0.5
    assert ensemble.parameters == sum(64 * h + h + h * 10 + 10 for h in (32, 16, 48))
    assert 0 < ensemble.latency_s(bench.inputs[:1]) < 1


def test_more_separation_keeps_the_inner_attacker_away(bench: Bench) -> None:
    moved = variants(bench.inputs, bench.data.spec, 3)
    gap = {}
    for separation in (0.0, 0.5):
        defense = misleader(defenders=[MLP((32,))], separation=[separation], temperature=[4.0], alpha=[0.9])
        ensemble: Any = bench.prepare(defense)
        d, a = (softmax(half) for half in np.split(ensemble._kept[0].predict(moved), 2, axis=1))
        gap[separation] = kl(d, a)
    assert gap[0.5] > 1.2 * gap[0.0]


# --- data -----------------------------------------------------------------------------------------------------------


def test_variants_are_of_the_same_kind_and_near(bench: Bench) -> None:
    inputs, spec = bench.inputs, bench.data.spec
    made = variants(inputs, spec, 0)
    assert (made.dtype, made.shape) == (np.uint8, inputs.shape)
    np.testing.assert_array_equal(variants(inputs, spec, 0), made)
    assert (variants(inputs, spec, 1) != made).any()
    assert bench.accuracy(bench.teacher.predict(made)) > 0.4  # still digits
    real = variants(inputs / np.float32(255), spec, 0)
    assert real.dtype == np.float32
    np.testing.assert_allclose(real * 255, made, atol=0.51)
    table = np.random.default_rng(0).normal(size=(5000, 2)).astype(np.float32) * [1, 100]
    noise = variants(table.astype(np.float32), InputSpec("table", (2,)), 0) - table
    np.testing.assert_allclose(noise.std(axis=0), [0.1, 10], rtol=0.05)
    with pytest.raises(DistillError, match="texts"):
        variants(np.array(["a"], object), InputSpec("text"), 0)


def test_two_columns_are_read_as_one() -> None:
    first, second = np.arange(3, dtype=np.uint8)[:, None], np.arange(10, 14, dtype=np.uint8)[:, None]
    joined = Joined(first, second)
    assert len(joined) == 7
    np.testing.assert_array_equal(joined[:], np.concatenate([first, second]))
    np.testing.assert_array_equal(joined[np.array([5, 0, 3, 0])].ravel(), [12, 0, 10, 0])
    np.testing.assert_array_equal(joined[1:4].ravel(), [1, 2, 10])
    mixed = Joined(first, second / np.float32(255))
    assert mixed[:2].dtype == np.float32
    np.testing.assert_allclose(mixed[:] * 255, joined[:], rtol=1e-6)


def test_there_are_as_many_outliers_as_training_rows(bench: Bench) -> None:
    few = Noise(100)
    inputs, labels = with_outliers(bench.data, few)
    rows = len(bench.data.train)
    assert len(inputs) == len(labels) == 2 * rows
    assert (labels == OUTLIER).sum() == rows
    np.testing.assert_array_equal(inputs[rows : rows + 250], few.load(bench.data).inputs[np.arange(250) % 100])
