from __future__ import annotations

import numpy as np

from distill.contracts import Inside, LanguageOracle, Verdict
from distill.language import Prompts
from distill.leaks import _vectors
from distill.leaks._vectors import Spectrum, Vectors


class OutputHead:
    """The output matrix, up to an invertible map, from the directions of the logits.

    Paper: Stealing Part of a Production Language Model (Carlini et al., ICML 2024), section 4: with
    the logits of n prompts ``Q = U S V``, the first ĥ rows of V span the columns of the output matrix W, so
    ``W = V' G`` with an unknown invertible G.
    Threat model: as of `hidden_width`, at all tokens whose rows are wanted.
    Recovered: the width is, to within 1, and least squares from V to the true matrix leaves at most `tolerance` of its
    Frobenius norm. Rows are compared less their mean, which no softmax tells; of its columns' combinations, those that
    hidden states reach, because a final LayerNorm hides one for good.

    Args:
        prompts: How many prompts: more than tokens, so that noise has a spectrum without a gap.
        tokens: How many tokens: more than the model is wide; None for all that there are.
        bias: The largest bias.
        resolution: How well a logit is to be known where there is text alone, in nats.
        together: How many tokens are biased at once where there is text alone.
        repeats: As of `top_k_logits`.
        tolerance: The largest share of the norm that is left.

    Raises:
        DistillError: A number is out of its range.
    """

    def __init__(
        self,
        prompts: int = 160,
        tokens: int | None = None,
        bias: float = 40.0,
        resolution: float = 0.001,
        together: int = 8,
        repeats: int = 1,
        tolerance: float = 0.01,
    ) -> None:
        _vectors.check({}, {"tolerance": tolerance})
        self._asked, self.tolerance = Spectrum(prompts, tokens, bias, resolution, together, repeats), tolerance

    def refusal(self, oracle: LanguageOracle) -> str:
        return _vectors.refusal(oracle, least_told=0)

    def extract(self, oracle: LanguageOracle, pool: Prompts, seed: int) -> Vectors:
        return self._asked.of(oracle, pool, seed)

    def judge(self, found: Vectors, inside: Inside | None) -> Verdict:
        width, _ = _vectors.width_of(found.centred)
        note = f"{len(found.tokens):,} rows of width {width}"
        if inside is None:
            return Verdict(None, None, note, found.formula)
        image = _vectors.image_of(found.centred, width)
        matrix = inside.head[found.tokens] - inside.head[found.tokens].mean(axis=0)
        states = inside.hidden(found.prompts)
        _, sizes, directions = np.linalg.svd(states, full_matrices=False)
        # What float32 states of this size are zero by.
        reached = sizes > sizes[0] * max(states.shape) * np.finfo(np.float32).eps
        matrix = matrix @ directions[reached].T
        error = float(np.linalg.norm(matrix - image.T @ (image @ matrix)) / np.linalg.norm(matrix))
        # An image of everything leaves nothing of any matrix.
        right = abs(width - int(reached.sum())) <= 1 and width < len(found.tokens) - 1
        return Verdict(right and error <= self.tolerance, error, note, found.formula)
