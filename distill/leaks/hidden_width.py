from __future__ import annotations

from distill.contracts import Inside, LanguageOracle, Verdict
from distill.language import Prompts
from distill.leaks import _vectors
from distill.leaks._vectors import Spectrum, Vectors


class HiddenWidth:
    """The width of the model, from how many directions its logits have.

    Paper: Stealing Part of a Production Language Model (Carlini et al., ICML 2024), section 4: logits are ``W x`` with
    a matrix W of as many columns as the model is wide, h, so the vectors of more than h prompts, at any more than h
    tokens, have h singular values and then what rounding leaves: ``ĥ = argmax_i (ln s_i - ln s_(i+1))``.
    Log-probabilities are logits less a constant for each prompt, which is taken out by centring each row.
    A final RMSNorm shows all h directions. A final LayerNorm takes the mean out of what it normalises, and so one
    direction: h - 1 are left, and h again where the norm's own bias does not lie in them (it is 0 in fresh weights). A
    bias of the output matrix adds one.
    Threat model: a black-box attacker with the tokenizer, and either the log-probabilities of a whole vocabulary or a
    bias. It takes what the interface offers: see `top_k_logits`, `top_1_logits`, `argmax_logits`.
    Recovered: the estimate is within 1 of the truth, as the paper counts. A vocabulary no larger than h hides it.

    Args:
        prompts: How many prompts: more than tokens, so that noise has a spectrum without a gap.
        tokens: How many tokens: more than the model is wide; None for all that there are.
        bias: The largest bias.
        resolution: How well a logit is to be known where there is text alone, in nats.
        together: How many tokens are biased at once where there is text alone.
        repeats: As of `top_k_logits`.

    Raises:
        DistillError: A number is out of its range.
    """

    def __init__(
        self,
        prompts: int = 160,
        tokens: int | None = 128,
        bias: float = 40.0,
        resolution: float = 0.001,
        together: int = 8,
        repeats: int = 1,
    ) -> None:
        self._asked = Spectrum(prompts, tokens, bias, resolution, together, repeats)

    def refusal(self, oracle: LanguageOracle) -> str:
        return _vectors.refusal(oracle, least_told=0)

    def extract(self, oracle: LanguageOracle, pool: Prompts, seed: int) -> Vectors:
        return self._asked.of(oracle, pool, seed)

    def judge(self, found: Vectors, inside: Inside | None) -> Verdict:
        width, gap = _vectors.width_of(found.centred)
        note = f"width {width}, gap {gap:.2g}"
        if inside is None:
            return Verdict(None, None, note, found.formula)
        error = width - inside.head.shape[1]
        return Verdict(abs(error) <= 1, float(error), note, found.formula)
