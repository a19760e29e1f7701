from __future__ import annotations

from distill.provider.defenses._released import RewrittenReasoning


class TraceRewriting(RewrittenReasoning):
    r"""Reasoning is rewritten so that it still leads a reader to the answer, but a student learns less from it.

    Paper: Protecting Language Models Against Unauthorized Distillation through Trace Rewriting, Ma et al., ACL 2026
    (arXiv 2602.15143): a language model with an instruction; the answer is kept word for word.
    Threat model: the attacker reads what goes out; text alone is exposed, reason of the end and billed tokens are those
    of the released text.

    Departs from the paper: by default no model is asked; the steps are reversed, conclusions first (arXiv 2510.11545),
    which a student that writes from left to right can't compute in that order. The paper's own way is
    ``rewriter@defense.rewriter=trace_by_model``, with an instruction of ours: theirs is found by a search.

    Args:
        rewriter: Rewrites (`distill.rewriting`).
        answer: A regular expression; what stands from its first match to the end is the answer. Where it does not
            match, all is reasoning.

    Raises:
        DistillError: The expression is none; or the teacher's tokens are not known.
    """
