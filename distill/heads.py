"""Next-token distributions as they are passed around while a language model is trained: never as [tokens, vocabulary].

A distribution is either a `Head` (hidden states and the matrix that turns them into logits: exact, whole vocabulary) or
`Sparse` (some tokens with their log-probabilities, as an API or a stored signal gives them).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Head:
    """The distributions at n positions of a language model.

    Args:
        hidden: (n, width), the states that the output matrix is applied to (after the final norm).
        weight: (vocabulary, width). It is used in the type of `hidden`, and so is `bias`.
        bias: (vocabulary,), or None.
        scale: Factor on the logits (Cohere's and Granite's ``logit_scale``), applied before `softcap`.
        softcap: Gemma's: logits become ``softcap * tanh(logits / softcap)``. None for none.
        layers: For an objective that looks inside the model: the hidden states of some layers, each (n, width).
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    layers: tuple[torch.Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def vocabulary(self) -> int:
        return len(self.weight)

    def logits(self) -> torch.Tensor:
        """(n, vocabulary) in float32 or wider: for a few positions. Losses over many go through `objectives._fused`."""
        kind = self.hidden.dtype
        bias = None if self.bias is None else self.bias.to(kind)
        logits = torch.nn.functional.linear(self.hidden, self.weight.to(kind), bias)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def take(self, rows: torch.Tensor) -> Head:
        """The distributions at some of the positions."""
        return replace(self, hidden=self.hidden[rows], layers=tuple(states[rows] for states in self.layers))


@dataclass(frozen=True)
class Sparse:
    """Distributions at n positions of which some tokens are known.

    Args:
        ids: (n, k) int64 token ids, distinct in a row; -1 where a row lists fewer than k.
        logprobs: (n, k) float32 log-probabilities under the whole vocabulary; -inf where `ids` is -1.
        weights: (n, k) float32 for a sampled signal (RS-KD): the estimate of each probability, summing to one in a row.
            The rest of the row is then not "unknown mass" but was not drawn. None for top-k signals.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor
    weights: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)
