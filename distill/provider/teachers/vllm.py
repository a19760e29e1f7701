from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from distill.config import digest
from distill.errors import DistillError
from distill.language import Completions, Prompts, Sampling, Task, texts
from distill.provider.teachers.huggingface import find
from distill.randomness import derive
from distill.records import file_hash
from distill.speaker import Tokenizing

if TYPE_CHECKING:
    from distill.training import Trainer

INSTALL = "pip install vllm"


class VLLM(Tokenizing):
    """A language model in vLLM's offline engine, for models and numbers of answers that want several GPUs.

    Written against the interface that vLLM documents for 0.11 and later; NOT RUN HERE, where there is no GPU.

    Paper: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023.

    A drawn answer has a seed of its own, made of (sampling.seed, prompt, repeat). Log-probabilities are *processed*
    ones, after temperature and top-p, because raw ones leave out whatever changes the logits while decoding; they are
    therefore told only where the two agree, at temperature 0 or 1 with top-p 1.

    Args:
        model: An id on the hub, or a folder.
        revision: Branch, tag or commit on the hub; None for the newest.
        dtype: As of vLLM: "auto", "bfloat16", "float16", "float32".
        tensor_parallel_size: Over how many GPUs each layer is spread.
        gpu_memory_utilization: Share of each GPU's memory that the engine takes.
        context: Longest prompt and answer together; None for the model's own.
        top_k: How many log-probabilities it can tell at each position.
        chat_template: A Jinja template; None for the model's own.

    Raises:
        DistillError: vLLM is not installed or can't serve the model, or see `generate`.
    """

    remote: ClassVar[bool] = False
    requests_at_once: ClassVar[int] = 4096
    usd_per_mtok_in: ClassVar[float] = 0.0
    usd_per_mtok_out: ClassVar[float] = 0.0
    parameters: ClassVar[int | None] = None  # of the engine's own processes, which do not tell
    flops_per_token: ClassVar[float | None] = None

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        dtype: str = "auto",
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        context: int | None = None,
        top_k: int = 20,
        chat_template: str | None = None,
    ) -> None:
        self.model, self.revision, self.dtype = model, revision, dtype
        self.tensor_parallel_size, self.gpu_memory_utilization = tensor_parallel_size, gpu_memory_utilization
        self.context, self.top_k, self.chat_template = context, top_k, chat_template

    def prepare(self, task: Task, trainer: Trainer, cache: Path) -> None:
        """Start the engine."""
        try:
            from vllm import LLM
        except (ImportError, RuntimeError) as error:  # it looks for a GPU as it is imported
            raise DistillError(f"vLLM can't be loaded ({error}); {INSTALL}", "teacher") from error
        where, options = find(self.model, self.revision)
        try:
            self._engine = LLM(
                model=where,
                revision=options.get("revision"),
                dtype=self.dtype,
                tensor_parallel_size=self.tensor_parallel_size,
                gpu_memory_utilization=self.gpu_memory_utilization,
                max_model_len=self.context,
                max_logprobs=self.top_k,
                logprobs_mode="processed_logprobs",
                seed=0,
            )
        except (OSError, ValueError, RuntimeError) as error:
            problem = " ".join(str(error).split())[:300]
            raise DistillError(f"vLLM can't serve {self.model}: {problem}", "teacher.model") from error
        self.tokenizer = self._engine.get_tokenizer()
        if self.chat_template is not None:
            self.tokenizer.chat_template = self.chat_template
        self.context_tokens = self._engine.llm_engine.model_config.max_model_len
        self.fingerprint = digest(
            {
                "weights": options.get("revision") or _content(Path(where)),
                "dtype": self.dtype,
                "chat_template": self.tokenizer.chat_template,
            },
            length=32,
        )

    def generate(self, prompts: Prompts, sampling: Sampling, repeats: np.ndarray, top_k: int = 0) -> Completions:
        """Clean answers with their tokens.

        Raises:
            DistillError: As `count_tokens`; or log-probabilities are asked for at a temperature at which they are not
                the model's.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        if top_k and (sampling.temperature not in (0, 1) or sampling.top_p != 1):
            raise DistillError(
                "vLLM tells log-probabilities after temperature and top-p; take temperature 0 or 1 and top_p 1, or an "
                "access that reveals text alone",
                "sampling.temperature",
            )
        tokens = self.prompt_tokens(prompts, sampling)
        asked = [
            SamplingParams(
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                stop=list(sampling.stop),
                seed=derive(sampling.seed, "generation", key.hex(), repeat),
                logprobs=top_k or None,
                logit_bias=dict(sampling.logit_bias) or None,
            )
            for key, repeat in zip(prompts.keys.tolist(), repeats.tolist(), strict=True)
        ]
        requests = [TokensPrompt(prompt_token_ids=some) for some in tokens]
        answered = self._engine.generate(requests, asked, use_tqdm=False)
        return _completions([request.outputs[0] for request in answered], [len(some) for some in tokens], top_k)


def _completions(outputs: list[Any], prompt_tokens: list[int], top_k: int) -> Completions:
    """From vLLM's `CompletionOutput` of each request."""
    lengths = np.array([len(output.token_ids) for output in outputs], dtype=np.int64)
    total = int(lengths.sum())
    flat: dict[str, Any] = {}
    if top_k:
        logprobs = np.zeros(total, np.float32)
        ids, values = np.full((total, top_k), -1, np.int32), np.full((total, top_k), -np.inf, np.float32)
        places = ((output, t) for output in outputs for t in range(len(output.token_ids)))
        for i, (output, t) in enumerate(places):
            told = output.logprobs[t]  # the k most probable tokens, and the drawn one where it is none of them
            logprobs[i] = told[output.token_ids[t]].logprob
            for token, entry in told.items():
                if entry.rank <= top_k:
                    ids[i, entry.rank - 1], values[i, entry.rank - 1] = token, entry.logprob
        flat = {"logprobs": logprobs, "top_ids": ids, "top_logprobs": values}
    return Completions(
        texts([output.text for output in outputs]),
        texts([output.finish_reason for output in outputs]),
        np.array(prompt_tokens, dtype=np.int64),
        lengths,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        token_ids=np.array([token for output in outputs for token in output.token_ids], dtype=np.int32),
        **flat,
    )


def _content(folder: Path) -> str:
    """The hash of all files of a model's folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest(json.dumps([[str(path.relative_to(folder)), file_hash(path)] for path in files]), length=32)
