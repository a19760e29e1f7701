from __future__ import annotations

from distill.contracts import Inside, LanguageOracle, Verdict
from distill.language import Prompts
from distill.leaks import _vectors
from distill.leaks._vectors import Vectors


class Top1Logits:
    """The logits of a prompt's next token, from the log-probability of the most probable one alone and a logit bias.

    Paper: Stealing Part of a Production Language Model (Carlini et al., ICML 2024), section 5: a bias b on
    token i makes it the most probable one with probability p', and then ``z_i - ln Σ_(j≠i) e^(z_j) = logit(p') - b``.
    It takes V queries where one bias suits all tokens; here it is corrected until 1 - p' is at least 0.001, because
    float32 tells the logit of a probability nearer to 1 too badly. That takes more.
    Threat model: a black-box attacker with the log-probability of the most probable token, a bias, and the tokenizer.
    Recovered: no logit, each row up to a constant, is off by more than `tolerance`.

    Args:
        prompts: How many prompts, each with its own vector of logits.
        tokens: How many tokens; None for all that there are.
        bias: The largest bias that is tried, either way.
        tolerance: In nats.
        repeats: As of `top_k_logits`.

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
        return _vectors.refusal(oracle, least_told=1) or _vectors.bias_refusal(oracle)

    def extract(self, oracle: LanguageOracle, pool: Prompts, seed: int) -> Vectors:
        prompts = _vectors.chosen_prompts(pool, self.prompts, seed)
        tokens = _vectors.chosen_tokens(oracle, self.tokens, seed)
        return _vectors.by_top_1(oracle, prompts, tokens, self.bias, self.repeats)

    def judge(self, found: Vectors, inside: Inside | None) -> Verdict:
        return _vectors.verdict_on_logits(found, inside, self.tolerance)
