from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill.config import digest
from distill.contracts import LanguageStudent, LanguageTeacher
from distill.decoding import Guided, Network
from distill.errors import DistillError
from distill.held_out_gradient import gradient, moved
from distill.language import Sampling, Task
from distill.packing import encode
from distill.provider.defenses._proxy import ProxyDefense, as_wide_as, own_answers, training_prompts
from distill.training import Recipe

FORMS = ("paper", "code")


class Antidistillation(ProxyDefense):
    """Tokens are said more often that would make a student worse that is trained on them.

    Paper: Antidistillation Sampling (Savani, Trockman, Feng, Xu, Schwarzschild, Robey, Finzi, Kolter, arXiv 2504.13146,
    2025): the next token is drawn from ``softmax(ln p(.) / tau + lambda D(.))``, D(v) = ``[ln q(v; theta + eps g) -
    ln q(v; theta - eps g)] / (2 eps)`` with the proxy q of weights theta and the gradient g of its mean loss, per
    token, on answers of the teacher that it was not trained on. As eps goes to 0, D(v) becomes <g, grad ln q(v)>: by
    how much, to first order and per unit of the learning rate, that loss grows when a student takes one step on v.
    Threat model: an attacker who trains on the text; its student is like the proxy, which it does not see.
    (n, vocabulary) logits in and out. A token costs two forward passes of the proxy; lambda = 0 is the undefended
    teacher.

    The two forms differ in the temperature tau of the request. The paper adds lambda D to what was divided by tau, so
    that it weighs the same at every temperature, and nothing against greedy decoding, which is answered undefended.
    The authors' code adds lambda D to the logits and then divides all of it by tau: its lambda is tau times the
    paper's, and greedy answers are defended too.

    Departs from the authors' code, which takes the gradient of the first process alone (the reduction over processes
    is thrown away) and divides it by the tokens of all: here it is that of the mean over all tokens. The paper leaves
    open what the teacher's held-out answers are drawn at: here, temperature 1. Tokens that the proxy's vocabulary
    lacks have D = 0.

    Args:
        proxy: The proxy: a student.
        recipe: How it is trained.
        lambda_: Weight of the penalty. The paper varies it from 0 to 0.15; what it means depends on the size of g.
        epsilon: Of the finite difference.
        form: "paper" or "code".
        held_out: To how many prompts the answers are whose loss is to grow: those after the ones that the proxy is
            trained on.
        answers: How many answers of the teacher the proxy is trained on; 0 for a student that comes trained, which is
            the paper's.
        max_tokens: Of an answer of either kind.
        max_length: Positions of a packed row of those that the proxy is trained on.

    Raises:
        DistillError: A number is out of its range, the teacher is not decoded here, or its tokens are not the proxy's.
    """

    def __init__(
        self,
        proxy: LanguageStudent,
        recipe: Recipe,
        lambda_: float = 0.03,
        epsilon: float = 0.01,
        form: str = "paper",
        held_out: int = 1000,
        answers: int = 2000,
        max_tokens: int = 256,
        max_length: int = 512,
    ) -> None:
        super().__init__(proxy, recipe, answers, max_tokens, max_length)
        if not 0 <= lambda_ < math.inf:
            raise DistillError(f"must be at least 0, not {lambda_}", "defense.lambda_")
        if not 0 < epsilon < math.inf:
            raise DistillError(f"must be more than 0, not {epsilon}", "defense.epsilon")
        if form not in FORMS:
            raise DistillError(f"is one of {', '.join(FORMS)}, not '{form}'", "defense.form")
        if held_out < 1:
            raise DistillError(f"must be at least 1, not {held_out}", "defense.held_out")
        self.lambda_, self.epsilon, self.form, self.held_out = lambda_, epsilon, form, held_out

    def prepare(self, teacher: LanguageTeacher, task: Task, trainer: Any, cache: Path, seed: int) -> LanguageTeacher:
        """Train or load the proxy, and take it a step along the gradient to either side."""
        rows = slice(self.answers, self.answers + self.held_out)
        prompts = training_prompts(task, rows, "defense.held_out")  # told before a proxy is trained
        proxy = self.trained(teacher, task, trainer, cache, seed)
        answers = own_answers(teacher, prompts, self.max_tokens, cache, seed)
        direction = gradient(proxy.network, encode(answers, teacher.tokenizer, teacher.tokenizer))
        self.networks = [Network(moved(proxy.network, direction, step)) for step in (self.epsilon, -self.epsilon)]
        facts = {"proxy": proxy.fingerprint, "teacher": teacher.fingerprint, "held_out": prompts.fingerprint}
        self.fingerprint = digest(facts | {"max_tokens": self.max_tokens, "seed": seed}, length=32)
        return teacher

    def logits_processor(self, sampling: Sampling) -> Guided | None:
        # The decoder divides what comes out by the temperature.
        weight = self.lambda_ * (sampling.temperature if self.form == "paper" else 1.0)
        return Guided(self.networks, partial(self._penalise, weight)) if weight else None

    def _penalise(
        self, weight: float, tokens: list[list[int]], logits: torch.Tensor, told: list[torch.Tensor]
    ) -> torch.Tensor:
        plus, minus = (theirs.log_softmax(dim=-1) for theirs in told)
        return logits + weight * as_wide_as(logits, (plus - minus) / (2 * self.epsilon), 0.0)
