"""What the two teachers made of a Hugging Face classifier share: finding, loading, identity and prediction."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from distill.errors import DistillError, MissingAsset
from distill.provider.teachers.classes import column_order
from distill.records import Dataset, Reveals
from distill.training import LazyFeatures, measure

if TYPE_CHECKING:
    from distill.training import Trainer

HUB_TIMEOUT_S = 10.0


class HFClassifier:
    """A classifier of the Hugging Face hub, or of a folder, used as it is.

    A subclass names the model's class (`auto_model`) and turns inputs into the model's arguments (`_load_reader`,
    `_encode`). Weights are held in float32. Every batch is filled up to `batch_size` rows, so an answer does not
    depend on how many inputs came with it.
    """

    kind: ClassVar[str]  # of the inputs that it reads
    auto_model: ClassVar[Any]
    output: ClassVar[Reveals] = Reveals.LOGITS
    usd_per_query: ClassVar[float] = 0.0
    remote: ClassVar[bool] = False
    rows_at_once: ClassVar[int] = 512

    def __init__(self, model: str, revision: str | None, batch_size: int, class_map: Mapping[str, str] | None) -> None:
        if batch_size < 1:
            raise DistillError(f"must be at least 1, not {batch_size}", "teacher.batch_size")
        self.model, self.revision, self.batch_size = model, revision, batch_size
        self._class_map = class_map

    def _load_reader(self, where: str, options: dict[str, Any], config: dict[str, Any], data: Dataset) -> str:
        """Load the processor or tokenizer and return all that identifies it."""
        raise NotImplementedError

    def _encode(self, inputs: np.ndarray) -> dict[str, torch.Tensor]:
        """The model's arguments for some inputs; rows do not depend on one another."""
        raise NotImplementedError

    def prepare(self, data: Dataset, trainer: Trainer, cache: Path) -> None:
        """Load the model.

        Raises:
            MissingAsset: It is neither a folder nor in reach.
            DistillError: It can't be loaded, is no trained classifier, or its classes are not the data's.
        """
        if data.spec.kind != self.kind:
            raise DistillError(
                f"{type(self).__name__} reads {self.kind}, but {data.name} holds {data.spec.kind}", "teacher"
            )
        where, options = find(self.model, self.revision)
        try:
            module, loading = self.auto_model.from_pretrained(
                where, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **options
            )
            config = module.config.to_dict()
            reader = self._load_reader(where, options, config, data)
        except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
            problem = " ".join(str(error).split())[:300]
            raise DistillError(f"{self.model} can't be loaded: {problem}", "teacher.model") from error
        if loading["missing_keys"] or loading["mismatched_keys"]:
            fresh = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
            raise DistillError(
                f"{self.model} is not a trained classifier: it has no weights for {', '.join(fresh[:3])}",
                "teacher.model",
            )
        if module.config.problem_type == "multi_label_classification":
            raise DistillError(f"{self.model} gives several labels to one input; one is needed", "teacher.model")
        names = [str(module.config.id2label[i]) for i in range(module.config.num_labels)]
        self._order = column_order(names, data.class_names, "teacher.class_map", self._class_map)
        self.fingerprint = _fingerprint(module, config, f"{reader} {self._order.tolist()}")
        self._module = _Logits(module).eval().to(trainer.device)
        self._device = trainer.device
        size = measure(self._module, LazyFeatures(data.train.inputs, self._encode))
        self.parameters, self.flops_per_query = int(size["parameters"]), size["flops_per_query"]

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """(n, classes) float32 logits."""
        logits = np.zeros((len(inputs), len(self._order)), dtype=np.float32)
        for start in range(0, len(inputs), self.batch_size):
            batch = inputs[start : start + self.batch_size]
            filled = batch[np.minimum(np.arange(self.batch_size), len(batch) - 1)]
            features = {name: value.to(self._device) for name, value in self._encode(filled).items()}
            with torch.inference_mode():
                output = self._module(**features)[: len(batch)]
            logits[start : start + len(batch)] = output.cpu().numpy()[:, self._order]
        return logits

    def latency_s(self, one: np.ndarray) -> float | None:
        """Of one forward pass with one row."""
        return measure(self._module, LazyFeatures(one, self._encode))["latency_s"]


class _Logits(torch.nn.Module):
    """The network with the interface of the modules that are trained here: arguments in, logits out."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, **features: torch.Tensor) -> torch.Tensor:
        return self.network(**features).logits


def find(model: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """Where to load a model from, and the options that make it so without asking the hub file by file.

    The hub is asked once, with a short timeout: without that, each missing file is tried for half a minute.
    Raises `MissingAsset` where the model is no folder, not on the hub (or the hub can't be reached) and not in the
    hub's cache.
    """
    from huggingface_hub import HfApi, snapshot_download

    if (folder := Path(model).expanduser()).is_dir():
        return str(folder), {"local_files_only": True}
    try:
        return model, {"revision": HfApi().model_info(model, revision=revision, timeout=HUB_TIMEOUT_S).sha}
    except Exception as error:  # the hub's own errors and those of whichever HTTP library it uses
        problem = " ".join(str(error).split())[:200]
    try:
        return snapshot_download(model, revision=revision, local_files_only=True), {"local_files_only": True}
    except (OSError, ValueError):
        raise MissingAsset(
            f"'{model}' is neither a folder nor in the Hugging Face cache, and the hub says: {problem}. Give a folder, "
            f"or where there is a network `hf download {model} --local-dir DIR` and set teacher.model=DIR",
            "teacher.model",
        ) from None


def _fingerprint(module: torch.nn.Module, config: dict[str, Any], reader: str) -> str:
    """Of the weights as loaded, so that it doesn't depend on the format of the files or on where they lie."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    told = {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version", "dtype")}
    digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    digest.update(reader.encode())
    return digest.hexdigest()
