from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distill.config import digest
from distill.decoding import padded
from distill.errors import DistillError
from distill.kept import find, held
from distill.language import Prompts, Sampling, Task
from distill.language_training import Computed
from distill.randomness import derive
from distill.records import file_hash
from distill.speaker import CausalLM
from distill.training import Recipe, TensorFeatures, Trainer

log = logging.getLogger(__name__)

SCHEMA = 1  # raised when a change of code changes what the same description trains
SPECIAL = ("<|end|>", "<|unknown|>", "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ALIKE = 8  # rows that are padded to one length: few, so that short ones stay short; enough to fill a processor


class TinyCoT(CausalLM):
    """A small language model that reasons in writing, trained here, once, on the references of the task.

    Its tokens are the characters of the task. What is kept in the cache is a folder that `hf_causal_lm` reads as well.

    Its place in the cache is a hash of all that determines it. Several processes that need the same teacher wait for
    the one that trains it; a killed training goes on from its last checkpoint; damaged weights are trained anew.

    Paper: the architecture is that of LLaMA: Open and Efficient Foundation Language Models, arXiv 2302.13971, 2023.

    Args:
        recipe: How it is trained.
        width: Of the residual stream.
        layers: Decoder layers.
        heads: Attention heads, a divisor of half of `width`.
        mlp_width: Of the gated feed-forward network.
        initializer_range: Standard deviation of the initial weights.
        context: Longest prompt and answer together, in characters.
        seed: The teacher's own: runs that differ in the seed of the attack face the same teacher.
        batch_size: How many requests are answered at once.

    Raises:
        DistillError: A size is out of its range, or the task has nothing to learn from.
    """

    def __init__(
        self,
        recipe: Recipe,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        mlp_width: int = 256,
        initializer_range: float = 0.05,
        context: int = 512,
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        super().__init__(batch_size)
        sizes = {"width": width, "layers": layers, "heads": heads, "mlp_width": mlp_width, "context": context}
        for name, value in sizes.items():
            if value < 1:
                raise DistillError(f"must be at least 1, not {value}", f"teacher.{name}")
        if width % (2 * heads):
            raise DistillError(f"must be an even multiple of heads ({heads}), not {width}", "teacher.width")
        self._config = LlamaConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=mlp_width,
            max_position_embeddings=context,
            initializer_range=initializer_range,
            tie_word_embeddings=True,
            bos_token_id=None,
        )
        self._sizes = sizes | {"initializer_range": initializer_range}
        self.context, self.recipe, self.seed = context, recipe, seed

    def prepare(self, task: Task, trainer: Trainer, cache: Path) -> None:
        """Load the weights, or train them with all processes of `trainer`."""
        if not len(task.train) or task.train.references is None:
            raise DistillError(f"{task.name} has no answers to train the teacher on", "data")
        facts = {
            "schema": SCHEMA,
            "sizes": self._sizes,
            "template": TEMPLATE,
            "recipe": dataclasses.asdict(self.recipe),
            "seed": self.seed,
            "precision": trainer.precision,
            "train": task.train.fingerprint,
        }
        folder = cache / "teachers" / f"tiny_cot-{digest(facts, length=16)}"
        with held(folder, "teacher") if trainer.is_main else contextlib.nullcontext():
            # All ranks must do the same, so one looks. The others hold no lock: this one does until all are done.
            if trainer.broadcast(find(folder, "teacher.json", "teacher") if trainer.is_main else None) is None:
                self._train(task.train, trainer, facts, folder)
            else:
                log.info("the teacher is the one trained before: %s", folder)
            trainer.wait()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.hold(LlamaForCausalLM.from_pretrained(folder).to(trainer.device), tokenizer)

    def _train(self, lessons: Prompts, trainer: Trainer, facts: Mapping[str, Any], folder: Path) -> None:
        log.info("training the teacher on %d answers of %s; it is kept in %s", len(lessons), lessons.name, folder)
        training = folder.with_name(f"{folder.name}-training")
        self.tokenizer, self.context_tokens = _characters(lessons), None
        self._config.vocab_size = len(self.tokenizer)
        self._config.eos_token_id = self._config.pad_token_id = self.tokenizer.eos_token_id
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive(self.seed, "teacher"))
            model = LlamaForCausalLM(self._config)
        features, positions = self._lessons(lessons)
        history = trainer.fit(
            _Lessons(model),
            features,
            {"positions": positions},
            Computed(),
            self.recipe,
            seed=derive(self.seed, "teacher"),
            name="teacher",
            directory=training,
        )
        if trainer.is_main:
            partial = folder.with_name(f"{folder.name}-partial")
            shutil.rmtree(partial, ignore_errors=True)
            model.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
            record = {"weights": file_hash(partial / "model.safetensors"), "history": history, "facts": facts}
            (partial / "teacher.json").write_text(json.dumps(record, indent=1) + "\n")
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)
            shutil.rmtree(training, ignore_errors=True)

    def _lessons(self, lessons: Prompts) -> tuple[TensorFeatures, torch.Tensor]:
        """The features of each row and the number of tokens that are learnt in it."""
        assert lessons.references is not None
        prompts = self.prompt_tokens(lessons, Sampling(max_tokens=1))
        answers = self.tokenizer([f"{answer}<|end|>" for answer in lessons.references]).input_ids
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        length = torch.tensor([len(row) for row in rows])
        if int(length.max()) > self.context:
            raise DistillError(f"must hold the longest lesson, of {int(length.max())} tokens", "teacher.context")
        first = torch.tensor([len(prompt) for prompt in prompts])
        return TensorFeatures({"tokens": padded(rows), "first": first, "length": length}), length - first


class _Lessons(torch.nn.Module):
    """The loss of some rows, of their answers alone: rows of about one length go through the network together.

    Args:
        model: What is trained.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, first: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Scalar: summed over the tokens from `first` (n,) on of `tokens` (n, t), of which a row has `length` (n,)."""
        hidden, labels = [], []
        for rows in length.argsort(stable=True).split(ALIKE):
            some = tokens[rows, : int(length[rows[-1]])]
            place = torch.arange(1, some.shape[1], device=some.device)
            learnt = (place >= first[rows, None]) & (place < length[rows, None])
            states = self.model.model(input_ids=some[:, :-1], use_cache=False).last_hidden_state
            hidden.append(states[learnt])
            labels.append(some[:, 1:][learnt])
        logits = self.model.lm_head(torch.cat(hidden)).float()
        return torch.nn.functional.cross_entropy(logits, torch.cat(labels), reduction="sum")


def _characters(lessons: Prompts) -> PreTrainedTokenizerFast:
    """A tokenizer of the characters that occur."""
    assert lessons.references is not None
    seen: set[str] = set().union(*lessons.references)
    for row in range(len(lessons)):
        seen.update(*(message["content"] for message in lessons.messages(row)))
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(seen)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        unk_token="<|unknown|>",
        additional_special_tokens=list(SPECIAL[2:]),
        chat_template=TEMPLATE,
    )
