"""What the Bayes attacks share: posteriors that may be behind the answers, and which of them would be answered so."""

from __future__ import annotations

import numpy as np
import torch

from distill.contracts import Knowledge
from distill.errors import DistillError
from distill.records import TransferSet
from distill.recovery._simulated import SimulatedApi

PAIRS = 1 << 23  # distances that are held in memory at once
ENTRIES = 1 << 23  # numbers that are drawn at once
SLACK = 1e-6  # what float32 may do to a distance


def check(**options: float) -> None:
    """Raises `DistillError` for an option that is not more than 0."""
    for name, value in options.items():
        if not value > 0:
            raise DistillError(f"{name} is more than 0, not {value}")


def simulated_api(transfer_set: TransferSet, knowledge: Knowledge) -> SimulatedApi:
    """Raises `DistillError` where the defense is not known."""
    if knowledge.defense is None:
        raise DistillError("a Bayes attack runs the defense's code, which this attacker does not know", "recovery")
    return SimulatedApi.of(knowledge.defense, transfer_set, knowledge)


def estimated(
    api: SimulatedApi,
    received: np.ndarray,
    centres: np.ndarray,
    samples: int,
    concentration: float,
    tolerance: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """For each answer the mean of the sampled posteriors whose own answers have its label and are near it.

    Near is within the larger of `tolerance` and the nearest one's distance, in L1. Where no sample has the label, all
    count. All answers share the samples, unless the defense knows something of each query: then a query has those that
    were drawn around its own centre.

    Args:
        api: The simulated defense.
        received: (n, classes) float32.
        centres: (c, n, classes), means of the prior: a sample of query i is drawn around one of its c centres.
        samples: How many posteriors are drawn in all; as many for each query.
        concentration: They are from Dirichlet(concentration · classes · centre).
        tolerance: In L1.
        rng: What draws.

    Returns:
        (n, classes) float32.
    """
    times = max(1, samples // len(received))
    drawn = draw(concentration * received.shape[1] * centres.astype(np.float64), times, rng)
    simulated = _answers(api, drawn, np.tile(np.arange(len(received)), times))
    if api.info is not None:
        return own(received, simulated, drawn, tolerance)
    distinct, which = np.unique(received, axis=0, return_inverse=True)
    return shared(distinct, simulated, drawn, tolerance)[which.reshape(-1)]


def draw(parameters: np.ndarray, times: int, rng: np.random.Generator) -> np.ndarray:
    """(times · n, classes) float32: a draw for each of n queries, then another for each, and so on.

    `parameters`: (c, n, classes), c Dirichlet distributions for each query, which take turns.
    """
    turns, (n, classes) = np.arange(times) % len(parameters), parameters.shape[1:]
    drawn = np.empty((times, n, classes), dtype=np.float32)
    step = max(1, ENTRIES // (n * classes))
    for start in range(0, times, step):
        gammas = rng.standard_gamma(parameters[turns[start : start + step]])
        drawn[start : start + step] = gammas / gammas.sum(axis=2, keepdims=True)
    return drawn.reshape(-1, classes)


def _answers(api: SimulatedApi, drawn: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Of a defense that remembers the formula, where there is one: it is quicker, and doesn't remember the samples."""
    if api.state:
        returned = api.transform(torch.from_numpy(drawn.astype(np.float64)), torch.from_numpy(queries))
        if returned is not None:
            return returned.numpy().astype(np.float32)
    return api.answers(drawn, queries)


def shared(received: np.ndarray, simulated: np.ndarray, posteriors: np.ndarray, tolerance: float) -> np.ndarray:
    """(n, classes) float32: of each answer the mean of the near ones among m posteriors.

    Args:
        received: (n, classes).
        simulated: (m, classes), the answers to `posteriors`.
        posteriors: (m, classes).
        tolerance: In L1.
    """
    means = np.empty_like(received)
    labels, of_samples = received.argmax(axis=1), simulated.argmax(axis=1)
    for label in np.unique(labels):
        rows, same = labels == label, of_samples == label
        mine = np.flatnonzero(same) if same.any() else np.arange(len(simulated))
        means[rows] = _near(received[rows], simulated[mine], posteriors[mine], tolerance)
    return means


def own(received: np.ndarray, simulated: np.ndarray, posteriors: np.ndarray, tolerance: float) -> np.ndarray:
    """The same where answer i has the posteriors i, i + n, i + 2n … to itself."""
    n = len(received)
    means = [shared(received[i : i + 1], simulated[i::n], posteriors[i::n], tolerance) for i in range(n)]
    return np.concatenate(means)


def _near(received: np.ndarray, simulated: np.ndarray, posteriors: np.ndarray, tolerance: float) -> np.ndarray:
    """Every answer against every sample: a tree would be no quicker, since most answers are confident ones, which have
    a good part of all samples near them."""
    from scipy.spatial.distance import cdist

    received, simulated, posteriors = (rows.astype(np.float64) for rows in (received, simulated, posteriors))
    means, step = np.empty_like(received), max(1, PAIRS // len(simulated))
    for start in range(0, len(received), step):
        distance = cdist(received[start : start + step], simulated, "cityblock")
        radius = np.maximum(tolerance, distance.min(axis=1, keepdims=True)) + SLACK
        near = (distance <= radius).astype(np.float64)
        means[start : start + step] = near @ posteriors / near.sum(axis=1, keepdims=True)
    return means.astype(np.float32)
