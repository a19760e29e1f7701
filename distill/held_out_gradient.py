"""The loss of a language model on examples that it was not trained on, its gradient, and the model a step along it.

What tells an example that helps a student from one that does not: antidistillation sampling asks it of each token that
a teacher is about to say, a student that reweights asks it of each answer that it was given.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from distill.decoding import padded
from distill.packing import IGNORED, Encoded

LOGITS = 2**26  # that are held at once: bounds the memory, and not the result


def answer_losses(network: nn.Module, encoded: Encoded) -> np.ndarray:
    """(n,) float64: the negative log-likelihood of each answer given its prompt, in nats, summed over its tokens.

    Args:
        network: A Hugging Face causal language model in evaluation mode.
        encoded: n examples, in its tokens. Their weights are not looked at.
    """
    losses = np.zeros(len(encoded))
    with torch.no_grad():
        for rows, tokens, labels in _batches(network, encoded):
            losses[rows] = _losses(network, {}, tokens, labels).cpu().numpy()
    return losses


def gradient(network: nn.Module, encoded: Encoded) -> dict[str, torch.Tensor]:
    """The gradient of the mean of that over the tokens of *all* answers, in float32 or wider, by parameter.

    It is the sum over all tokens divided by their number, so that how the examples are cut into batches changes nothing
    but the last digits. Neither weights nor gradients that the network holds are touched, and parameters that are
    frozen have theirs too.

    Args:
        network: A Hugging Face causal language model in evaluation mode.
        encoded: n examples, in its tokens, with at least one token that is predicted.
    """
    parameters = {name: value.detach().requires_grad_() for name, value in network.named_parameters()}
    total = {name: torch.zeros_like(value, dtype=_wide(value)) for name, value in parameters.items()}
    positions = 0
    for _, tokens, labels in _batches(network, encoded):
        loss = _losses(network, parameters, tokens, labels).sum()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for whole, part in zip(total.values(), found, strict=True):
            if part is not None:
                whole += part
        positions += int((labels != IGNORED).sum())
    return {name: whole / positions for name, whole in total.items()}


def moved(network: nn.Module, direction: Mapping[str, torch.Tensor], step: float) -> Any:
    """A copy of a network with the weights ``theta + step * direction``.

    Weights of half precision become float32, in which a small step is not lost to rounding.
    """
    copied = copy.deepcopy(network)
    if any(value.dtype != _wide(value) for value in copied.parameters()):
        copied = copied.float()
    with torch.no_grad():
        for name, value in copied.named_parameters():
            value.add_(direction[name].to(value.device), alpha=step)
    return copied


def _wide(value: torch.Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


def _batches(network: Any, encoded: Encoded) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Rows of about one length: which they are, their tokens, and the token to predict at each place or `IGNORED`."""
    whole = [prompt + answer for prompt, answer in zip(encoded.prompts, encoded.answers, strict=True)]
    order = sorted((row for row, tokens in enumerate(whole) if len(tokens) > 1), key=lambda row: -len(whole[row]))
    device = network.get_input_embeddings().weight.device
    while order:
        longest = len(whole[order[0]])
        many = max(1, LOGITS // (longest * network.config.get_text_config().vocab_size))
        rows, order = order[:many], order[many:]
        tokens = padded([whole[row] for row in rows])
        place = torch.arange(1, longest)
        first = torch.tensor([len(encoded.prompts[row]) for row in rows])[:, None]
        end = torch.tensor([len(whole[row]) for row in rows])[:, None]
        labels = tokens[:, 1:].masked_fill((place < first) | (place >= end), IGNORED)
        yield rows, tokens[:, :-1].to(device), labels.to(device)


def _losses(
    network: nn.Module, parameters: Mapping[str, torch.Tensor], tokens: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """(n,) float64, summed over the positions of each row that have a label. Rows are padded on the right, which no
    position before it sees."""
    told = functional_call(network, dict(parameters), (tokens,), {"use_cache": False}).logits
    wide = told.transpose(1, 2).to(_wide(told))
    return nn.functional.cross_entropy(wide, labels.to(told.device), ignore_index=IGNORED, reduction="none").sum(
        dim=1, dtype=torch.float64
    )
