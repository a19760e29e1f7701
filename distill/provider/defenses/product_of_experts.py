from __future__ import annotations

import torch

from distill.contracts import LanguageStudent
from distill.decoding import Guided
from distill.errors import DistillError
from distill.language import Sampling
from distill.provider.defenses._proxy import ProxyDefense, as_wide_as
from distill.training import Recipe


class ProductOfExperts(ProxyDefense):
    """The teacher speaks as a mixture, in log-probability, of itself and of a small model like the attacker's.

    Paper: The Distillation Game: Adaptive Attacks & Efficient Defenses (Allouah, Haghifam, Koyejo, Shokri, arXiv
    2605.22737, 2026), the product of experts: ``z' = (1 - gamma) z + gamma z_P`` with the logits z of the teacher and
    z_P of the proxy. What a student would be surprised by is what it would learn most from, so it is said less often.
    Threat model: an attacker who trains on the text; its student is like the proxy, which it does not see.
    (n, vocabulary) logits in and out. A token costs one forward pass of the proxy; gamma = 0 is the undefended teacher.
    Departs from the paper in that the proxy may be trained on the teacher's own answers, where the paper's is a
    pretrained model as it is (`answers=0`). Tokens that the proxy's vocabulary lacks are never said.

    Args:
        proxy: The proxy: a student.
        recipe: How it is trained.
        gamma: Weight of the proxy: 0 to 1. The paper's code takes 0.6 to 0.7.
        answers: How many answers of the teacher the proxy is trained on; 0 for a student that comes trained.
        max_tokens: Of such an answer.
        max_length: Positions of a packed row of them.

    Raises:
        DistillError: A number is out of its range, the teacher is not decoded here, or its tokens are not the proxy's.
    """

    def __init__(
        self,
        proxy: LanguageStudent,
        recipe: Recipe,
        gamma: float = 0.65,
        answers: int = 2000,
        max_tokens: int = 256,
        max_length: int = 512,
    ) -> None:
        super().__init__(proxy, recipe, answers, max_tokens, max_length)
        if not 0 <= gamma <= 1:
            raise DistillError(f"must be at least 0 and at most 1, not {gamma}", "defense.gamma")
        self.gamma = gamma

    def logits_processor(self, sampling: Sampling) -> Guided | None:
        return Guided(self.networks, self._mix) if self.gamma else None

    def _mix(self, tokens: list[list[int]], logits: torch.Tensor, told: list[torch.Tensor]) -> torch.Tensor:
        return (1 - self.gamma) * logits + self.gamma * as_wide_as(logits, told[0], -torch.inf)
