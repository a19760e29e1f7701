"""MiniLLM: the gradient of sequence-level reverse KL, on text that student and teacher write together."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch.utils.checkpoint import checkpoint

from distill.heads import Head
from distill.records import Reveals
from distill.rollouts._rollout import Plain, sampling_of

ROWS = 256  # positions whose logits are held at once


class MiniLLM(Plain):
    """Reverse KL between whole answers: the objective at each token, and credit for where each token led.

    Paper: Gu, Dong, Wei and Huang, "MiniLLM: Knowledge Distillation of Large Language Models", ICLR 2024, section 2.2.
    With teacher p, student q, r_t = ln p(y_t) − ln q(y_t) and y drawn from q,

        ∇ KL(q ‖ p) = E Σ_t ∇ KL(q(·|y_<t) ‖ p(·|y_<t)) − E Σ_t R_{t+1} ∇ ln q(y_t),   R_{t+1} = Σ_{s>t} r_s.

    The first part (single-step, exact over the vocabulary) is the experiment's objective, token_reverse_kl in the
    paper. This class draws y from p̃ = α p + (1 − α) q at each token and adds the second part, −Σ_t min(ρ_t R_{t+1},
    clip(ρ_t, 1 ± ε) R_{t+1}) with ρ_t = q(y_t) / p̃(y_t) and R divided by the number of tokens that are left. ρ_t is
    the paper's approximation of the product of such ratios up to t: exact where α = 0.

    Departures: the paper also weights the single-step part by ρ_t, whose mean given y_<t is 1, so that it would add
    variance alone (the authors' code leaves it out as well); each draw is used for one step, where they take several;
    there is no language-modelling loss on a pre-training corpus. Their code (LMOps) also counts r_t itself, discounts
    later ones by 0.95 and standardises R within a batch, which the equations do not; it is not done here.

    Each answer costs one query to be scored and, in the mean, α times its length to be drawn. The loss that is logged
    holds the surrogate of the second part, which is no divergence.

    Args:
        teacher_share: α in [0, 1).
        clip: ε of ρ_t (proximal policy optimisation), or None.
        reward_clip: Bound on |r_t|, or None. The authors' scripts bound 2 r_t by 100.
        length_normalised: Divide R_{t+1} by the number of tokens after t.
        max_tokens: Longest answer.

    Raises:
        ValueError: A value is out of its range.
        DistillError: `max_tokens` is.
    """

    requires: ClassVar[Reveals] = Reveals.PROBS  # it also draws from the teacher, and looks at tokens of little chance

    def __init__(
        self,
        teacher_share: float = 0.2,
        clip: float | None = 0.2,
        reward_clip: float | None = 50.0,
        length_normalised: bool = True,
        max_tokens: int = 256,
    ) -> None:
        if not 0 <= teacher_share < 1:
            raise ValueError(f"teacher_share is at least 0 and less than 1, not {teacher_share}")
        for name, value in {"clip": clip, "reward_clip": reward_clip}.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} is more than 0, not {value}")
        self.teacher_share, self.clip, self.reward_clip = teacher_share, clip, reward_clip
        self.length_normalised = length_normalised
        self.sampling = sampling_of(max_tokens)

    def examples(
        self, prompts: list[list[int]], write: Any, chance: float, progress: float
    ) -> list[tuple[list[int], list[int]]]:
        """See `distill.on_policy.Rollout`."""
        return list(zip(prompts, write(prompts, self.sampling, self.teacher_share), strict=True))

    def credit(self, student: Head, teacher: Head, labels: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
        """The second part, a scalar; see `distill.on_policy.Rollout`."""
        size = min(student.vocabulary, teacher.vocabulary)
        log_q = _log_probs(student, labels, size)
        with torch.no_grad():
            log_p = _log_probs(teacher, labels, size)
            before = log_q.detach()
            drawn = before
            if self.teacher_share:
                drawn = torch.logaddexp(math.log(1 - self.teacher_share) + before, math.log(self.teacher_share) + log_p)
            reward = log_p - before
            if self.reward_clip is not None:
                reward = reward.clamp(-self.reward_clip, self.reward_clip)
            lengths = sequence.unique_consecutive(return_counts=True)[1]
            last = (lengths.cumsum(0) - 1).repeat_interleave(lengths)
            sums = reward.double().cumsum(0)
            later = sums[last] - sums
            if self.length_normalised:
                later = later / (last - torch.arange(len(last), device=last.device)).clamp(min=1)
            later = later.to(log_q.dtype)
        ratio = (log_q - drawn).exp()
        gain = ratio * later
        if self.clip is not None:
            gain = torch.minimum(gain, ratio.clamp(1 - self.clip, 1 + self.clip) * later)
        return -gain.sum()


def _log_probs(head: Head, labels: torch.Tensor, size: int) -> torch.Tensor:
    """(n,) log-probabilities of the labels among the first `size` tokens. Logits are computed anew for the gradient."""
    bias = None if head.bias is None else head.bias[:size]

    def some(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, of: torch.Tensor) -> torch.Tensor:
        logits = Head(hidden, weight, bias, head.scale, head.softcap).logits()
        return -torch.nn.functional.cross_entropy(logits, of, reduction="none")

    parts = zip(head.hidden.split(ROWS), labels.split(ROWS), strict=True)
    return torch.cat(
        [
            checkpoint(some, hidden, head.weight[:size], bias, of, use_reentrant=False, preserve_rng_state=False)
            for hidden, of in parts
        ]
    )
