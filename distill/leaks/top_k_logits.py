from __future__ import annotations

from distill.contracts import Inside, LanguageOracle, Verdict
from distill.language import Prompts
from distill.leaks import _vectors
from distill.leaks._vectors import Vectors


class TopKLogits:
    """The logits of a prompt's next token, from the log-probabilities of the K most probable ones and a logit bias.

    Paper: Stealing Part of a Production Language Model (Carlini et al., ICML 2024), section 5: tokens
    i_1 … i_(K-1) and a reference R get the same bias, large enough that they are the K most probable ones, and then
    ``z_i - z_R = y_i - y_R``. It takes ⌈(V - 1) / (K - 1)⌉ queries. Where the whole vocabulary is told, it takes one.
    Threat model: a black-box attacker with log-probabilities of at least 2 tokens, a bias, and the tokenizer.
    Recovered: no logit, each row up to a constant, is off by more than `tolerance`. float32 adds a bias with an error
    of 2^-24 of it, so a bias of 40 leaves some 4e-6 nats.

    Args:
        prompts: How many prompts, each with its own vector of logits.
        tokens: How many tokens; None for all that there are.
        bias: Enough to lift any token above any other.
        tolerance: In nats.
        repeats: Answers to each request, whose mean is taken: where each draws noise of its own, the error falls with
            the root of their number, and the price rises with it.

    Raises:
        DistillError: A number is out of its range.
    """

    def __init__(
        self,
        prompts: int = 1,
        tokens: int | None = None,
        bias: float = 40.0,
        tolerance: float = 0.001,
        repeats: int = 1,
    ) -> None:
        least = {"prompts": (prompts, 1), "tokens": (tokens, 2), "repeats": (repeats, 1)}
        _vectors.check(least, {"bias": bias, "tolerance": tolerance})
        self.prompts, self.tokens, self.repeats = prompts, tokens, repeats
        self.bias, self.tolerance = bias, tolerance

    def refusal(self, oracle: LanguageOracle) -> str:
        return _vectors.refusal(oracle, least_told=2)

    def extract(self, oracle: LanguageOracle, pool: Prompts, seed: int) -> Vectors:
        prompts = _vectors.chosen_prompts(pool, self.prompts, seed)
        tokens = _vectors.chosen_tokens(oracle, self.tokens, seed)
        if _vectors.told_at_once(oracle) >= len(oracle.tokenizer):
            return _vectors.whole(oracle, prompts, tokens, self.repeats)
        return _vectors.by_top_k(oracle, prompts, tokens, self.bias, self.repeats)

    def judge(self, found: Vectors, inside: Inside | None) -> Verdict:
        return _vectors.verdict_on_logits(found, inside, self.tolerance)
