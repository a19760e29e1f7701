from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from distill.attacks._bandit import Bandit, Standardised
from distill.attacks._made import Asked
from distill.attacks._options import at_least, positive
from distill.attacks._own import STANDARDISED_ON, Showing, begin, numbers, own_randomness, soft_cross_entropy
from distill.contracts import Apprentice, Learner, Oracle
from distill.errors import DistillError, nearest
from distill.randomness import generator
from distill.records import Examples, Queries, Reveals, TransferSet

REWARDS = ("certainty", "diversity", "loss")
STUDENT_BATCH = 64


class KnockoffAdaptive:
    """A gradient bandit over the pool's classes asks about more inputs of those whose answers were worth most.

    Paper: Knockoff Nets: Stealing Functionality of Black-Box Models, Orekondy et al., CVPR 2019, sec. 4.1.2
    ("adaptive"). Threat model: a pool that is labelled with classes of its own, which need not be the teacher's. An
    answer y to an input of class z, drawn from pi = softmax(H), earns a reward r, and
    ``H_z += (r - mean)(1 - pi_z) / N_z``, ``H_i -= (r - mean) pi_i / N_z`` for the others, where N_z counts the draws
    of z and the mean is that of the last `window` rewards. The rewards are

    - certainty: the largest entry of y minus the second;
    - diversity: ``sum_k max(0, y_k - mean_k)``, the mean of the last `window` answers;
    - loss: the cross-entropy between y and the attack's own student, which has not seen y yet.

    The attack's own student (track B) goes on learning all the time: after each update of the policy it takes a step
    of Adam on 64 random ones of the queries so far.

    Labels alone are enough, but then certainty is always 1, which says nothing. Texts are left out, since a student of
    theirs takes no single steps. All sums stay finite whatever the rewards are: each is clipped, and is 0 while it has
    never varied.

    Departs from the paper: no hierarchy over the classes; each reward is standardised by its running mean and
    deviation (the paper scales it to [0, 1]); the student replays earlier queries. From memory: `window`.

    Args:
        reward: certainty, diversity, loss, or all for the mean of the three.
        batch: Queries between two updates; more make it faster and the policy staler.
        window: Over how many rewards and answers means are taken.
        lr: Adam's rate, of the attack's own student.

    Raises:
        DistillError: The pool has no labels, or an option is out of its range.
    """

    requires: ClassVar[Reveals] = Reveals.LABEL
    uses_teacher: ClassVar[bool] = True
    adapts: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = ("image", "table")

    def __init__(self, reward: str = "all", batch: int = 1, window: int = 25, lr: float = 1e-3) -> None:
        if reward not in ("all", *REWARDS):
            raise ValueError(f"reward has no '{reward}'.{nearest(str(reward), ('all', *REWARDS))}")
        at_least(1, batch=batch, window=window)
        positive(lr=lr)
        self.rewards = REWARDS if reward == "all" else (reward,)
        self.batch, self.window, self.lr = batch, window, lr

    def extract(self, oracle: Oracle, pool: Examples, student: Apprentice, seed: int) -> TransferSet:
        """See `distill.contracts.Attack`. Asks about each row at most once."""
        if pool.labels is None:
            raise DistillError(
                f"knockoff_adaptive chooses among the classes of its pool, and {pool.name} has no labels; choose "
                "another pool, or attack=knockoff_random",
                "attack",
            )
        rng = generator(seed, "attack")
        asked, total = Asked(oracle, pool), min(oracle.affordable(), len(pool))
        showing = Showing(student, total)
        own = begin(student, pool.inputs[:STANDARDISED_ON])
        optimizer = torch.optim.Adam(own.module.parameters(), lr=self.lr, fused=True)
        bandit = Bandit(pool.labels, self.window, rng)
        worth = {name: Standardised() for name in self.rewards}
        rows, posteriors = np.empty(0, dtype=np.int64), np.empty((0, oracle.classes), dtype=np.float32)
        with own_randomness(own, seed):
            while len(rows) < total:
                drawn = bandit.draw(min(self.batch, total - len(rows)))
                inputs = numbers(pool.inputs[drawn], own.device)
                answers = asked.ask(Queries.of_pool(pool, drawn)).posteriors
                earned = self._earned(answers, posteriors[-self.window :], own, inputs)
                bandit.learn(np.mean([worth[name](earned[name]) for name in self.rewards], axis=0))
                rows, posteriors = np.concatenate([rows, drawn]), np.concatenate([posteriors, answers])
                some = rng.integers(len(rows), size=STUDENT_BATCH)
                own.module.train()
                targets = torch.from_numpy(posteriors[some]).to(own.device)
                loss = soft_cross_entropy(own.logits(numbers(pool.inputs[rows[some]], own.device)), targets).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                showing.after(own, len(rows))
        return asked.transfer_set(f"{type(self).__name__} ({', '.join(self.rewards)})")

    def _earned(
        self, answers: np.ndarray, before: np.ndarray, own: Learner, inputs: torch.Tensor
    ) -> dict[str, np.ndarray]:
        """(n,) rewards of each kind for (n, classes) answers, given the last ones before them."""
        recent = np.concatenate([before, answers])
        first = len(before)
        means = [recent[max(0, first + i - self.window) : max(1, first + i)].mean(axis=0) for i in range(len(answers))]
        top = np.sort(answers, axis=1)
        own.module.eval()
        with torch.no_grad():
            loss = soft_cross_entropy(own.logits(inputs), torch.from_numpy(answers).to(own.device))
        return {
            "certainty": top[:, -1] - top[:, -2],
            "diversity": np.maximum(0, answers - np.array(means)).sum(axis=1),
            "loss": loss.cpu().numpy(),
        }
