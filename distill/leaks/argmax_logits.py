from __future__ import annotations

from distill.contracts import Inside, LanguageOracle, Verdict
from distill.language import Prompts
from distill.leaks import _vectors
from distill.leaks._vectors import Vectors


class ArgmaxLogits:
    """The logits of a prompt's next token, from text alone and a logit bias.

    Paper: Stealing Part of a Production Language Model (Carlini et al., ICML 2024), section 6: the smallest
    bias that makes a token the most probable one is how far it is below that, found by bisection in
    ⌈log2(bias / resolution)⌉ queries a token; or for several tokens at once, each of which is known to lie in an
    interval. Its share (1 + m)^(-1/m) of the way up, at which each of m tokens is lifted so that all of them and the
    unbiased one win equally often, is derived here from that wish.
    Threat model: a black-box attacker with a bias and the tokenizer, who reads text. Tokens that share their text with
    others, such as those that end an answer, can't be told apart and are left out.
    Recovered: no logit, each row up to a constant, is off by more than `resolution`.

    Args:
        prompts: How many prompts, each with its own vector of logits.
        tokens: How many tokens; None for all that there are.
        bias: The largest bias.
        resolution: How well a logit is to be known, in nats.
        together: How many tokens are biased at once; 1 is bisection.

    Raises:
        DistillError: A number is out of its range.
    """

    def __init__(
        self,
        prompts: int = 1,
        tokens: int | None = None,
        bias: float = 40.0,
        resolution: float = 0.001,
        together: int = 1,
    ) -> None:
        least = {"prompts": (prompts, 1), "tokens": (tokens, 2), "together": (together, 1)}
        _vectors.check(least, {"resolution": resolution, "bias": bias - resolution})
        self.prompts, self.tokens, self.together = prompts, tokens, together
        self.bias, self.resolution = bias, resolution

    def refusal(self, oracle: LanguageOracle) -> str:
        return _vectors.refusal(oracle, least_told=0) or _vectors.bias_refusal(oracle)

    def extract(self, oracle: LanguageOracle, pool: Prompts, seed: int) -> Vectors:
        prompts = _vectors.chosen_prompts(pool, self.prompts, seed)
        tokens = _vectors.chosen_tokens(oracle, self.tokens, seed)
        return _vectors.by_argmax(oracle, prompts, tokens, self.bias, self.resolution, self.together)

    def judge(self, found: Vectors, inside: Inside | None) -> Verdict:
        return _vectors.verdict_on_logits(found, inside, self.resolution)
