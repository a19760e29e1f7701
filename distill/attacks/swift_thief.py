from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from distill.attacks._contrastive import Heads, pair_weights, simsiam, soft_supervised
from distill.attacks._made import Asked
from distill.attacks._options import at_least, positive
from distill.attacks._own import Showing, begin, numbers, own_randomness, soft_cross_entropy
from distill.attacks._views import views
from distill.attacks.rounds import random_rows
from distill.contracts import Apprentice, Learner, Oracle
from distill.errors import DistillError
from distill.randomness import derive, generator
from distill.records import Examples, Queries, Reveals, TransferSet, softmax

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
MATCHED_AT_ONCE = 100  # queries of a step of output matching
RARE_STEPS = 5  # a round on rare classes counts them anew so often
BANDWIDTH = 0.5  # of the density of a rare class
ROWS_AT_ONCE = 1024


class SwiftThief:
    """A student that also learns from what it did not ask about, by contrastive learning, chooses what to ask.

    Paper: SwiftThief: Enhancing Query Efficiency of Model Stealing by Contrastive Learning, Lee, Han and Lee, IJCAI
    2024. Threat model: posteriors or labels, a pool of unlabelled images far larger than the budget.

    The first round's queries are random. After each round the attack's own student, which goes on learning (track B),
    takes two views of images of the pool and minimises, on a projection of what enters its last linear layer,
    SimSiam's loss for unqueried images plus `weight` times a soft-supervised one for queried images: the negative
    cosine of prediction and projection of each pair, weighted with how sure the two answers are and how alike
    (`distill.attacks._contrastive`). Then it minimises the cross-entropy with the answers. The next round asks about
    the unqueried images of which it is least sure (entropy), until what is left of the budget is no more than the
    rare classes lack to be as frequent as the mean: from then on, about those that are nearest (a Gaussian density of
    bandwidth 0.5 over representations) to the queries of the rarest class that was answered so far.

    From memory and the authors' released programs, where the paper was not at hand: the weights, the schedule, ten
    rounds, the rates. Departs from them: 2 and 10 epochs a round instead of 40 and 50 (a CPU's hour), narrower heads,
    no adversarial views, no costs for classes, images are cropped and lit but neither mirrored nor recoloured, the
    number of unqueried images does not grow from round to round, all draws are with replacement.

    Args:
        rounds: The budget is spent in this many rounds of equal size.
        contrastive_epochs: Passes of contrastive learning a round, over `unlabelled` images.
        matching_epochs: Passes over the queries a round.
        unlabelled: Unqueried images of an epoch, at most.
        batch_size: Images of a contrastive step, of either sort.
        weight: Of the soft-supervised loss.
        contrastive_lr: SGD's rate, cosine schedule to 0 in each round.
        lr: SGD's rate of output matching.
        width: Of the projection.

    Raises:
        ValueError: An option is out of its range.
        DistillError: The student has no linear layer.
    """

    requires: ClassVar[Reveals] = Reveals.LABEL
    uses_teacher: ClassVar[bool] = True
    adapts: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = ("image",)

    def __init__(
        self,
        rounds: int = 10,
        contrastive_epochs: int = 2,
        matching_epochs: int = 10,
        unlabelled: int = 5000,
        batch_size: int = 512,
        weight: float = 1.0,
        contrastive_lr: float = 0.06,
        lr: float = 0.01,
        width: int = 256,
    ) -> None:
        at_least(1, rounds=rounds, contrastive_epochs=contrastive_epochs, matching_epochs=matching_epochs)
        at_least(1, unlabelled=unlabelled, width=width)
        at_least(2, batch_size=batch_size)
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight is at least 0, not {weight}")
        positive(contrastive_lr=contrastive_lr, lr=lr)
        self.rounds, self.contrastive_epochs, self.matching_epochs = rounds, contrastive_epochs, matching_epochs
        self.unlabelled, self.batch_size, self.weight = unlabelled, batch_size, weight
        self.contrastive_lr, self.lr, self.width = contrastive_lr, lr, width

    def extract(self, oracle: Oracle, pool: Examples, student: Apprentice, seed: int) -> TransferSet:
        """See `distill.contracts.Attack`. Asks about each image at most once."""
        asked, total = Asked(oracle, pool), min(oracle.affordable(), len(pool))
        own = begin(student, pool.inputs[:1])
        thief = _Thief(self, own, pool, oracle.classes, seed)
        showing = Showing(student, total)
        rng = generator(seed, "attack")
        with own_randomness(own, seed):
            for ends in np.ceil(np.linspace(0, total, self.rounds + 1)).astype(int)[1:]:
                began = len(thief.rows)
                rare = began > 0 and total - began <= lacking(thief.answers)
                for until in np.unique(np.linspace(began, ends, (RARE_STEPS if rare else 1) + 1).astype(int))[1:]:
                    n = int(until) - len(thief.rows)
                    if not began:
                        rows = random_rows(pool, n, rng)
                    else:
                        rows = thief.like_the_rarest(n) if rare else thief.unsure(n)
                    thief.take(rows, asked.ask(Queries.of_pool(pool, rows)).posteriors)
                if len(thief.rows) > began:
                    thief.contrast()
                    thief.match()
                    showing.after(own, len(thief.rows))
        return asked.transfer_set(type(self).__name__)


def lacking(answers: np.ndarray) -> float:
    """How many more answers the classes that are rarer than the mean would need to be as frequent as it.

    Args:
        answers: (n, classes), whose labels are counted.
    """
    counts = np.bincount(answers.argmax(axis=1), minlength=answers.shape[1])
    return float(np.maximum(0, counts.mean() - counts).sum())


class _Thief:
    """What SwiftThief knows, and how it learns and chooses."""

    def __init__(self, options: SwiftThief, own: Learner, pool: Examples, classes: int, seed: int) -> None:
        linear = [part for part in own.module.modules() if isinstance(part, nn.Linear)]
        if not linear:
            raise DistillError("swift_thief needs a student that ends in a linear layer, such as lenet", "student")
        self.options, self.own, self.pool, self.seed = options, own, pool, seed
        self.last = linear[-1]
        self.rows, self.answers = np.empty(0, dtype=np.int64), np.empty((0, classes), dtype=np.float32)
        self.rng = torch.Generator().manual_seed(derive(seed, "attack", "draws"))
        with own_randomness(own, seed):
            self.heads = Heads(self.last.in_features, options.width).to(own.device)

    @property
    def unqueried(self) -> np.ndarray:
        return np.setdiff1d(np.arange(len(self.pool)), self.rows)

    def take(self, rows: np.ndarray, answers: np.ndarray) -> None:
        self.rows, self.answers = np.concatenate([self.rows, rows]), np.concatenate([self.answers, answers])

    # --- learning -----------------------------------------------------------------------------------------------------

    def contrast(self) -> None:
        """Learn from images of the pool which of them are alike."""
        options, own, unqueried = self.options, self.own, self.unqueried
        own.module.train()
        size = max(2, min(options.batch_size, max(len(unqueried), len(self.rows))))
        steps = options.contrastive_epochs * -(-min(options.unlabelled, len(self.pool)) // size)
        parameters = [*own.module.parameters(), *self.heads.parameters()]
        optimizer = torch.optim.SGD(parameters, options.contrastive_lr, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            loss = options.weight * self._supervised(min(size, max(2, len(self.rows))))
            if len(unqueried):
                loss = loss + self._self_supervised(unqueried, size)
            _step(optimizer, loss)
            schedule.step()

    def match(self) -> None:
        """Learn what was answered."""
        options, own, asked = self.options, self.own, len(self.rows)
        own.module.train()
        parameters = list(own.module.parameters())
        optimizer = torch.optim.SGD(parameters, options.lr, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
        for _ in range(options.matching_epochs * -(-asked // MATCHED_AT_ONCE)):
            some = self._some(asked, min(MATCHED_AT_ONCE, max(2, asked)))
            _step(optimizer, soft_cross_entropy(own.logits(self._images(self.rows[some])), self._told(some)).mean())

    def _self_supervised(self, unqueried: np.ndarray, size: int) -> torch.Tensor:
        images = self._images(unqueried[self._some(len(unqueried), size)])
        (p1, z1), (p2, z2) = self._seen(images), self._seen(images)
        return simsiam(p1, z1, p2, z2)

    def _supervised(self, size: int) -> torch.Tensor:
        some = self._some(len(self.rows), size)
        weights = pair_weights(self._told(some))
        p, z = self._seen(self._images(self.rows[some]))
        return soft_supervised(p, z, weights)

    def _seen(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions and projections of a view of each."""
        view = views(images, self.rng, crop=0.6, turn=0, intensity=0.4, mirror=False)
        return self.heads(self.representations(view))

    def representations(self, images: torch.Tensor) -> torch.Tensor:
        """(n, features): what enters the student's last linear layer."""
        entered: list[torch.Tensor] = []
        hook = self.last.register_forward_pre_hook(lambda _, given: entered.append(given[0]))
        try:
            self.own.logits(images)
        finally:
            hook.remove()
        return entered[0].flatten(1)

    def _images(self, rows: np.ndarray) -> torch.Tensor:
        return numbers(self.pool.inputs[rows], self.own.device)

    def _told(self, places: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.answers[places]).to(self.own.device)

    def _some(self, of: int, n: int) -> np.ndarray:
        return torch.randint(of, (n,), generator=self.rng).numpy()

    # --- choosing -----------------------------------------------------------------------------------------------------

    def unsure(self, n: int) -> np.ndarray:
        """(n,) unqueried rows of largest entropy."""
        unqueried = self.unqueried
        posteriors = softmax(self.own.predict(self.pool.take(unqueried).inputs)).astype(np.float64)
        entropy = -(posteriors * np.log(np.maximum(posteriors, 1e-12))).sum(axis=1)
        return unqueried[np.argsort(-entropy, kind="stable")[:n]]

    def like_the_rarest(self, n: int) -> np.ndarray:
        """(n,) unqueried rows where the queries of the rarest class that was answered lie densest."""
        labels = self.answers.argmax(axis=1)
        told, counts = np.unique(labels, return_counts=True)
        centres = self._represented(self.rows[labels == told[counts.argmin()]])
        unqueried = self.unqueried
        density = [
            (-(torch.cdist(some, centres) ** 2) / (2 * BANDWIDTH**2)).logsumexp(dim=1)
            for some in self._represented(unqueried).split(ROWS_AT_ONCE)
        ]
        return unqueried[np.argsort(-torch.cat(density).cpu().numpy(), kind="stable")[:n]]

    @torch.no_grad()
    def _represented(self, rows: np.ndarray) -> torch.Tensor:
        self.own.module.eval()
        parts = range(0, len(rows), ROWS_AT_ONCE)
        return torch.cat([self.representations(self._images(rows[start : start + ROWS_AT_ONCE])) for start in parts])


def _step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
