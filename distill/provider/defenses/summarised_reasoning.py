from __future__ import annotations

from distill.provider.defenses._released import RewrittenReasoning


class SummarisedReasoning(RewrittenReasoning):
    r"""A summary of the reasoning goes out instead of it, then the answer as it is.

    Paper: what providers of reasoning models do ("abstract"), taken as the alternative by Information-Preserving
    Reformulation of Reasoning Traces for Antidistillation, arXiv 2510.11545, 2025. No formula is published.
    Threat model: the attacker reads what goes out. It tells of the reasoning what the summary does and no more: reason
    of the end and billed tokens are those of the released text; text alone is exposed.

    Here every second step is left out, by default; ``rewriter@defense.rewriter=summary_by_model`` asks a model.

    Args:
        rewriter: Sums up (`distill.rewriting`).
        answer: A regular expression; what stands from its first match to the end is the answer. Where it does not
            match, all is reasoning.

    Raises:
        DistillError: The expression is none; or the teacher's tokens are not known.
    """
