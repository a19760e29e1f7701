from __future__ import annotations

import numpy as np

from distill.contracts import Inside, LanguageOracle, Verdict
from distill.language import Prompts
from distill.leaks import _vectors
from distill.leaks._vectors import Spectrum, Vectors
from distill.randomness import generator


class ModelImage:
    """The model's signature: the space that its logits lie in, which tells it from others and from itself once updated.

    Paper: Logits of API-Protected LLMs Leak Proprietary Information (Finlayson, Ren and Swayamdipta, COLM 2024,
    arXiv:2403.09539): the image of the output matrix has as many dimensions as the model is wide, and no two matrices
    share it by accident, so the distance of one vector of logits to it says whether the same model gave it.
    Threat model: as of `hidden_width`; later one vector from whatever API is suspected.
    Recovered: `held_out` further answers of the same API are nearer to the image, by a factor of `factor`, than the
    true logits of the same prompts would be after an update, for which each weight of the output matrix is changed by
    `update` of the matrix's rms, at random. Distances are shares of the vector's norm. An update that leaves the output
    matrix alone is not seen.

    Args:
        prompts: How many prompts: more than tokens, so that noise has a spectrum without a gap.
        tokens: How many tokens: more than the model is wide; None for all that there are.
        bias: The largest bias.
        resolution: How well a logit is to be known where there is text alone, in nats.
        together: How many tokens are biased at once where there is text alone.
        repeats: As of `top_k_logits`.
        held_out: How many further prompts.
        update: Size of the change that is to be seen.
        factor: By how much it is to stand out.

    Raises:
        DistillError: A number is out of its range.
    """

    def __init__(
        self,
        prompts: int = 160,
        tokens: int | None = 128,
        bias: float = 40.0,
        resolution: float = 0.001,
        together: int = 8,
        repeats: int = 1,
        held_out: int = 4,
        update: float = 0.01,
        factor: float = 10.0,
    ) -> None:
        _vectors.check({"held_out": (held_out, 1)}, {"update": update, "factor": factor})
        self._asked = Spectrum(prompts, tokens, bias, resolution, together, repeats)
        self.held_out, self.update, self.factor = held_out, update, factor

    def refusal(self, oracle: LanguageOracle) -> str:
        return _vectors.refusal(oracle, least_told=0)

    def extract(self, oracle: LanguageOracle, pool: Prompts, seed: int) -> tuple[Vectors, Vectors]:
        """The vectors that the image is made of, and those that are held against it."""
        return self._asked.of(oracle, pool, seed), self._asked.of(oracle, pool, seed, self.held_out)

    def judge(self, found: tuple[Vectors, Vectors], inside: Inside | None) -> Verdict:
        known, asked = found
        width, _ = _vectors.width_of(known.centred)
        image = _vectors.image_of(known.centred, width)
        same = distances(image, asked.values)
        note, formula = f"own {same.max():.2g}", known.formula + asked.formula
        if inside is None:
            return Verdict(None, None, note, formula)
        size = self.update * np.sqrt((inside.head**2).mean())
        updated = inside.head + size * generator(0, "leak", "update").normal(size=inside.head.shape)
        other = distances(image, (inside.hidden(asked.prompts) @ updated.T)[:, asked.tokens])
        tells = bool(self.factor * same.max() < other.min())
        return Verdict(tells, float(same.max()), f"{note}, updated {other.min():.2g}", formula)


def distances(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(n,) how far each vector is from the image, as a share of its norm.

    Args:
        image: (width, l) orthonormal rows.
        values: (n, l) logits, each row up to a constant.
    """
    centred = values - values.mean(axis=1, keepdims=True)
    return np.linalg.norm(centred - centred @ image.T @ image, axis=1) / np.linalg.norm(centred, axis=1)
