from __future__ import annotations

import hashlib
import math

import numpy as np

from distill.errors import DistillError
from distill.language import Completions, Prompts, Sampling
from distill.provider.defenses._language import Unchanged
from distill.provider.defenses._told import Told, mass
from distill.randomness import KeyedRandom


class LogprobNoise(Unchanged):
    """Adds independent noise to each log-probability that comes with a text.

    Paper: Stealing Part of a Production Language Model (Carlini et al., ICML 2024), which names it among mitigations.
    It gives no scale; the default is this project's own.
    Threat model: a black-box attacker who sees the answers; knows the options but `key`. Where each repeat draws new
    noise, an attacker who pays for repeats can average it away; where noise is fixed, a token after the same text
    always gets the same, and there is nothing to average over.
    What is told at a position stays a part of a distribution, and is listed in its new order. Noise goes to the tokens
    that the profile tells: one below them can't rise among them, but for the drawn one. It does not depend on how many
    are told. Text that is scored, rather than answered with, has noise of its own.

    Args:
        scale: Standard deviation of Gaussian noise, or the scale b of Laplace noise (its deviation is b times the root
            of 2), in nats.
        kind: "gaussian" or "laplace".
        renormalise: What is told keeps its mass, so that noise moves odds within it. Otherwise it is scaled only where
            it would sum to more than 1.
        per_repeat: A repeated request draws new noise.
        key: What fixed noise depends on besides the text.

    Raises:
        DistillError: `scale` is negative, or `kind` is another.
    """

    def __init__(
        self,
        scale: float = 0.5,
        kind: str = "gaussian",
        renormalise: bool = True,
        per_repeat: bool = True,
        key: int = 0,
    ) -> None:
        if not (scale >= 0 and math.isfinite(scale)):
            raise DistillError(f"must be at least 0, not {scale}", "defense.scale")
        if kind not in ("gaussian", "laplace"):
            raise DistillError(f"is gaussian or laplace, not {kind}", "defense.kind")
        self.scale, self.kind, self.renormalise = scale, kind, renormalise
        self.per_repeat, self.key = per_repeat, key

    def release(self, prompts: Prompts, completions: Completions, sampling: Sampling, rng: KeyedRandom) -> Completions:
        told = Told.of(completions)
        if told is None:
            return completions
        noisy = told.logprobs + self.scale * self._noise(told.ids, self._texts(prompts, completions, rng))
        was, now = mass(told.logprobs), mass(noisy)
        above = np.maximum(now, 0.0)
        if self.renormalise:
            above = np.subtract(now, was, out=np.zeros_like(now), where=now > -np.inf)
        return told.put_into(completions, np.minimum(noisy - above, 0.0))

    def _noise(self, ids: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """(t, k + 1) float64 of scale 1: of each token and the text before it."""
        rng = KeyedRandom(self.key, np.repeat(texts, ids.shape[1]), ids.ravel())
        if self.kind == "gaussian":
            return rng.normal(1).reshape(ids.shape)
        side = rng.uniform(1).reshape(ids.shape) - 0.5
        return -np.sign(side) * np.log1p(-2.0 * np.abs(side))

    def _texts(self, prompts: Prompts, completions: Completions, rng: KeyedRandom) -> np.ndarray:
        """(t,) ``S16``: what is before each token, and which repeat of the request it is where that counts."""
        first = (rng.uniform(1, "repeat") * 2.0**53).astype(np.int64) if self.per_repeat else prompts.keys
        keys = []
        for row, start in enumerate(first):
            so_far = hashlib.blake2b(start.tobytes(), digest_size=16)
            for token in completions.tokens(row):
                keys.append(so_far.digest())
                so_far.update(token.tobytes())
        return np.array(keys, dtype="S16")
