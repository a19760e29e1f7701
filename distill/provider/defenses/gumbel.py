from __future__ import annotations

import numpy as np
import torch

from distill.decoding import Processor
from distill.language import Sampling
from distill.provider.defenses._watermark import Marked
from distill.watermarking import log10_gamma_tail, nucleus, uniforms


class Gumbel(Marked):
    """Draws each token by keyed numbers r in place of chance, the one with the largest r^(1/p): undistorted on average.

    Paper: Watermarking of Large Language Models (Aaronson, talk at the Simons Institute, 2023; "exponential minimum
    sampling"); test and p-value as in Three Bricks to Consolidate Watermarks for Large Language Models (Fernandez et
    al., WIFS 2023): -ln(1 - r) of the tokens, a Gamma(T, 1) sum without the mark, each mark counted once.
    Threat model: text is trained on, or passed on, by somebody who may know all of this but the key.
    p is the distribution at `sampling.temperature`, cut to `sampling.top_p`. Over keys the token is drawn from p; under
    one key a window and a distribution have one answer, so that the same request is answered alike each time. Where a
    window comes again within a text its continuation tends to, too, in the end in a loop: `mask_repeats` leaves such
    tokens to chance, as SynthID does, for less evidence. So are tokens before which there are fewer than `width`, the
    prompt's included. At temperature 0 it does nothing: there is nothing to draw.
    Log-probabilities that are told are those of what is left: 0 for the token and -inf for every other.

    Args:
        width: How many tokens before a token seed its numbers.
        scheme: How (`distill.watermarking.seeds`).
        key: The secret.
        mask_repeats: Leaves a token to chance whose window occurred before in its row, the prompt's included.

    Raises:
        DistillError: An option is out of its range.
    """

    def __init__(
        self, width: int = 4, scheme: str = "ordered", key: int = 15485863, mask_repeats: bool = False
    ) -> None:
        super().__init__(width, scheme, key)
        self.mask_repeats = mask_repeats

    def logits_processor(self, sampling: Sampling) -> Processor | None:
        if sampling.greedy:
            return None

        def change(tokens: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
            rows, seeds = self._rows(tokens, fresh=self.mask_repeats)
            rows = rows.to(logits.device)
            p = nucleus(logits[rows] / sampling.temperature, sampling.top_p).softmax(dim=-1)
            # The largest r^(1/p) is the smallest -ln(r) / p.
            waits = self._over_vocabulary(seeds, logits, lambda marks: -uniforms(marks).log()) / p
            drawn = waits.argmin(dim=-1, keepdim=True)
            alone = torch.full_like(logits[rows], -torch.inf).scatter(1, drawn, 0.0)
            return logits.index_copy(0, rows, alone)

        return change

    def shown(self, marks: np.ndarray) -> np.ndarray:
        return -np.log1p(-uniforms(marks))

    def log10_p_value(self, evidence: np.ndarray) -> float:
        return log10_gamma_tail(float(evidence.sum()), len(evidence))
