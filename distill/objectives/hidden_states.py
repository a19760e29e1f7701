"""Another objective, and the distance of hidden states: white-box."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from distill.contracts import LanguageObjective, of_language
from distill.errors import DistillError
from distill.heads import Head, Sparse
from distill.objectives.rs_kd import RSKD
from distill.records import Reveals


class HiddenStates(nn.Module):
    """White-box: L + λ Σ_(s,t) D(W_st h_s, h_t) at each position: layer s of the student is to tell what layer t does.

    Paper: Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", Findings of EMNLP 2020, equation
    8 (section 3.1): D is the mean squared error; layer m of M meets layer m N / M of the teacher's N, and all count
    alike. Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, equation 3, is this for one pair, but for a
    factor and a convolution in W's place. Sanh et al., "DistilBERT, a distilled version of BERT", EMC² at NeurIPS 2019,
    section 3: D is 1 − cos.

    A matrix W, from the student's width to the teacher's, is learnt with the student for each pair and falls away with
    the training; DistilBERT, as wide as its teacher, has none. Neither TinyBERT's losses of attention and embeddings
    are here nor the stages of it and of FitNets: everything is learnt at once, where tokens of answers are.

    The teacher reads every answer again in each step, and nobody who only queries an API can do this: it takes a
    local teacher, access=white_box, and signal=text, since no signal is stored.

    Args:
        tokens: L, an objective for text alone or for whole distributions.
        pairs: (s, t): 0 is the embeddings, i what comes out of layer i, and the last layer counts with the final norm
            behind it. None: each layer m of the student with layer ⌈m N / M⌉.
        weight: λ > 0.
        distance: D, of n states: "mse" (mean over the teacher's width) or "cosine".

    Raises:
        ValueError: An option is out of its range.
    """

    requires: ClassVar[Reveals] = Reveals.WEIGHTS

    def __init__(
        self,
        tokens: LanguageObjective,
        pairs: Sequence[Sequence[int]] | None = None,
        weight: float = 1.0,
        distance: str = "mse",
    ) -> None:
        super().__init__()
        fits = isinstance(tokens, LanguageObjective) and of_language("objective", type(tokens))
        if not fits or isinstance(tokens, (RSKD, HiddenStates)):
            raise ValueError(f"tokens is sequence_kd, token_forward_kl or the like, not {type(tokens).__name__}")
        if pairs is not None and not (pairs and all(map(_is_pair, pairs))):
            raise ValueError(f"pairs are of a student's and a teacher's layer, such as [[1,2],[2,4]], not {pairs}")
        if not 0 < weight < math.inf:
            raise ValueError(f"weight is more than 0, not {weight}")
        if distance not in ("mse", "cosine"):
            raise ValueError(f"distance is mse or cosine, not {distance!r}")
        self.tokens, self.weight, self.distance = tokens, weight, distance
        self.pairs: Sequence[tuple[int, int]] | None = None if pairs is None else tuple((s, t) for s, t in pairs)
        self.projections = nn.ParameterList()

    def between(self, student: nn.Module, teacher: nn.Module) -> HiddenStates:
        """The same for one training, with its matrices W, in the student's type.

        Raises:
            DistillError: A pair names a layer that is not there.
        """
        (ours, width), (theirs, target) = _sizes(student), _sizes(teacher)
        pairs = self.pairs
        if pairs is None:
            pairs = tuple((layer, -(-layer * theirs // ours)) for layer in range(1, ours + 1))
        for s, t in pairs:
            if not (0 <= s <= ours and 0 <= t <= theirs):
                raise DistillError(
                    f"[{s},{t}] is not there: the student has layers 1 to {ours}, the teacher 1 to {theirs}, and 0 is "
                    "the embeddings",
                    "objective.pairs",
                )
        made = HiddenStates(self.tokens, pairs, self.weight, self.distance)
        kind = next(student.parameters()).dtype
        made.projections.extend(nn.Linear(width, target, bias=False, dtype=kind).weight for _ in pairs)
        return made

    def loss(self, student: Head, labels: torch.Tensor, signal: Head | Sparse | None) -> torch.Tensor:
        """A scalar, summed over the positions. `labels`: (n,) int64. The distance is in float32 or wider.

        Raises:
            DistillError: This is not the objective `between` a student and a teacher that is here; and as of `tokens`.
        """
        if not self.projections or not isinstance(signal, Head):
            raise DistillError(
                "hidden_states looks inside the teacher at each step: it takes a local teacher, access=white_box, "
                "signal=text and rollout=off_policy",
                "objective",
            )
        loss = self.tokens.loss(student, labels, signal)
        for projection, ours, theirs in zip(self.projections, student.layers, signal.layers, strict=True):
            work = torch.promote_types(ours.dtype, torch.float32)
            mapped, wanted = F.linear(ours.to(work), projection.to(work)), theirs.to(work)
            if self.distance == "mse":
                apart = (mapped - wanted).square().mean(dim=1)
            else:
                apart = 1 - F.cosine_similarity(mapped, wanted, dim=1)
            loss = loss + self.weight * apart.sum()
        return loss


def _is_pair(given: Any) -> bool:
    return isinstance(given, Sequence) and len(given) == 2 and all(isinstance(layer, int) for layer in given)


def _sizes(network: Any) -> tuple[int, int]:
    """Layers and width."""
    config = network.config.get_text_config()
    return config.num_hidden_layers, config.hidden_size
