"""One test for each evaluation error that was found in published extraction code, so that none can come back.

The numbers are those of the list: clipping in normalised space (1; the errors of the same code that come with it are in
`test_adversarial_attacks`), targets drawn anew at each step (2), conditions on the wrong option (3), clean posteriors
as an attacker's prior (4), odds clipped at one (5), double softmax (6), the best epoch on the test set (7), answers
that are no distributions and claims that are not checked (8), students that go on from a smaller budget (9), a label
that is always the first (10), scores of another batch (11), one seed that hides the spread (12).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import distill
from test_adversarial_attacks import UNIT_BOX, Fixed, Normalising, answers_to, pictures
from test_contracts import an_experiment
from test_defenses import perturbed, posteriors
from toys import ToyTeacher, a_pool, a_provider, collect, tables

from distill.attacks import _moves
from distill.attacks.jbda_tr import JBDATR
from distill.errors import DistillError
from distill.objectives.soft_cross_entropy import SoftCrossEntropy
from distill.provider.defenses.label_only import LabelOnly
from distill.provider.defenses.reverse_sigmoid import ReverseSigmoid
from distill.provider.defenses.rounding import Rounding
from distill.provider.oracle import serve
from distill.query import query
from distill.records import Answers, Examples, InputSpec, Queries, TransferSet, one_hot, softmax
from distill.recovery.pbayes import PBayes
from distill.students.lenet import LeNet


def test_1_a_step_is_clipped_in_pixel_space_and_a_black_background_can_stay_black(tmp_path: Path) -> None:
    spec = InputSpec("image", (8, 8, 1))
    module = LeNet().build(spec, 10)
    images = torch.zeros(4, 8, 8, 1, requires_grad=True)  # a background that mean and deviation would make negative
    encoded = LeNet().encode(images.detach().numpy(), spec)[torch.arange(4)]
    (name,) = encoded
    loss = torch.nn.functional.cross_entropy(module(**{name: images}), torch.arange(4))
    (gradient,) = torch.autograd.grad(loss, images)
    moved = (images.detach() + 0.1 * gradient.sign()).clamp(0, 1)
    assert (gradient < 0).any(), "some steps would leave the box"
    assert (moved[gradient < 0] == 0).all(), "and end on its border: pixel 0, not the mean of the data"
    pool = Examples(images.detach().numpy(), spec)

    class Blind(ToyTeacher):
        def predict(self, inputs: np.ndarray) -> np.ndarray:
            return np.zeros((len(inputs), 4), np.float32)

    with serve(a_provider(tmp_path, Blind(), spec=spec)) as oracle:
        oracle.ask(Queries.made(moved.numpy()))
        with pytest.raises(DistillError, match=r"pixels of float32 images lie in \[0, 1\]"):
            oracle.ask(Queries.made(pool.inputs[:] - np.float32(0.42)))


def test_2_a_target_is_drawn_once_for_an_input_and_not_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, aim = [], _moves.towards

    def watched(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        steps.append(classes.tolist())
        return aim(logits, classes)

    monkeypatch.setattr(_moves, "towards", watched)
    starts = pictures(9)
    JBDATR(steps=5, k=2).moves(Fixed(Normalising(0)), starts, answers_to(starts), 0, UNIT_BOX, np.random.default_rng(0))
    assert len(steps) == 5
    assert all(targets == steps[0] for targets in steps)
    assert len(set(steps[0])) > 1


def test_3_what_only_a_recovery_does_is_not_decided_by_the_name_of_a_defense(tmp_path: Path) -> None:
    words = ("recovery=s4l", "student=lenet", "training.epochs=1")
    for defense in ("none", "rounding"):
        experiment = an_experiment(tmp_path / defense, f"defense={defense}", *words)
        transfer_set, _ = query(experiment)
        student = experiment.students.fit(transfer_set, experiment.pool)
        assert student.history["rows"] == 5 * len(transfer_set), "each answer, and as many images in four turns"


def test_4_an_attackers_prior_holds_nothing_but_its_answers(tmp_path: Path) -> None:
    experiment = an_experiment(tmp_path, "recovery=pbayes", "recovery.samples=2000", "defense=reverse_sigmoid")
    transfer_set, _ = query(experiment)
    knowledge = experiment.students._knowledge(transfer_set, experiment.pool)
    assert knowledge.clean is None
    first = PBayes(samples=2000).targets(transfer_set, knowledge).targets
    shuffled = np.random.default_rng(0).permutation(transfer_set.posteriors.T).T  # other answers, another prior
    second = PBayes(samples=2000).targets(replace(transfer_set, posteriors=shuffled), knowledge).targets
    assert first is not None
    assert second is not None
    assert not np.allclose(first, second)


def test_5_reverse_sigmoid_does_not_clip_the_odds_at_one() -> None:
    clean = Answers(np.array([[0.9, 0.05, 0.03, 0.02]], np.float32))
    returned = perturbed(ReverseSigmoid(beta=0.3, gamma=0.2), clean).posteriors[0]
    assert returned[0] == pytest.approx(0.777, abs=5e-4)  # 0.784 with the odds clipped


def test_6_answers_are_taken_as_probabilities_not_as_logits() -> None:
    answers = np.array([[0.97, 0.01, 0.01, 0.01]], np.float32)
    objective = SoftCrossEntropy()
    targets = objective.prepare(TransferSet(np.arange(1), answers))
    entropy = -(answers * np.log(answers)).sum()
    at_the_answer = objective.loss(torch.from_numpy(np.log(answers)), targets)
    assert at_the_answer.item() == pytest.approx(entropy, rel=1e-5)
    twice = objective.loss(torch.from_numpy(answers), targets)  # a student that is as unsure as softmax(softmax) says
    assert twice.item() > 3 * entropy


def test_7_the_test_rows_select_nothing(tmp_path: Path) -> None:
    words = ("training=early_stopping", "training.epochs=3")
    experiment = an_experiment(tmp_path, *words)
    transfer_set, _ = query(experiment)
    student = experiment.students.fit(transfer_set, experiment.pool)
    mislabelled = replace(experiment.data.test, labels=(np.asarray(experiment.data.test_labels) + 1) % 10)
    experiment.data = replace(experiment.data, test=mislabelled)
    again = experiment.students.fit(transfer_set, experiment.pool)
    assert again.history["curve"] == student.history["curve"]
    assert student.history["validation_rows"] > 0, "what selects is held out of the attacker's own queries"
    assert student.history["rows"] + student.history["validation_rows"] == len(transfer_set)


@pytest.mark.parametrize("defense", [Rounding(1), ReverseSigmoid(beta=1.0, gamma=0.2)])
def test_8_answers_are_distributions_and_a_label_is_claimed_only_where_it_holds(defense) -> None:
    clean = Answers(posteriors(10))
    returned = perturbed(defense, clean)
    np.testing.assert_allclose(returned.posteriors.sum(axis=1, dtype=np.float64), 1, atol=1e-5)
    kept = (returned.labels == clean.labels).all()
    assert kept == defense.keeps_argmax


def test_9_a_larger_budget_does_not_go_on_from_the_student_of_a_smaller_one(tmp_path: Path) -> None:
    experiment = an_experiment(tmp_path)
    transfer_set, _ = query(experiment)
    test = experiment.data.test.inputs
    alone = experiment.students.fit(transfer_set, experiment.pool).predict(test)
    experiment.students.fit(transfer_set.head(20), experiment.pool)
    after = experiment.students.fit(transfer_set, experiment.pool).predict(test)
    np.testing.assert_array_equal(after, alone)


def test_10_a_label_is_that_of_its_row() -> None:
    clean = Answers(posteriors(10))
    returned = perturbed(LabelOnly(), clean)
    np.testing.assert_array_equal(returned.posteriors, one_hot(clean.posteriors.argmax(axis=1), 10))
    assert len(set(returned.labels.tolist())) == 10


def test_11_every_answer_is_recorded_with_its_own_query(tmp_path: Path) -> None:
    pool, rows = a_pool(40), np.random.default_rng(3).permutation(40)
    collect(a_provider(tmp_path), pool, rows, 7)
    logged: dict[int, np.ndarray] = {}
    for path in sorted((tmp_path / "provider_log").glob("*.npz")):
        with np.load(path) as shard:
            logged |= dict(zip(shard["row"].tolist(), shard["posteriors"], strict=True))
    assert sorted(logged) == list(range(40))
    np.testing.assert_array_equal(
        np.stack([logged[row] for row in range(40)]), softmax(ToyTeacher().predict(tables(40)))
    )


def test_12_a_table_says_how_many_rows_and_which_seeds(tmp_path: Path) -> None:
    words = ("+experiment=quickstart", "budget.queries=60", "training.epochs=1", "curve=[]")
    said = distill("train", *words, "-m", "seed=0,1", cwd=tmp_path).stdout
    assert "n = 360 test rows; seeds 0, 1" in said
