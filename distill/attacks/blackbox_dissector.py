from __future__ import annotations

import logging
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from distill.attacks._options import at_least
from distill.attacks._own import Showing, numbers
from distill.contracts import Apprentice, Learner, Oracle
from distill.randomness import generator
from distill.records import Examples, Queries, Reveals, TransferSet, one_hot, softmax

AREA, RATIO = (0.02, 0.4), (0.3, 3.3)  # of an erased rectangle: share of the image, height to width (Zhong et al. 2020)
ROWS_AT_ONCE = 256

log = logging.getLogger(__name__)


class BlackboxDissector:
    """Erase what a student looks at, and ask about the erased images of which it is least sure: labels tell more so.

    Paper: Black-Box Dissector: Towards Erasing-Based Hard-Label Model Stealing Attack, Wang et al., ECCV 2022. Threat
    model: labels (only the label of each answer is kept, as in `distill.attacks.copycat.Copycat`), a pool of unlabelled
    images.

    The first round asks about random images. After each round a fresh student is trained on what was answered and,
    with pseudo-labels, on unqueried images: the pseudo-label of an image is the mean posterior, of the student
    before, over `proposals` randomly erased variants of it (self-distillation by random erasing). In the next round a
    share `erased` of the queries are erased variants of images asked before: of `proposals` rectangles around points
    that are drawn where the student's Grad-CAM for the answered label is large, the one that leaves the least
    confidence in that label; and of all images, those whose variant leaves the student least sure of anything. The
    others are random images of the pool. Once the pool is used up, all are erased, up to twice as many queries as the
    pool has images. The students are the attack's own (track B) and are shown.

    Grad-CAM is taken at the last convolution; of a student without one, the size of the input's gradient stands in for
    it. An erased rectangle holds random bytes, so a query is an image like any other.

    Departs from the paper: students are trained by the run's recipe and objective, and consistency with the
    pseudo-labels is that of targets. From memory: the rounds and how they are shared out.

    Args:
        rounds: The budget is spent in this many rounds of equal size.
        erased: Share of a round's queries that are erased variants, after the first round.
        proposals: Erased variants among which one is chosen, and over which pseudo-labels are averaged.
        pseudo_labelled: Unqueried images with a pseudo-label, for each query so far.

    Raises:
        ValueError: An option is out of its range.
    """

    requires: ClassVar[Reveals] = Reveals.LABEL
    uses_teacher: ClassVar[bool] = True
    adapts: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = ("image",)

    def __init__(self, rounds: int = 5, erased: float = 0.5, proposals: int = 10, pseudo_labelled: float = 1.0) -> None:
        at_least(1, rounds=rounds, proposals=proposals)
        if not 0 <= erased <= 1:
            raise ValueError(f"erased lies between 0 and 1, not {erased}")
        if not 0 <= pseudo_labelled < float("inf"):
            raise ValueError(f"pseudo_labelled is at least 0, not {pseudo_labelled}")
        self.rounds, self.erased, self.proposals, self.pseudo_labelled = rounds, erased, proposals, pseudo_labelled

    def extract(self, oracle: Oracle, pool: Examples, student: Apprentice, seed: int) -> TransferSet:
        """See `distill.contracts.Attack`. The transfer set holds labels, one-hot: twice as many as the pool at most."""
        rng = generator(seed, "attack")
        total = min(affordable := oracle.affordable(), 2 * len(pool))
        showing = Showing(student, total)
        order = rng.permutation(len(pool))  # its first ones were asked about, as they are
        rows, labels = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        made: list[np.ndarray] = []
        own: Learner | None = None
        while len(rows) < total:
            n = min(-(-total // self.rounds), total - len(rows))
            whole = np.flatnonzero(rows >= 0)
            altered = 0 if own is None else min(max(round(self.erased * n), n - (len(pool) - len(whole))), len(whole))
            if own is not None and altered:
                made.append(self._erased(own, pool, rows[whole], labels[whole], altered, rng))
                answers = oracle.ask(Queries.made(made[-1]))
                rows = np.concatenate([rows, np.full(altered, -1)])
                labels = np.concatenate([labels, answers.labels])
            fresh = order[len(whole) : len(whole) + n - altered]
            if len(fresh):
                answers = oracle.ask(Queries.of_pool(pool, fresh))
                rows, labels = np.concatenate([rows, fresh]), np.concatenate([labels, answers.labels])
            told = TransferSet(
                rows=rows,
                posteriors=one_hot(labels, oracle.classes),
                made=np.concatenate(made) if made else None,
                pool=pool.fingerprint,
                profile="label",
                note=f"{type(self).__name__} on {pool.name}",
            )
            unqueried = order[len(whole) + len(fresh) :]
            own = student.fit(self._with_pseudo_labels(told, own, pool, unqueried, rng), pool)
            showing.after(own, len(rows))
        if total < affordable:
            log.warning("the attack ended after %d of %d affordable queries (pool: %d)", total, affordable, len(pool))
        return told

    def _erased(
        self,
        own: Learner,
        pool: Examples,
        rows: np.ndarray,
        labels: np.ndarray,
        n: int,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """(n, height, width, channels) images of those `rows`, each with what matters to its label erased."""
        chosen, sure = [], []
        for start in range(0, len(rows), ROWS_AT_ONCE):
            images, answered = pool.inputs[rows[start : start + ROWS_AT_ONCE]], labels[start : start + ROWS_AT_ONCE]
            attention = attention_to(own, images, answered)
            variants = np.stack([erase(images, attention, rng) for _ in range(self.proposals)])
            posteriors = np.stack([softmax(own.predict(variant)) for variant in variants])
            places = np.arange(len(images))
            best = posteriors[:, places, answered].argmin(axis=0)
            chosen.append(variants[best, places])
            sure.append(posteriors[best, places].max(axis=1))
        return np.concatenate(chosen)[np.argsort(np.concatenate(sure), kind="stable")[:n]]

    def _with_pseudo_labels(
        self, told: TransferSet, before: Learner | None, pool: Examples, unqueried: np.ndarray, rng: np.random.Generator
    ) -> TransferSet:
        """The queries with their labels and, once there is a student, some unqueried images with its own."""
        rows = unqueried[: round(self.pseudo_labelled * len(told))]
        if before is None or not len(rows):
            return replace(told, targets=told.posteriors)
        posteriors = [told.posteriors]
        for some in np.split(rows, range(ROWS_AT_ONCE, len(rows), ROWS_AT_ONCE)):
            anywhere = np.ones((len(some), *pool.spec.shape[:2]))
            variants = [erase(pool.inputs[some], anywhere, rng) for _ in range(self.proposals)]
            posteriors.append(np.mean([softmax(before.predict(variant)) for variant in variants], axis=0))
        targets = np.concatenate(posteriors)
        return replace(told, rows=np.concatenate([told.rows, rows]), posteriors=targets, targets=targets)


def attention_to(own: Learner, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(n, height, width) non-negative float64: how much each pixel matters to the student's logit of a label.

    Grad-CAM (Selvaraju et al., ICCV 2017, eq. 1 and 2) at the last convolution, bilinear; of a student without one, the
    input's gradient, summed over channels without its sign.

    Args:
        own: The student.
        images: (n, height, width, channels).
        labels: (n,).
    """
    convolutions = [part for part in own.module.modules() if isinstance(part, nn.Conv2d)]
    pixels = numbers(images, own.device).requires_grad_()
    maps: list[torch.Tensor] = []
    own.module.eval()
    hooks = [part.register_forward_hook(lambda *seen: maps.append(seen[-1])) for part in convolutions[-1:]]
    try:
        logits = own.logits(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    score = logits[torch.arange(len(images)), torch.from_numpy(labels).to(own.device)].sum()
    (gradient,) = torch.autograd.grad(score, maps or [pixels])
    if maps:
        cam = (gradient.mean(dim=(2, 3), keepdim=True) * maps[0]).sum(dim=1, keepdim=True).relu()
        attention = functional.interpolate(cam, size=images.shape[1:3], mode="bilinear")[:, 0]
    else:
        attention = gradient.abs().sum(dim=3)
    return attention.detach().cpu().numpy().astype(np.float64)


def erase(images: np.ndarray, attention: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Copies of (n, height, width, channels) images with one rectangle of each filled with random pixels.

    The rectangle's centre is drawn in proportion to the (n, height, width) attention; anywhere, where that is 0. Its
    area and the ratio of its sides are uniform and log-uniform, and it is cut off at the image's edge.
    """
    n, height, width, _ = images.shape
    weights = attention.reshape(n, -1)
    weights = np.where(weights.sum(axis=1, keepdims=True) > 0, weights, 1.0)
    cumulated = weights.cumsum(axis=1)
    centre = (cumulated <= rng.random((n, 1)) * cumulated[:, -1:]).sum(axis=1).clip(max=height * width - 1)
    area = height * width * rng.uniform(AREA[0], AREA[1], n)
    ratio = np.exp(rng.uniform(np.log(RATIO[0]), np.log(RATIO[1]), n))
    tall, wide = np.sqrt(area * ratio)[:, None], np.sqrt(area / ratio)[:, None]
    down = np.abs(np.arange(height) - centre[:, None] // width) <= tall / 2
    across = np.abs(np.arange(width) - centre[:, None] % width) <= wide / 2
    floats = images.dtype != np.uint8
    noise = (
        rng.random(images.shape, dtype=np.float32) if floats else rng.integers(256, size=images.shape, dtype=np.uint8)
    )
    return np.where((down[:, :, None] & across[:, None, :])[..., None], noise, images)
