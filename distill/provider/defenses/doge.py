from __future__ import annotations

import bisect
import contextlib
import copy
import dataclasses
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distill.config import digest
from distill.contracts import LanguageStudent, LanguageTeacher
from distill.decoding import Network, padded
from distill.errors import DistillError
from distill.kept import find, held
from distill.language import SyntheticSet, Task
from distill.language_training import Computed
from distill.packing import encode
from distill.provider.defenses._language import Unchanged
from distill.provider.defenses._proxy import as_wide_as, own_answers, proxy_of, training_prompts
from distill.provider.defenses._released import ANSWER
from distill.randomness import derive
from distill.records import InterfaceProfile, Reveals, file_hash
from distill.rewriting import pattern
from distill.speaker import CausalLM
from distill.training import Recipe, TensorFeatures

log = logging.getLogger(__name__)

SCHEMA = 1  # raised when a change of code changes what the same description trains
WEIGHTS = "model.safetensors"


class DOGe(Unchanged):
    """The teacher's output matrix is trained to reason unlike models such as the attacker's, and to answer as before.

    Paper: DOGe: Defensive Output Generation for LLM Protection Against Knowledge Distillation (Li, Tan, Zhang, Qu, Liu
    and Chen, arXiv 2505.19504, 2025). On the teacher's own answers the head alone minimises

        ``L = L_SFT - strength mean_j sum_t m_t KL(teacher / alpha || proxy_j / alpha)``,

    L_SFT the mean cross-entropy over all tokens, the sum over the tokens of an answer and its mean over answers; m_t is
    1 where an answer reasons and 0 in its conclusion. All other weights stay; tied embeddings are untied.
    Threat model: an attacker who trains on the text; its student is like the proxies, which it does not see. Another
    teacher answers from then on, at the same cost, and its answers may be told in full.

    What is unclear: the paper's own text was not at hand. The direction of the divergence, alpha and strength are those
    of the authors' code: from teacher to proxy, both at temperature 2, unscaled, 0.001, one proxy. Departs from that
    code: it passes no mask, so that prompts and conclusions are pushed apart too; its proxy is a pretrained model as it
    is, where these are trained on the teacher's answers (unless `trained_proxies` is off); it can train a residual
    network in place of the head. Tokens that a proxy lacks have no share in the divergence.

    A teacher that is sure of each token only becomes surer, in either direction: the divergence to the proxy is largest
    where one token has all mass, and the one from it has no bound as the others lose theirs. Then it says what it said
    before (as on `straight_line`); what this can change is text that could have been said in several ways.

    Args:
        proxies: The models that it must not be like: students.
        proxy_recipe: How they are trained.
        recipe: How the head is trained; a row is an answer.
        strength: Weight of the divergence; 0 trains on the teacher's own answers and no more.
        alpha: Temperature of both sides of the divergence.
        toward_proxy: The divergence from proxy to teacher instead.
        answer: A regular expression: the conclusion is what stands from its first match on. An answer that it does not
            match is all conclusion.
        answers: How many answers of the teacher all of them are trained on.
        trained_proxies: Off for proxies that come trained.
        max_tokens: Of such an answer.
        max_length: Positions of a packed row of the proxies' training.

    Raises:
        DistillError: A number is out of range, the expression is none, the teacher's weights are elsewhere, or its
            tokens are not the proxies'.
    """

    exposes = InterfaceProfile(Reveals.LOGITS, logit_bias=True, prompt_logprobs=True)
    fingerprint = ""  # until `prepare`

    def __init__(
        self,
        proxies: Sequence[LanguageStudent],
        proxy_recipe: Recipe,
        recipe: Recipe,
        strength: float = 0.001,
        alpha: float = 2.0,
        toward_proxy: bool = False,
        answer: str = ANSWER,
        answers: int = 2000,
        trained_proxies: bool = True,
        max_tokens: int = 256,
        max_length: int = 512,
    ) -> None:
        if not proxies:
            raise DistillError("needs at least one model", "defense.proxies")
        if not strength >= 0:
            raise DistillError(f"must be at least 0, not {strength}", "defense.strength")
        if not alpha > 0:
            raise DistillError(f"must be more than 0, not {alpha}", "defense.alpha")
        for name, value in {"answers": answers, "max_tokens": max_tokens, "max_length": max_length}.items():
            if value < 1:
                raise DistillError(f"must be at least 1, not {value}", f"defense.{name}")
        self.proxies, self.proxy_recipe, self.recipe = list(proxies), proxy_recipe, recipe
        self.strength, self.alpha, self.toward_proxy = strength, alpha, toward_proxy
        self.answer, self.answers, self.trained_proxies = pattern("answer", answer), answers, trained_proxies
        self.max_tokens, self.max_length = max_tokens, max_length

    def prepare(self, teacher: LanguageTeacher, task: Task, trainer: Any, cache: Path, seed: int) -> LanguageTeacher:
        """The teacher with its new head, trained or loaded."""
        if not isinstance(teacher, CausalLM):
            raise DistillError(
                "trains the teacher's output matrix, so it needs a teacher whose weights are here; use hf_causal_lm, "
                "smollm2 or tiny_cot",
                "defense",
            )
        prompts = training_prompts(task, slice(0, self.answers), "defense.answers")
        proxies = [
            proxy_of(
                teacher,
                proxy,
                self.proxy_recipe,
                prompts if self.trained_proxies else prompts.take(slice(0, 0)),
                max_tokens=self.max_tokens,
                max_length=self.max_length,
                trainer=trainer,
                cache=cache,
                seed=derive(seed, "proxy", place),
                key=f"defense.proxies.{place}",
            )
            for place, proxy in enumerate(self.proxies)
        ]
        facts = {
            "schema": SCHEMA,
            "teacher": teacher.fingerprint,
            "proxies": [proxy.fingerprint for proxy in proxies],
            "prompts": prompts.fingerprint,
            "options": [self.strength, self.alpha, self.toward_proxy, self.answer.pattern, self.max_tokens],
            "recipe": dataclasses.asdict(self.recipe),
            "seed": seed,
            "precision": trainer.precision,
        }
        folder = cache / "heads" / digest(facts, length=16)
        network = untied(teacher.network)
        head = network.get_output_embeddings()
        with held(folder, "head") if trainer.is_main else contextlib.nullcontext():
            # All ranks must do the same, so one looks. The others hold no lock: this one does until all are done.
            if trainer.broadcast(find(folder, "head.json", "head") if trainer.is_main else None) is None:
                log.info("training the head on %d answers of the teacher; it is kept in %s", len(prompts), folder)
                synthetic = own_answers(teacher, prompts, self.max_tokens, cache, seed)
                features, positions = self.lessons(synthetic, teacher.tokenizer)
                module = Defensive(
                    network,
                    [proxy.network for proxy in proxies],
                    self.strength * float(positions.sum()) / len(positions),
                    self.alpha,
                    self.toward_proxy,
                )
                training = folder.with_name(f"{folder.name}-training")
                history = trainer.fit(
                    module,
                    features,
                    {"positions": positions},
                    Computed(),
                    self.recipe,
                    seed=derive(seed, "head"),
                    name="head",
                    directory=training,
                )
                if trainer.is_main:
                    _keep(head, {"history": history, "facts": facts}, folder)
                    shutil.rmtree(training, ignore_errors=True)
            else:
                head.load_state_dict(load_file(folder / WEIGHTS))
                log.info("the head is the one trained before: %s", folder)
            trainer.wait()
        defended: Any = copy.copy(teacher)
        defended.hold(network.to(trainer.device), teacher.tokenizer)
        self.fingerprint = defended.fingerprint
        return defended

    def lessons(self, synthetic: SyntheticSet, tokenizer: Any) -> tuple[TensorFeatures, torch.Tensor]:
        """The features of each answer, and how many of its tokens are learnt."""
        encoded = encode(synthetic, tokenizer, tokenizer)
        rows, first, conclusion = [], [], []
        for prompt, answer, text in zip(encoded.prompts, encoded.answers, synthetic.completions.column, strict=True):
            match = self.answer.search(text)
            reasoning = 0 if match is None else _tokens_before(tokenizer, answer, match.start())
            rows.append(prompt + answer)
            first.append(len(prompt))
            conclusion.append(len(prompt) + reasoning)
        length = torch.tensor([len(row) for row in rows])
        starts = torch.tensor(first)
        features = {"tokens": padded(rows), "first": starts, "conclusion": torch.tensor(conclusion), "length": length}
        return TensorFeatures(features), length - starts


class Defensive(nn.Module):
    """The loss of the head, summed over the tokens of some answers.

    Args:
        network: A Hugging Face causal language model; its output matrix is trained and nothing else.
        proxies: Others, with the same tokens. They are not parts of this module.
        weight: Of the divergence at a token against the cross-entropy at a token.
        alpha: See `DOGe`.
        toward_proxy: See `DOGe`.
    """

    def __init__(self, network: Any, proxies: Sequence[Any], weight: float, alpha: float, toward_proxy: bool) -> None:
        super().__init__()
        self.head = network.get_output_embeddings().requires_grad_()
        self._teacher, self._proxies = Network(network), [Network(proxy) for proxy in proxies]
        self._weight, self._alpha, self._toward_proxy = weight, alpha, toward_proxy

    def forward(
        self, tokens: torch.Tensor, first: torch.Tensor, conclusion: torch.Tensor, length: torch.Tensor
    ) -> torch.Tensor:
        """Scalar, in nats.

        Args:
            tokens: (n, t), padded on the right.
            first: (n,), the first token of each answer.
            conclusion: (n,), the first of its conclusion.
            length: (n,), tokens of prompt and answer.
        """
        tokens = tokens[:, : int(length.max())]
        place = torch.arange(1, tokens.shape[1], device=tokens.device)
        learnt = (place >= first[:, None]) & (place < length[:, None])
        reasons = (place < conclusion[:, None])[learnt]
        with torch.no_grad():
            hidden = self._teacher.hidden(tokens[:, :-1])[0][learnt]
        logits = dataclasses.replace(
            self._teacher.head(hidden), weight=self.head.weight, bias=dict(self.head.named_parameters()).get("bias")
        ).logits()
        loss = nn.functional.cross_entropy(logits, tokens[:, 1:][learnt], reduction="sum")
        if not self._weight or not reasons.any():
            return loss
        ours = logits[reasons]
        apart = torch.zeros((), device=loss.device)
        for proxy in self._proxies:
            with torch.no_grad():
                states = proxy.hidden(tokens[:, :-1])[0][learnt]
                theirs = as_wide_as(ours, proxy.head(states[reasons]).logits(), -torch.inf)
            apart = apart + divergence(ours / self._alpha, theirs / self._alpha, self._toward_proxy)
        return loss - self._weight * apart / len(self._proxies)


def divergence(teacher: torch.Tensor, proxy: torch.Tensor, toward_proxy: bool) -> torch.Tensor:
    """Scalar: KL(teacher || proxy) of (n, vocabulary) logits, or KL(proxy || teacher), summed over rows.

    Both are distributions over the tokens that the proxy has: its other logits are -inf.
    """
    lacks = proxy == -torch.inf
    log_p, log_q = (
        logits.masked_fill(lacks, -torch.inf).log_softmax(dim=-1).masked_fill(lacks, 0.0) for logits in (teacher, proxy)
    )
    of, to = (log_q, log_p) if toward_proxy else (log_p, log_q)
    return (of.exp() * (of - to)).sum()


def untied(network: Any) -> Any:
    """The same network with an output matrix of its own. All other weights are shared with it."""
    shared = {id(value): value for value in (*network.parameters(), *network.buffers())}
    copied = copy.deepcopy(network, shared)
    head = copied.get_output_embeddings()
    for name, value in list(head.named_parameters()):
        setattr(head, name, nn.Parameter(value.detach().clone(), requires_grad=False))
    copied.config.tie_word_embeddings = copied.config.get_text_config().tie_word_embeddings = False
    return copied


def _tokens_before(tokenizer: Any, tokens: list[int], place: int) -> int:
    """How many of the tokens lie wholly before a place in their text."""

    def end(count: int) -> int:
        return len(tokenizer.decode(tokens[:count], skip_special_tokens=True))

    return bisect.bisect_right(range(len(tokens) + 1), place, key=end) - 1


def _keep(head: nn.Module, record: dict[str, Any], folder: Path) -> None:
    partial = folder.with_name(f"{folder.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file({name: value.contiguous() for name, value in head.state_dict().items()}, partial / WEIGHTS)
    record = {"weights": file_hash(partial / WEIGHTS)} | record
    (partial / "head.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
