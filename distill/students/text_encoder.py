"""A text classifier without a vocabulary."""

from __future__ import annotations

import re
import zlib
from functools import cache

import numpy as np
import torch
from torch import nn

from distill.records import Inputs, InputSpec
from distill.students import _inputs
from distill.training import Features

_WORD = re.compile(r"\w+|[^\w\s]")


class TextEncoder:
    """Hashed words, an embedding, optional Transformer layers, mean and max pooling, a linear layer.

    Words are hashed (Weinberger, Dasgupta, Langford, Smola and Attenberg, "Feature Hashing for Large Scale Multitask
    Learning", ICML 2009), so that there is no vocabulary to fit and none to steal; without layers this is close to
    fastText (Joulin, Grave, Bojanowski and Mikolov, "Bag of Tricks for Efficient Text Classification", EACL 2017).

    Args:
        buckets: Rows of the embedding; words with one hash share a row.
        width: Of the embedding and the layers.
        layers: Transformer encoder layers, with learnt positions; 0 for a bag of words.
        heads: Attention heads of each layer.
        max_length: Words of a text that are read.
        dropout: In the layers, and before the last linear layer.
    """

    def __init__(
        self,
        buckets: int = 32768,
        width: int = 64,
        layers: int = 0,
        heads: int = 4,
        max_length: int = 256,
        dropout: float = 0.0,
    ) -> None:
        least = {"buckets": (buckets, 2), "width": (width, 1), "layers": (layers, 0), "heads": (heads, 1)}
        for name, (value, bound) in (least | {"max_length": (max_length, 1)}).items():
            if value < bound:
                raise ValueError(f"{name} is at least {bound}, not {value}")
        if layers and width % heads:
            raise ValueError(f"width is a multiple of heads, not {width} for {heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is at least 0 and less than 1, not {dropout}")
        self.buckets, self.width, self.layers, self.heads = buckets, width, layers, heads
        self.max_length, self.dropout = max_length, dropout

    def build(self, spec: InputSpec, classes: int) -> nn.Module:
        """Raises `DistillError` for images and tables."""
        _inputs.need("TextEncoder", spec, "text")
        return _Network(self.buckets, self.width, self.layers, self.heads, self.max_length, self.dropout, classes)

    def encode(self, inputs: Inputs, spec: InputSpec) -> Features:
        """``tokens``: (n, max_length) int32 in ``range(buckets)``; 0 pads."""
        return _inputs.as_features(inputs, self.tokens, 4 * self.max_length)

    def tokens(self, texts: np.ndarray) -> dict[str, torch.Tensor]:
        """(n,) texts as ``tokens``. The hash is the same on every machine."""

        @cache
        def bucket(word: str) -> int:
            return 1 + zlib.crc32(word.encode()) % (self.buckets - 1)

        tokens = np.zeros((len(texts), self.max_length), dtype=np.int32)
        for i, text in enumerate(texts):
            words = _WORD.findall(text.lower())[: self.max_length]
            tokens[i, : len(words)] = [bucket(word) for word in words]
        return {"tokens": torch.from_numpy(tokens)}


class _Network(nn.Module):
    def __init__(
        self, buckets: int, width: int, layers: int, heads: int, max_length: int, dropout: float, classes: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(buckets, width, padding_idx=0)
        # A mean over many words is small; short rows learn as fast as it takes to matter.
        nn.init.normal_(self.embedding.weight[1:], std=0.1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.positions = nn.Parameter(torch.randn(max_length, width) * 0.02) if layers else None
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(2 * width)
        self.classifier = nn.Linear(2 * width, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        padding = tokens == 0
        # A text without words is read as one padding token, so that there is something to attend to.
        padding = padding & ~(padding.all(dim=1, keepdim=True) & (padding.cumsum(dim=1) == 1))
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        hidden = padding.unsqueeze(2)
        mean = x.masked_fill(hidden, 0).sum(dim=1) / (~hidden).sum(dim=1)
        largest = x.masked_fill(hidden, -torch.inf).amax(dim=1)
        return self.classifier(self.dropout(self.norm(torch.cat([mean, largest], dim=1))))
