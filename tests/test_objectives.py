"""Each objective against its closed form or an independent computation in float64."""

import numpy as np
import pytest
import torch

from distill.objectives.hard_cross_entropy import HardCrossEntropy
from distill.objectives.kl import KL
from distill.objectives.logit_mse import LogitMSE
from distill.objectives.soft_cross_entropy import SoftCrossEntropy
from distill.records import Reveals, TransferSet, softmax

ALL = [SoftCrossEntropy(), HardCrossEntropy(), KL(), LogitMSE()]


def case(seed: int = 0, n: int = 7, classes: int = 5) -> tuple[torch.Tensor, np.ndarray]:
    """Student logits that need gradients, in float64, and the teacher's logits."""
    rng = np.random.default_rng(seed)
    output = torch.tensor(rng.normal(size=(n, classes)) * 3, requires_grad=True)
    return output, (rng.normal(size=(n, classes)) * 3).astype(np.float32)


def answers(posteriors: np.ndarray, **more: np.ndarray) -> TransferSet:
    return TransferSet(np.arange(len(posteriors)), posteriors.astype(np.float32), **more)


def double(targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in targets.items()}


def log_softmax(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return values - np.log(np.exp(values).sum(axis=1, keepdims=True))


def test_soft_cross_entropy_and_its_gradient():
    output, teacher = case()
    objective = SoftCrossEntropy()
    targets = double(objective.prepare(answers(softmax(teacher))))
    loss = objective.loss(output, targets)
    loss.backward()
    t, log_q = targets["posteriors"].numpy(), log_softmax(output.detach().numpy())
    assert loss.item() == pytest.approx(-(t * log_q).sum(), rel=1e-12)
    np.testing.assert_allclose(output.grad.numpy(), t.sum(1, keepdims=True) * np.exp(log_q) - t, atol=1e-12)


def test_hard_cross_entropy_takes_the_first_largest_entry():
    output, _ = case(n=3, classes=3)
    objective = HardCrossEntropy()
    targets = objective.prepare(answers(np.array([[0.4, 0.4, 0.2], [0.1, 0.2, 0.7], [0.2, 0.4, 0.4]])))
    assert targets["labels"].tolist() == [0, 2, 1]
    log_q = log_softmax(output.detach().numpy())
    assert objective.loss(output, targets).item() == pytest.approx(-log_q[[0, 1, 2], [0, 2, 1]].sum(), rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_kl_is_that_of_tempered_logits(temperature: float):
    output, teacher = case()
    objective = KL(temperature)
    loss = objective.loss(output, double(objective.prepare(answers(softmax(teacher)))))
    loss.backward()
    log_t, log_q = log_softmax(teacher / temperature), log_softmax(output.detach().numpy() / temperature)
    expected = temperature**2 * (np.exp(log_t) * (log_t - log_q)).sum()
    assert loss.item() == pytest.approx(expected, rel=1e-5)  # posteriors are float32
    np.testing.assert_allclose(output.grad.numpy(), temperature * (np.exp(log_q) - np.exp(log_t)), atol=1e-5)


def test_kl_at_temperature_one_is_soft_cross_entropy_less_the_entropy():
    output, teacher = case()
    targets = answers(softmax(teacher))
    kl, cross = KL(1.0), SoftCrossEntropy()
    t = targets.posteriors.astype(np.float64)
    entropy = -(t * np.log(t)).sum()
    difference = cross.loss(output, double(cross.prepare(targets))) - kl.loss(output, double(kl.prepare(targets)))
    assert difference.item() == pytest.approx(entropy, rel=1e-5)


def test_kl_is_zero_for_a_perfect_student():
    _, teacher = case()
    objective = KL(4.0)
    loss = objective.loss(torch.tensor(teacher).double(), double(objective.prepare(answers(softmax(teacher)))))
    assert loss.item() == pytest.approx(0, abs=1e-5)


def test_logit_mse_with_posteriors_recovers_the_logits():
    output, teacher = case()
    objective = LogitMSE(floor=1e-12)
    revealed = double(objective.prepare(answers(softmax(teacher), logits=teacher)))
    recovered = double(objective.prepare(answers(softmax(teacher))))
    torch.testing.assert_close(revealed["centred"], recovered["centred"], atol=1e-4, rtol=1e-4)
    z, v = output.detach().numpy(), teacher.astype(np.float64)
    z, v = z - z.mean(1, keepdims=True), v - v.mean(1, keepdims=True)
    loss = objective.loss(output, revealed)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * ((z - v) ** 2).sum(), rel=1e-6)
    np.testing.assert_allclose(output.grad.numpy(), z - v, atol=1e-6)


def test_logit_mse_does_not_use_logits_that_a_recovery_has_overruled():
    _, teacher = case()
    changed = np.full_like(teacher, 1 / teacher.shape[1])
    targets = LogitMSE().prepare(answers(softmax(teacher), logits=teacher, targets=changed))
    torch.testing.assert_close(targets["centred"], torch.zeros(teacher.shape))


@pytest.mark.parametrize("objective", ALL, ids=lambda objective: type(objective).__name__)
class TestEveryObjective:
    def test_takes_answers_with_zeros(self, objective):
        posteriors = np.eye(4, dtype=np.float32)[[0, 1, 3]]
        output = torch.tensor([[80.0, -80.0, 0.0, 1.0]] * 3, requires_grad=True)
        loss = objective.loss(output, objective.prepare(answers(posteriors)))
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(output.grad).all()

    def test_its_gradient_is_right(self, objective):
        output, teacher = case(n=3)
        targets = double(objective.prepare(answers(softmax(teacher))))
        assert torch.autograd.gradcheck(lambda logits: objective.loss(logits, targets), (output,))

    def test_is_a_sum_over_rows_and_counts_them(self, objective):
        output, teacher = case()
        targets = double(objective.prepare(answers(softmax(teacher))))
        parts = [{name: value[rows] for name, value in targets.items()} for rows in (slice(0, 2), slice(2, 7))]
        whole = objective.loss(output, targets)
        torch.testing.assert_close(whole, objective.loss(output[:2], parts[0]) + objective.loss(output[2:], parts[1]))
        assert [objective.positions(part) for part in (targets, *parts)] == [7, 2, 5]

    def test_trains_on_what_a_recovery_set(self, objective):
        _, teacher = case()
        other = softmax(teacher[:, ::-1].copy())
        given = objective.prepare(answers(softmax(teacher), targets=other))
        expected = objective.prepare(answers(other))
        for name in expected:
            torch.testing.assert_close(given[name], expected[name])


def test_what_each_requires():
    assert [objective.requires for objective in ALL] == [Reveals.LABEL, Reveals.LABEL, Reveals.PROBS, Reveals.PROBS]


@pytest.mark.parametrize("make", [lambda: KL(0.0), lambda: KL(-1.0), lambda: LogitMSE(0.0), lambda: LogitMSE(1.0)])
def test_options_out_of_range(make):
    with pytest.raises(ValueError, match=r"temperature is|floor lies"):
        make()
