from __future__ import annotations

from typing import Any

import numpy as np
import torch

from distill.errors import DistillError
from distill.heads import Head, Sparse
from distill.records import Reveals

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}


class HiddenStates:
    """The teacher's last hidden states, and its output matrix once: its whole distributions, exactly.

    Paper: none; logits are a linear function of the last hidden state, which is smaller by vocabulary / width.

    What is decoded equals what was encoded bit for bit. A position takes width · 2 bytes in bfloat16 or float16 and
    width · 4 in float32: the smallest exact form, and for narrow teachers smaller than top-k lists.

    Raises:
        DistillError: The distributions are not those of a local model, or not of the model that the first ones were of.
    """

    requires = Reveals.LOGITS

    def __init__(self) -> None:
        self.identity: dict[str, Any] = {"signal": "hidden_states"}

    def fit(self, first: Head | Sparse, vocabulary: int) -> dict[str, np.ndarray]:
        head = _whole(first)
        if head.vocabulary != vocabulary:
            raise DistillError(f"the teacher has {head.vocabulary} tokens, not {vocabulary}", "signal")
        shared = {
            "weight": _bytes(head.weight),
            "dtypes": np.array([_name(head.weight), _name(head.hidden)]),
            "shape": np.array(head.weight.shape),
            "scale": np.array([head.scale] + ([] if head.softcap is None else [head.softcap])),
        }
        if head.bias is not None:
            shared |= {"bias": _bytes(head.bias), "bias_dtype": np.array([_name(head.bias)])}
        return shared

    def codec(self, shared: dict[str, np.ndarray]) -> _Codec:
        return _Codec(shared)


class _Codec:
    def __init__(self, shared: dict[str, np.ndarray]) -> None:
        weight, self._dtype = (str(name) for name in shared["dtypes"])
        vocabulary, self._width = (int(size) for size in shared["shape"])
        self._weight = _tensor(shared["weight"], weight).reshape(vocabulary, self._width)
        self._bias = _tensor(shared["bias"], str(shared["bias_dtype"][0])) if "bias" in shared else None
        scale = shared["scale"].tolist()
        self._scale, self._softcap = scale[0], scale[1] if len(scale) > 1 else None

    def encode(self, distributions: Head | Sparse, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        head = _whole(distributions)
        if head.hidden.shape[1] != self._width or _name(head.hidden) != self._dtype:
            raise DistillError(
                f"this cache holds {self._dtype} states of width {self._width}, "
                f"not {_name(head.hidden)} of width {head.hidden.shape[1]}",
                "signal",
            )
        data = _bytes(head.hidden)
        return data, np.full(len(head), self._width * DTYPES[self._dtype].itemsize)

    def decode(self, data: np.ndarray, lengths: np.ndarray) -> Head:
        hidden = _tensor(data, self._dtype).reshape(len(lengths), self._width)
        return Head(hidden, self._weight, self._bias, self._scale, self._softcap)


def _whole(distributions: Head | Sparse) -> Head:
    if isinstance(distributions, Sparse):
        raise DistillError("takes a local teacher's hidden states; take signal=top_k for another", "signal")
    return distributions


def _name(tensor: torch.Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise DistillError(f"stores {', '.join(DTYPES)} states, not {name}", "signal")
    return name


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _tensor(data: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(np.array(data, dtype=np.uint8)).view(DTYPES[dtype])
