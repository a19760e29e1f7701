from __future__ import annotations

import numpy as np
import torch

from distill.decoding import Processor
from distill.errors import DistillError
from distill.language import Sampling
from distill.provider.defenses._watermark import Marked
from distill.watermarking import log10_binomial_tail, log10_normal_tail, nucleus

CANDIDATES = 1024  # most probable tokens that enter the tournament


class SynthID(Marked):
    """Draws each token by a tournament of many rounds that keyed bits of the candidates decide: undistorted on average.

    Paper: Scalable Watermarking for Identifying Large Language Model Outputs (Dathathri et al., Nature 2024): two
    candidates a match, bits that are 1 with chance 1/2, in the form that computes the winner's distribution in place of
    2^layers draws: p <- p (1 + g - E_p[g]) once a layer (supplementary information). Score: the mean of the bits of a
    token, or a mean with weights that fall linearly from 10 to 1 over the layers.
    Threat model: text is trained on, or passed on, by somebody who may know all of this but the key.
    p is the distribution at `sampling.temperature`, cut to `sampling.top_p`; over keys the token is drawn from p. As in
    the paper a token is left to chance if its window occurred before in its row, here the prompt's included; so is one
    before which there are fewer than `width`. At temperature 0 it does nothing: there is nothing to draw.
    Log-probabilities that are told are those of the logits that have the winner's distribution at that temperature.
    Departs from the paper: the p-value, which is binomial for the mean; for the weighted mean it is the normal tail,
    which sums of symmetric bits stay close to far out too. Tokens beyond the 1024 most probable ones keep their chance
    and carry no mark. A `top_p` below 1 cuts twice, before the tournament and, as every draw, after it, where the least
    probable of the possible winners are dropped.

    Args:
        layers: Rounds of the tournament, 1 to 64.
        width: How many tokens before a token seed its bits.
        scheme: How (`distill.watermarking.seeds`).
        key: The secret.
        weighted: The score is the weighted mean.

    Raises:
        DistillError: An option is out of its range.
    """

    def __init__(
        self, layers: int = 30, width: int = 4, scheme: str = "ordered", key: int = 15485863, weighted: bool = True
    ) -> None:
        super().__init__(width, scheme, key)
        if not 1 <= layers <= 64:
            raise DistillError(f"must be 1 to 64, the bits of a mark, not {layers}", "defense.layers")
        self.layers, self.weighted = layers, weighted
        weights = np.linspace(10, 1, layers) if weighted else np.ones(layers)
        self._weights = weights / weights.sum()
        # What the 8 bits of each byte of a mark add to a score: a byte is looked up as a whole.
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        padded = np.concatenate([self._weights, np.zeros(-layers % 8)]).reshape(-1, 8)
        self._tables = padded @ bits.T

    def logits_processor(self, sampling: Sampling) -> Processor | None:
        if sampling.greedy:
            return None

        def change(tokens: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
            rows, seeds = self._rows(tokens, fresh=True)
            rows = rows.to(logits.device)
            cut = nucleus(logits[rows] / sampling.temperature, sampling.top_p).log_softmax(dim=-1)
            some, candidates = cut.topk(min(CANDIDATES, cut.shape[1]), dim=-1)
            inside = some.double().logsumexp(dim=-1, keepdim=True)
            p = self._winners((some.double() - inside).exp(), self._marks(seeds, candidates))
            cut = cut.scatter(1, candidates, (p.log() + inside).to(cut.dtype))
            return logits.index_copy(0, rows, cut * sampling.temperature)

        return change

    def _winners(self, p: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
        """(n, candidates) float64 chances of each to win a tournament of candidates drawn from p."""
        for layer in range(self.layers):
            g = ((marks >> layer) & 1).double()
            p = p * (1 + g - (p * g).sum(dim=-1, keepdim=True)).clamp_min(0)
        return p / p.sum(dim=-1, keepdim=True)

    def shown(self, marks: np.ndarray) -> np.ndarray:
        octets = marks.astype("<i8", copy=False).view(np.uint8).reshape(-1, 8)
        return sum(table[octets[:, i]] for i, table in enumerate(self._tables))

    def log10_p_value(self, evidence: np.ndarray) -> float:
        if not self.weighted:
            bits = self.layers * len(evidence)
            return log10_binomial_tail(round(float(evidence.sum()) * self.layers), bits, 0.5)
        if not len(evidence):
            return 0.0
        deviation = 0.5 * np.sqrt(len(evidence) * (self._weights**2).sum())
        return log10_normal_tail((evidence.sum() - 0.5 * len(evidence)) / deviation)
