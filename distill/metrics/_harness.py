"""A model at hand as lm-evaluation-harness sees models. Imported where that package is."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, Protocol

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from distill.errors import DistillError
from distill.language import Completions, Prompts, Sampling, Speaker, texts

log = logging.getLogger(__name__)

CONTEXT = 2048  # tokens that a model which states no limit reads at once
AT_ONCE = 64  # sequences whose last hidden states are held at once
ANSWER = 256  # tokens of an answer where a task does not say; what the harness takes too


class WritingSpeaker(Speaker, Protocol):
    """A speaker that also answers, as `distill.contracts.LocalLanguageTeacher` does."""

    context_tokens: int | None

    def generate(self, prompts: Prompts, sampling: Sampling, repeats: np.ndarray) -> Completions: ...


class Harness(TemplateLM):
    """How texts are split into tokens and an empty context is filled comes from the harness; log-likelihoods and
    answers come from the speaker.

    What is too long for the model loses its beginning, as in the harness's own models; they let the last token of a
    scored text lie one beyond the context, and here it lies within.

    Args:
        speaker: The model.
    """

    def __init__(self, speaker: WritingSpeaker) -> None:
        super().__init__()
        self._speaker, self.tokenizer = speaker, speaker.tokenizer
        self._context = speaker.context_tokens or CONTEXT
        bos = self.tokenizer.bos_token_id
        self._adds_bos = bos is not None and self.tokenizer("").input_ids[:1] == [bos]

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        special = add_special_tokens is not False
        return self.tokenizer(self._without_bos(string) if special else string, add_special_tokens=special).input_ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text in nats: every token once, in windows as long as the context."""
        pairs, row_of = [], []
        for row, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self._context - 1, context_len=1)
            for before, predicted in map(make_disjoint_window, windows):
                pairs.append((("", ""), before, predicted))
                row_of.append(row)
        totals = [0.0] * len(requests)
        for row, (nats, _) in zip(row_of, self._loglikelihood_tokens(pairs), strict=True):
            totals[row] += nats
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer to each request, up to its stop texts. Requests with the same options are answered together."""
        groups: dict[Sampling, list[int]] = {}
        for row, request in enumerate(requests):
            groups.setdefault(_sampling(request.args[1]), []).append(row)
        answers = [""] * len(requests)
        for sampling, rows in groups.items():
            fitted = [self._fitting(requests[row].args[0], sampling.max_tokens) for row in rows]
            asked = [text for text, _ in fitted]
            if cut := sum(shortened for _, shortened in fitted):
                log.warning("lm_eval: %d of %d prompts are too long and lose their beginning", cut, len(asked))
            seen: Counter[str] = Counter()
            repeats = []
            for text in asked:
                repeats.append(seen[text])
                seen[text] += 1
            prompts = Prompts(texts(asked), chat=False, name="lm_eval")
            made = self._speaker.generate(prompts, sampling, np.array(repeats, dtype=np.int64))
            for row, answer in zip(rows, made.column, strict=True):
                answers[row] = answer
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each context and continuation: log-probability in nats, and whether it is the greedy answer."""
        sequences, starts = [], []
        for _, context, continuation in requests:
            if len(continuation) >= self._context:
                raise DistillError(
                    f"a task has answers of {len(continuation)} tokens and the model reads {self._context} in all; "
                    "leave the task out",
                    "metric.lm_eval.tasks",
                )
            tokens = [*(context or [self.prefix_token_id]), *continuation][-self._context :]
            sequences.append(tokens)
            starts.append(len(tokens) - len(continuation))
        results = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda row: -len(sequences[row]))
        for first in range(0, len(order), AT_ONCE):
            rows = order[first : first + AT_ONCE]
            heads = self._speaker.heads([sequences[row] for row in rows], [starts[row] for row in rows])
            for row, head in zip(rows, heads, strict=True):
                logprobs = head.logits().double().log_softmax(dim=1)
                said = torch.tensor(sequences[row][starts[row] :], dtype=torch.int64, device=logprobs.device)
                nats = logprobs.gather(1, said[:, None]).sum().item()
                results[row] = nats, bool((logprobs.argmax(dim=1) == said).all())
        return results

    def _fitting(self, text: str, max_tokens: int) -> tuple[str, bool]:
        """The text, or as much of its end as leaves room for the answer (True), and never nothing."""
        room = self._context - max_tokens
        if room < 1:
            raise DistillError(
                f"a task has answers of up to {max_tokens} tokens and the model reads {self._context} in all; lower "
                "max_gen_toks in the task's generation_kwargs or leave the task out",
                "metric.lm_eval.tasks",
            )
        text = self._without_bos(text) if text.strip() else self.tokenizer.decode([self.prefix_token_id])
        tokens = self.tok_encode(text)
        if len(tokens) <= room:
            return text, False
        for kept in range(room, 0, -1):  # the end by itself may be split into a few tokens more
            text = self.tokenizer.decode(tokens[-kept:])
            if len(self.tok_encode(text)) <= room:
                break
        return text, True

    def _without_bos(self, text: str) -> str:
        """Chat templates write the first token that the tokenizer adds as well."""
        return text.removeprefix(self.tokenizer.bos_token) if self._adds_bos else text


def _sampling(options: dict[str, Any]) -> Sampling:
    """What a task's `generation_kwargs` ask for."""
    until = options.get("until") or ()
    return Sampling(
        max_tokens=int(options.get("max_gen_toks", ANSWER)),
        temperature=float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0,
        top_p=float(options.get("top_p", 1.0)),
        stop=(until,) if isinstance(until, str) else tuple(until),
    )
