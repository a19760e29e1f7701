"""Recoveries that train: restorers, identification of the defense, the student in the loop, and rotations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distill.contracts import Knowledge, Lesson, TrainingRecovery
from distill.data.digits import Digits
from distill.errors import DistillError
from distill.kept import train_once
from distill.objectives.hard_cross_entropy import HardCrossEntropy
from distill.objectives.kl import KL
from distill.objectives.logit_mse import LogitMSE
from distill.objectives.soft_cross_entropy import SoftCrossEntropy
from distill.provider.defenses.chain import Chain
from distill.provider.defenses.gaussian_noise import GaussianNoise
from distill.provider.defenses.label_only import LabelOnly
from distill.provider.defenses.modelguard_s import ModelGuardS
from distill.provider.defenses.none import NoDefense
from distill.provider.defenses.reverse_sigmoid import ReverseSigmoid
from distill.provider.defenses.rounding import Rounding
from distill.provider.defenses.temperature import Temperature
from distill.provider.defenses.top_k import TopK
from distill.randomness import KeyedRandom
from distill.records import Answers, Examples, InputSpec, TransferSet, content_keys, softmax
from distill.recovery._restorer import simulated
from distill.recovery.as_returned import AsReturned
from distill.recovery.ddae import DDAE
from distill.recovery.ddae_identified import DDAEIdentified
from distill.recovery.ddae_plus import DDAEPlus
from distill.recovery.defense_in_loop import DefenseInLoop
from distill.recovery.s4l import S4L
from distill.students.mlp import MLP
from distill.training import Recipe, Trainer

NAMES = tuple("0123456789")
RECIPE = Recipe(epochs=15, batch_size=32, lr=2e-3)


class Labels:
    def loss(self, output: torch.Tensor, targets: Any) -> torch.Tensor:
        return F.cross_entropy(output, targets["labels"], reduction="sum")

    def positions(self, targets: Any) -> int:
        return len(targets["labels"])


@dataclass
class Small:
    """An apprentice: a small perceptron, always from the same weights."""

    trainer: Trainer
    class_names: tuple[str, ...] = NAMES

    def fit(self, transfer_set: TransferSet, pool: Examples) -> Any:
        assert transfer_set.targets is not None
        loss = SoftCrossEntropy()
        return self.learn(Lesson(transfer_set.inputs(pool), loss.prepare(transfer_set), loss), pool.spec)

    def learn(self, lesson: Lesson, spec: InputSpec, extra: int = 0) -> Any:
        student, outputs = MLP((32,)), len(self.class_names) + extra
        module = self.trainer.build(student, spec, outputs, 0)
        features = student.encode(lesson.inputs, spec)
        self.trainer.fit(module, features, lesson.targets, lesson.objective, RECIPE, seed=0, name="student")
        return Trained(self.trainer, student, module, spec)


@dataclass
class Trained:
    trainer: Trainer
    student: MLP
    module: torch.nn.Module
    spec: InputSpec

    def predict(self, inputs: Any) -> np.ndarray:
        return self.trainer.predict(self.module, self.student.encode(inputs, self.spec))


@dataclass
class World:
    """A real teacher of digits, and an attacker with a pool of 719 other digits, of which it asks 500."""

    knowledge: Knowledge
    clean: np.ndarray
    test: np.ndarray
    test_clean: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        return np.arange(500)[::-1].copy()

    def asked(self, defense: Any, profile: str = "probs") -> TransferSet:
        inputs = self.knowledge.pool.inputs[self.rows]
        rng = KeyedRandom(1, content_keys(inputs), np.zeros(len(inputs), np.int64))
        returned = defense.perturb(Answers(self.clean), defense.query_info(inputs), rng)
        return TransferSet(self.rows, returned.posteriors, pool=self.knowledge.pool.fingerprint, profile=profile)

    def knows(self, defense: Any) -> Knowledge:
        return replace(self.knowledge, defense=defense)

    def away(self, posteriors: np.ndarray | None) -> float:
        """Mean L1 distance from the clean answers."""
        assert posteriors is not None
        return float(np.abs(posteriors - self.clean).sum(axis=1).mean())

    def kl(self, student: Any) -> float:
        """KL(teacher ‖ student) on the test rows, in nats."""
        log_q = torch.from_numpy(student.predict(self.test)).double().log_softmax(1).numpy()
        return float((self.test_clean * (np.log(self.test_clean) - log_q)).sum(axis=1).mean())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    trainer, data, cache = Trainer(device="cpu", progress=False), Digits(0.5).load(), tmp_path_factory.mktemp("cache")
    labels = {"labels": torch.as_tensor(data.train.labels)}
    teacher = train_once(
        MLP((32,)), data.spec, 10, data.train.inputs, labels, Labels(), RECIPE,
        trainer=trainer, cache=cache, seed=0, name="teacher", key="teacher",
    )  # fmt: skip
    pool = Examples(data.held_out.inputs, data.spec, name="held out")
    knowledge = Knowledge(pool, Small(trainer), trainer, 0, cache)
    test = data.test.inputs[:]
    world = World(knowledge, np.empty(0), test, softmax(teacher.predict(test)).clip(1e-12))
    world.clean = softmax(teacher.predict(pool.inputs[world.rows]))
    return world


# --- restorers ------------------------------------------------------------------------------------------------------


def test_a_restorer_brings_reverse_sigmoid_back(world: World) -> None:
    """With seed 0 the answers are 1.27 away as returned, 0.41 from shadow models and 0.67 from drawn ones."""
    asked = world.asked(ReverseSigmoid())
    away = world.away(asked.posteriors)
    knowledge = world.knows(ReverseSigmoid())
    shadows = DDAE(shadows=3, epochs=40).targets(asked, knowledge)
    drawn = DDAEPlus(samples=10_000, epochs=10).targets(asked, knowledge)
    assert world.away(shadows.targets) < 0.6 * away
    assert world.away(drawn.targets) < 0.8 * away
    for recovered in (shadows, drawn):
        assert recovered.targets is not None
        assert recovered.targets.dtype == np.float32
        np.testing.assert_allclose(recovered.targets.sum(axis=1), 1, atol=1e-5)
        assert asked.targets is None


def test_nothing_is_restored_where_nothing_was_done(world: World) -> None:
    asked = world.asked(NoDefense())
    np.testing.assert_array_equal(DDAEPlus(samples=600).targets(asked, world.knows(NoDefense())).targets, world.clean)


@pytest.mark.parametrize("samples", [2, 1024, 1025])
def test_any_number_of_samples_can_be_trained_on(samples: int, world: World) -> None:
    recovered = DDAEPlus(samples=samples, epochs=1).targets(world.asked(Rounding()), world.knows(Rounding()))
    assert np.isfinite(recovered.targets).all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DDAE(shadows=1), "shadows must be at least 2"),
        (lambda: DDAE(share=0), "share must be more than 0"),
        (lambda: DDAEPlus(epochs=0), "epochs must be at least 1"),
        (lambda: DDAEPlus(concentration=0), "concentration must be more than 0"),
        (lambda: DDAEIdentified([NoDefense()]), "at least two"),
        (lambda: DefenseInLoop(-1), "label_weight must be at least 0"),
        (lambda: S4L(weight=0), "weight must be more than 0"),
        (lambda: S4L(images=0), "images must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(make: Any, says: str) -> None:
    with pytest.raises(DistillError, match=says):
        make()


def test_what_is_trained_is_kept_in_the_attackers_cache(world: World, tmp_path: Path) -> None:
    knowledge = replace(world.knows(Rounding()), cache=tmp_path)
    first = DDAEPlus(samples=600, epochs=1).targets(world.asked(Rounding()), knowledge)
    (network,) = (tmp_path / "networks").glob("*/model.safetensors")
    written = network.stat().st_mtime_ns
    again = DDAEPlus(samples=600, epochs=1).targets(world.asked(Rounding()), knowledge)
    assert network.stat().st_mtime_ns == written
    np.testing.assert_array_equal(first.targets, again.targets)


# --- the attacker's copy of the defense -----------------------------------------------------------------------------


def test_the_copy_gives_the_same_answers_and_is_left_as_it_was(world: World) -> None:
    """Also a defense that remembers, whatever is asked in between, and behind the same access."""
    for deployed, copy in (
        (ReverseSigmoid(), ReverseSigmoid()),
        (ModelGuardS(), ModelGuardS()),
        (Chain([Temperature(), Rounding()]), Chain([Temperature(), Rounding()])),
    ):
        asked = world.asked(deployed)
        other = np.roll(world.clean, 1, axis=1)
        twice = simulated(copy, np.concatenate([world.clean, other, world.clean]), asked, world.knowledge)
        np.testing.assert_array_equal(twice[:500], asked.posteriors)
        np.testing.assert_array_equal(twice[1000:], asked.posteriors)
    copy = ModelGuardS()
    asked = world.asked(ModelGuardS())
    assert not np.array_equal(asked.posteriors, world.clean)
    simulated(copy, world.clean, asked, world.knowledge)
    assert len(copy.state()["codewords"]) == 0
    labels = simulated(Rounding(), world.clean, world.asked(Rounding(), "label"), world.knowledge)
    assert set(np.unique(labels)) == {0, 1}
    two = simulated(NoDefense(), world.clean, world.asked(NoDefense(), "top_2"), world.knowledge)
    assert ((two > 0).sum(axis=1) == 2).all()


def test_simulated_noise_is_drawn_anew_for_each_simulated_answer(world: World) -> None:
    noisy = simulated(GaussianNoise(), np.tile(world.clean, (2, 1)), world.asked(GaussianNoise()), world.knowledge)
    assert not np.isclose(noisy[:500], noisy[500:]).all(axis=1).any()


# --- identification -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deployed", [NoDefense, LabelOnly, Rounding, ReverseSigmoid, ModelGuardS])
def test_the_deployed_defense_is_identified(deployed: type, world: World) -> None:
    candidates = [ReverseSigmoid(), NoDefense(), Rounding(), LabelOnly(), ModelGuardS()]
    asked = replace(world.asked(deployed()), note="asked")
    recovered = DDAEIdentified(candidates, shadows=2, epochs=10).targets(asked, world.knowledge)
    assert recovered.note.startswith(f"asked; identified {deployed.__name__} (")
    assert recovered.targets is not None
    np.testing.assert_allclose(recovered.targets.sum(axis=1), 1, atol=1e-5)
    if deployed is ReverseSigmoid:
        known = DDAE(shadows=2, epochs=10).targets(asked, world.knows(ReverseSigmoid()))
        np.testing.assert_array_equal(recovered.targets, known.targets)
    if deployed is NoDefense:
        np.testing.assert_array_equal(recovered.targets, world.clean)


# --- the defense in the loop ----------------------------------------------------------------------------------------


def in_loop(world: World, defense: Any, objective: Any, weight: float = 1.0, profile: str = "probs") -> Lesson:
    recovery, knowledge = DefenseInLoop(weight), world.knows(defense)
    assert isinstance(recovery, TrainingRecovery)
    return recovery.lesson(recovery.targets(world.asked(defense, profile), knowledge), objective, knowledge)


def test_a_student_in_the_loop_learns_what_reverse_sigmoid_hides(world: World) -> None:
    """With seed 0 the KL from the clean teacher is 1.15 for the answers as returned and 0.07 in the loop."""
    lesson, student = in_loop(world, ReverseSigmoid(), SoftCrossEntropy()), world.knowledge.student
    naive = student.fit(AsReturned().targets(world.asked(ReverseSigmoid()), world.knowledge), world.knowledge.pool)
    looped = student.learn(lesson, world.knowledge.pool.spec)  # type: ignore[attr-defined]
    assert world.kl(looped) < 0.2 * world.kl(naive)


@pytest.mark.parametrize("defense", [ReverseSigmoid(0.2), Rounding(), TopK(3), Temperature(), LabelOnly()])
def test_the_clean_posterior_has_the_least_loss(defense: Any, world: World) -> None:
    lesson = in_loop(world, defense, SoftCrossEntropy(), weight=0)
    clean = torch.from_numpy(np.log(np.maximum(world.clean, 1e-30))).requires_grad_()
    loss = lesson.objective.loss(clean, lesson.targets)
    answers = lesson.targets["posteriors"].double()
    torch.testing.assert_close(loss.double(), torch.special.entr(answers).sum(), rtol=1e-4, atol=0.02)
    loss.backward()
    assert clean.grad is not None
    assert clean.grad.abs().max() < 1e-3
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    assert lesson.objective.loss(clean + noise, lesson.targets) > loss


def test_through_a_defense_without_a_formula_the_logits_move_to_the_answer(world: World) -> None:
    """The gradient is D(softmax(z)) - ỹ, and with the label's cross-entropy, weighted, softmax(z) - label besides."""
    lesson = in_loop(world, NoDefense(), SoftCrossEntropy(), weight=0.5, profile="label")
    part = {name: tensor[:50] for name, tensor in lesson.targets.items()}
    output = torch.randn(50, 10, generator=torch.Generator().manual_seed(1), requires_grad=True)
    lesson.objective.loss(output, part).backward()
    own, told = output.detach().softmax(1), part["posteriors"]
    label = F.one_hot(told.argmax(1), 10)
    expected = F.one_hot(own.argmax(1), 10) - told + 0.5 * (own - label)
    torch.testing.assert_close(output.grad, expected.float(), rtol=1e-4, atol=1e-4)
    assert lesson.objective.positions(part) == 50


def test_the_label_counts_for_less_where_it_may_be_wrong(world: World) -> None:
    assert in_loop(world, Rounding(), SoftCrossEntropy()).objective.label_weight == 1.0  # type: ignore[attr-defined]
    unsure = in_loop(world, ReverseSigmoid(), SoftCrossEntropy()).objective.label_weight  # type: ignore[attr-defined]
    assert unsure == pytest.approx(0.1)


@pytest.mark.parametrize("objective", [SoftCrossEntropy(), HardCrossEntropy(), KL(), LogitMSE()])
@pytest.mark.parametrize(
    ("defense", "profile"),
    [
        (ReverseSigmoid(), "probs"),
        (Rounding(), "probs"),
        (TopK(1), "top_1"),
        (Temperature(4.0), "probs"),
        (LabelOnly(), "label"),
        (ModelGuardS(), "probs"),
        (Chain([ReverseSigmoid(), Rounding()]), "probs"),
    ],
)
def test_gradients_are_finite_in_the_corners(objective: Any, defense: Any, profile: str, world: World) -> None:
    lesson = in_loop(world, defense, objective, profile=profile)
    output = torch.zeros(40, 10)
    output[torch.arange(20), torch.arange(20) % 10] = torch.logspace(
        0, 5, 20
    )  # up to exactly one-hot; the rest uniform
    output.requires_grad_()
    loss = lesson.objective.loss(output, {name: tensor[:40] for name, tensor in lesson.targets.items()})
    loss.backward()
    assert torch.isfinite(loss)
    assert output.grad is not None
    assert torch.isfinite(output.grad).all()


def test_a_steep_defense_does_not_drown_the_label(world: World) -> None:
    """Far from every answer, where a codeword is nearly 0, a row's gradient is no longer than the objective's own."""
    lesson = in_loop(world, ModelGuardS(), SoftCrossEntropy(), weight=0)
    output = (0.1 * torch.randn(500, 10, generator=torch.Generator().manual_seed(2))).requires_grad_()
    output_told = lesson.objective.defended(output, lesson.targets["in_loop_query"])  # type: ignore[attr-defined]
    lesson.objective.loss(output, lesson.targets).backward()
    own = (output_told.detach().softmax(1) - lesson.targets["posteriors"]).norm(dim=1)
    assert output.grad is not None
    assert (output.grad.norm(dim=1) <= own * 1.001 + 1e-6).all()


def test_the_query_information_goes_with_its_query(world: World) -> None:
    """A defense that mixes in what it knows of a query, in any batch and order."""

    class Mixes(NoDefense):
        def query_info(self, inputs: np.ndarray) -> np.ndarray:
            return softmax(inputs.reshape(len(inputs), -1)[:, 10:20].astype(np.float32) / 50)

        def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
            assert info is not None
            return Answers((answers.posteriors + info) / 2)

        def transform(self, posteriors: torch.Tensor, info: torch.Tensor | None) -> torch.Tensor:
            assert info is not None
            return (posteriors + info.double()) / 2

    asked = world.asked(Mixes())
    twice = simulated(Mixes(), np.tile(world.clean, (2, 1)), asked, world.knowledge)
    np.testing.assert_array_equal(twice, np.tile(asked.posteriors, (2, 1)))
    lesson = in_loop(world, Mixes(), SoftCrossEntropy(), weight=0)
    order = np.random.default_rng(0).permutation(500)
    part = {name: tensor[order] for name, tensor in lesson.targets.items()}
    clean = torch.from_numpy(np.log(np.maximum(world.clean[order], 1e-30))).requires_grad_()
    loss = lesson.objective.loss(clean, part)
    torch.testing.assert_close(loss.double(), torch.special.entr(part["posteriors"].double()).sum(), rtol=1e-4, atol=0)


def test_noise_cannot_be_followed(world: World) -> None:
    with pytest.raises(DistillError, match="average"):
        DefenseInLoop().check(world.knowledge.pool.spec, GaussianNoise())


# --- rotations ------------------------------------------------------------------------------------------------------


def turned(world: World, asked: TransferSet, **options: Any) -> Lesson:
    recovery = S4L(**options)
    assert isinstance(recovery, TrainingRecovery)
    assert recovery.extra_outputs == 4
    return recovery.lesson(recovery.targets(asked, world.knowledge), SoftCrossEntropy(), world.knowledge)


def test_the_mean_over_rows_is_the_mean_of_each_part(world: World) -> None:
    asked = world.asked(NoDefense())
    lesson = turned(world, asked, weight=0.7, images=30)
    output = torch.randn(620, 14, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = lesson.objective.loss(output, lesson.targets) / lesson.objective.positions(lesson.targets)
    label = -(torch.from_numpy(world.clean) * output[:500, :10].log_softmax(1)).sum(1).mean()
    turn = -output[500:, 10:].log_softmax(1)[torch.arange(120), torch.arange(120) % 4].mean()
    torch.testing.assert_close(loss, label + 0.7 * turn)
    loss.backward()
    assert output.grad is not None
    assert not output.grad[500:, :10].any(), "a turned image says nothing of the classes"
    assert not output.grad[:500, 10:].any(), "an answered one nothing of turns"
    assert output.grad[:500, :10].any()
    assert output.grad[500:, 10:].any()
    for part in (slice(0, 10), slice(600, 610)):  # batches of one kind
        some = {name: tensor[part] for name, tensor in lesson.targets.items()}
        assert torch.isfinite(lesson.objective.loss(output[part], some))


def test_turned_images_are_the_pools(world: World) -> None:
    asked, pool = world.asked(NoDefense()), world.knowledge.pool.inputs[:]
    lesson = turned(world, asked, images=30)
    assert len(lesson.inputs) == 620
    np.testing.assert_array_equal(lesson.inputs[:500], pool[asked.rows])
    known = {image.tobytes() for image in pool}
    images = lesson.inputs[500:].reshape(30, 4, 8, 8, 1)
    assert len({image.tobytes() for image in images[:, 0]} & known) == 30
    for turn in range(4):
        np.testing.assert_array_equal(images[:, turn], np.rot90(images[:, 0], turn, axes=(1, 2)))
    some = np.array([3, 619, 501, 0])
    np.testing.assert_array_equal(lesson.inputs[some], lesson.inputs[:][some])
    assert len(turned(world, asked).inputs) == 5 * 500, "as many images as queries"
    assert len(turned(world, asked, images=10_000).inputs) == 500 + 4 * 719, "the pool has no more"


def test_images_that_an_attack_made_may_be_mixed_in(world: World) -> None:
    asked = world.asked(NoDefense())
    made = np.full((500, 8, 8, 1), 0.25, np.float32)
    lesson = turned(world, replace(asked, rows=np.full(500, -1), made=made), images=30)
    assert lesson.inputs[:].dtype == np.float32
    assert lesson.inputs[:500].max() == 0.25
    assert 0.9 < lesson.inputs[500:].max() <= 1


def test_a_student_learns_turns_and_classes(world: World) -> None:
    student = world.knowledge.student.learn(  # type: ignore[attr-defined]
        turned(world, world.asked(NoDefense()), images=200), world.knowledge.pool.spec, extra=4
    )
    logits = student.predict(world.test)
    assert (logits[:, :10].argmax(axis=1) == world.test_clean.argmax(axis=1)).mean() > 0.8
    quarter = student.predict(np.rot90(world.test, 1, axes=(1, 2)).copy())
    assert (quarter[:, 10:].argmax(axis=1) == 1).mean() > 0.6


@pytest.mark.parametrize("spec", [InputSpec("table", (6,)), InputSpec("text"), InputSpec("image", (8, 6, 1))])
def test_only_square_images_are_turned(spec: InputSpec) -> None:
    with pytest.raises(DistillError, match="square images"):
        S4L().check(spec, NoDefense())
