"""How a language model is trained on answers: packed rows, one loss in nats per token, the loop of `distill.training`.

The loss is computed inside the module's forward pass: what divides a model among processes (DDP, FSDP2, ZeRO) then has
the output matrix at hand when the loss needs it, and only hidden states of positions that are learnt are projected.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from distill.alignment import Aligned, Alignment
from distill.contracts import (
    CrossTokenObjective,
    LanguageObjective,
    LanguageStudent,
    LocalLanguageTeacher,
    WhiteBoxObjective,
)
from distill.errors import DistillError
from distill.heads import Head, Sparse
from distill.language import Completions, Sampling, SyntheticSet
from distill.packing import encode, end_of_answer, pack, same_tokens
from distill.randomness import derive
from distill.records import Reveals
from distill.training import Recipe, TensorFeatures, Trainer

# --- the teacher's distributions ------------------------------------------------------------------------------------


class Signal(Protocol):
    """A teacher's distributions at the tokens of its answers, over the teacher's own tokens."""

    def for_positions(self, sequence: np.ndarray, token: np.ndarray) -> Head | Sparse:
        """The distributions that n tokens were drawn from.

        Args:
            sequence: (n,) int32, which answer of the synthetic set.
            token: (n,) int32, which of its tokens, from 0.
        """
        ...


class AnsweredSignal:
    """The k most probable tokens that came with the answers.

    Raises:
        DistillError: They did not come with token ids and log-probabilities.
    """

    def __init__(self, completions: Completions) -> None:
        ids, logprobs, offsets = completions.top_ids, completions.top_logprobs, completions.offsets
        drawn = completions.token_ids
        if ids is None or logprobs is None or offsets is None or drawn is None or (drawn < 0).any():
            raise DistillError(
                "the answers come without token ids or log-probabilities; choose an objective for text alone, such as "
                "sequence_kd, or an access that reveals them",
                "objective",
            )
        self._ids, self._logprobs, self._offsets = ids, logprobs, offsets

    def for_positions(self, sequence: np.ndarray, token: np.ndarray) -> Sparse:
        """(n, k)."""
        rows = self._offsets[sequence] + token
        logprobs = np.where(self._ids[rows] >= 0, self._logprobs[rows], -np.inf).astype(np.float32)
        return Sparse(torch.from_numpy(self._ids[rows].astype(np.int64)), torch.from_numpy(logprobs))


class TeacherSignal:
    """A local teacher's whole distributions, computed anew each time they are asked for.

    Args:
        teacher: Whose weights are here.
        synthetic: The answers; they need not be the teacher's own.
    """

    def __init__(self, teacher: LocalLanguageTeacher, synthetic: SyntheticSet) -> None:
        self.teacher = teacher
        self._layers: list[int] = []
        self._answers = encode(synthetic, teacher.tokenizer, teacher.tokenizer).answers
        self._prompts = teacher.prompt_tokens(synthetic.prompts, synthetic.sampling or Sampling())

    def for_positions(self, sequence: np.ndarray, token: np.ndarray) -> Head:
        """One forward pass of the teacher over the examples that occur."""
        examples, which = np.unique(sequence, return_inverse=True)
        last = np.zeros(len(examples), dtype=np.int64)
        np.maximum.at(last, which, token)
        heads = self.teacher.heads(
            [self._prompts[i] + self._answers[i][: end + 1] for i, end in zip(examples, last, strict=True)],
            [len(self._prompts[i]) for i in examples],
            self._layers,
        )
        firsts = np.cumsum([0, *map(len, heads)])[:-1]
        hidden = torch.cat([head.hidden for head in heads])
        layers = tuple(torch.cat(states) for states in zip(*(head.layers for head in heads), strict=True))
        rows = torch.from_numpy(firsts[which] + token).to(hidden.device)
        return replace(heads[0], hidden=hidden, layers=layers).take(rows)

    def of_layers(self, layers: Sequence[int]) -> TeacherSignal:
        """The same with hidden states of these layers, as of `LocalLanguageTeacher.heads`."""
        signal = copy.copy(self)
        signal._layers = list(layers)
        return signal


class AlignedSignal:
    """What a teacher says of its own tokens, for a student that has others.

    Args:
        signal: The teacher's distributions; None where the log-probabilities that came with the answers will do.
        synthetic: The answers.
        ours: The same in the student's tokens.
        teachers: The teacher's tokenizer.
        tokenizer: The student's.
    """

    def __init__(
        self, signal: Signal | None, synthetic: SyntheticSet, ours: list[list[int]], teachers: Any, tokenizer: Any
    ) -> None:
        completions = synthetic.completions
        theirs = encode(synthetic, teachers, teachers).answers
        self._signal, self._offsets, self._logprobs = signal, completions.offsets, completions.logprobs
        # An answer without token ids is tokenised anew, and what came with it is of other tokens.
        if self._offsets is None or any(completions.tokens(i).tolist() != ids for i, ids in enumerate(theirs)):
            self._logprobs = None
        self.alignment = Alignment(theirs, ours, completions.column, teachers, tokenizer)

    def for_positions(self, sequence: np.ndarray, token: np.ndarray) -> Aligned:
        """The teacher's tokens of the answers that n of the student's tokens are from."""
        aligned, answer, place = self.alignment.at(sequence, token)
        if self._logprobs is not None and self._offsets is not None:
            aligned = replace(aligned, logprobs=torch.from_numpy(self._logprobs[self._offsets[answer] + place]))
        if self._signal is None:
            return aligned
        return replace(aligned, signal=self._signal.for_positions(answer.astype(np.int32), place.astype(np.int32)))


# --- the module -----------------------------------------------------------------------------------------------------


class LanguageModule(nn.Module):
    """A causal language model whose forward pass gives the summed loss of packed rows.

    Args:
        network: A Hugging Face causal language model.
        objective: The loss.
        signal: The teacher's distributions; None for text alone. Across tokens an `AlignedSignal`.

    Raises:
        DistillError: The network's logits are not those of its hidden states and output matrix, or examples that share
            a row see one another. Both are tried out on a few tokens.
    """

    def __init__(
        self, network: Any, objective: LanguageObjective, signal: Signal | AlignedSignal | None = None
    ) -> None:
        super().__init__()
        # An objective that learns something itself is a part of this module.
        self.network, self._objective, self._signal = network, objective, signal
        pairs = objective.pairs if isinstance(objective, WhiteBoxObjective) else None
        self._layers = [layer for layer, _ in pairs or ()]
        self._matrix: tuple[torch.Tensor, torch.Tensor] | None = None  # the teacher's, as it came and as it is used
        config = network.config.get_text_config().to_dict()
        self._scale = float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0)
        self._softcap = config.get("final_logit_softcapping")
        self._try_out()

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
        sequence: torch.Tensor,
        token: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scalar: the loss summed over the positions with a label, each times its weight. Arguments as in `Packed`."""
        valid = labels >= 0
        wanted = labels[valid].long()
        hidden, *layers = (states[valid] for states in self._states(input_ids, position_ids))
        signal: Head | Sparse | Aligned | None = None
        if self._signal is not None:
            signal = self._signal.for_positions(sequence[valid].cpu().numpy(), token[valid].cpu().numpy())
            signal = self._placed(signal, hidden.device)
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):  # an objective chooses its types by itself
            student = replace(self._head(hidden), layers=tuple(layers))
            if weights is None:
                return self._loss(student, wanted, signal)
            total = torch.zeros((), device=hidden.device)
            for weight in weights[valid].unique():
                some = weights[valid] == weight
                part = None if signal is None else _rows(signal, some)
                total = total + weight * self._loss(_rows(student, some), wanted[some], part)
            return total

    def _loss(self, student: Head, labels: torch.Tensor, signal: Head | Sparse | Aligned | None) -> torch.Tensor:
        if not isinstance(signal, Aligned):
            return self._objective.loss(student, labels, signal)
        if not isinstance(self._objective, CrossTokenObjective):
            raise TypeError(f"{type(self._objective).__name__} has no loss across tokens")
        return self._objective.across(student, labels, signal)

    def _states(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> list[torch.Tensor]:
        """(rows, length, width), what the output matrix is applied to; then the states of `_layers`."""
        # Without an attention mask and a cache, transformers keeps apart what starts at position 0 anew.
        decoder = self.network.get_decoder()
        states = decoder(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            output_hidden_states=bool(self._layers),
        )
        return [states.last_hidden_state, *(states.hidden_states[layer] for layer in self._layers)]

    def _head(self, hidden: torch.Tensor) -> Head:
        output = self.network.get_output_embeddings()
        return Head(hidden, output.weight, output.bias, self._scale, self._softcap)

    def _placed(self, signal: Any, device: torch.device) -> Any:
        """The signal where the student is. A stored signal's matrix is moved once, not in each step."""
        if isinstance(signal, Aligned):
            columns = {name: value.to(device) for name, value in vars(signal).items() if torch.is_tensor(value)}
            inner = None if signal.signal is None else self._placed(signal.signal, device)
            return replace(signal, **columns, signal=inner)
        if isinstance(signal, Sparse):
            weights = None if signal.weights is None else signal.weights.to(device)
            return Sparse(signal.ids.to(device), signal.logprobs.to(device), weights)
        if self._matrix is None or signal.weight is not self._matrix[0]:
            self._matrix = signal.weight, signal.weight.to(device)
        bias = None if signal.bias is None else signal.bias.to(device)
        layers = tuple(states.to(device) for states in signal.layers)
        return replace(signal, hidden=signal.hidden.to(device), weight=self._matrix[1], bias=bias, layers=layers)

    @torch.no_grad()
    def _try_out(self) -> None:
        training = self.network.training
        self.network.eval()
        device = self.network.get_output_embeddings().weight.device
        ids = torch.arange(2, 14, device=device).remainder(self.network.config.get_text_config().vocab_size)[None]
        positions = torch.cat([torch.arange(5), torch.arange(7)]).to(device)[None]
        ours = self._head(self._states(ids, positions)[0][0]).logits()
        theirs = torch.cat([self.network(part, use_cache=False).logits[0] for part in ids.split([5, 7], dim=1)]).float()
        self.network.train(training)
        tolerance = 1e-4 if ours.dtype == self.network.dtype else 0.05  # of float32 and of half precision
        if not (ours - theirs).abs().max() <= tolerance * theirs.abs().max():
            raise DistillError(
                f"{type(self.network).__name__} can't be trained on packed rows: its logits differ from those of each "
                "example alone; choose a Transformer decoder with one output matrix",
                "student",
            )


def _rows(some: Any, rows: torch.Tensor) -> Any:
    """The distributions at some positions."""
    if isinstance(some, (Aligned, Head)):
        return some.take(rows)
    weights = None if some.weights is None else some.weights[rows]
    return Sparse(some.ids[rows], some.logprobs[rows], weights)


class Computed:
    """The loss of the training loop where the module has computed it, of ``targets["positions"]`` positions a row."""

    def loss(self, output: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return output

    def positions(self, targets: Mapping[str, torch.Tensor]) -> int:
        return int(targets["positions"].sum())


# --- a whole training -----------------------------------------------------------------------------------------------


def build_language(student: LanguageStudent, tokenizer: Any, seed: int) -> Any:
    """A fresh network, the same for the same seed whatever was drawn before. It stops where answers end."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network: Any = student.build_language(tokenizer)
    own = network.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
    if tokenizer.chat_template is not None:
        ends.add(end_of_answer(tokenizer, chat=True))  # which a model that was not tuned on chats does not know
    network.config.eos_token_id = network.generation_config.eos_token_id = sorted(ends - {None})
    return network


def fit_language_student(
    trainer: Trainer,
    student: LanguageStudent,
    synthetic: SyntheticSet,
    objective: LanguageObjective,
    recipe: Recipe,
    *,
    signal: Signal | None = None,
    teachers: Any = None,
    max_length: int = 512,
    seed: int,
    name: str,
    directory: Path | None = None,
) -> tuple[Any, dict[str, Any]]:
    """A student trained from its first weights on answers. With several processes, all of them call this alike.

    Args:
        trainer: The loop and the device.
        student: What is trained.
        synthetic: What it learns from.
        objective: The loss. `recipe.batch_size` counts packed rows.
        recipe: How to train.
        signal: The teacher's distributions at the tokens of the answers; None for text alone.
        teachers: The teacher's tokenizer, where it is public.
        max_length: Positions of a packed row.
        seed: Of the first weights, the order of rows and dropout.
        name: The stage in the log.
        directory: Where the checkpoint lies while this runs; None for none.

    Returns:
        The network in evaluation mode, and the history of `Trainer.fit` with ``packing`` (`Packed.report`),
        ``parameters`` (all and ``trained``), across tokenizers ``alignment`` (`Alignment.report`) and, of an objective
        on hidden states, ``layers`` (the pairs that it compares).

    Raises:
        DistillError: The student's tokenizer is not the teacher's and the objective needs that; it needs a signal
            and there is none, or it looks inside a teacher that is not here; no example fits; rows are longer than the
            student's context; and what encoding, building and training raise.
    """
    tokenizer = student.tokenizer(teachers)
    across = isinstance(objective, CrossTokenObjective) and teachers is not None
    told = across and objective.requires <= Reveals.TOP_K and synthetic.completions.logprobs is not None
    if signal is None and objective.requires > Reveals.TEXT and not told:
        raise DistillError(
            f"{type(objective).__name__} needs the teacher's distributions and there is text alone; choose sequence_kd",
            "objective",
        )
    foreign = teachers is None or not same_tokens(tokenizer, teachers)
    if signal is not None and foreign and not across:
        raise DistillError(
            "the teacher's distributions are over its own tokens and this student's tokenizer has others; choose a "
            "student with the teacher's tokenizer, or an objective across tokenizers (uld, byte_likelihood) or for "
            "text alone",
            "student",
        )
    encoded = encode(synthetic, tokenizer, teachers)
    packed = pack(encoded, max_length)
    given: Signal | AlignedSignal | None = signal
    if across and (foreign or told):
        given = AlignedSignal(None if told else signal, synthetic, encoded.answers, teachers, tokenizer)
    network = build_language(student, tokenizer, seed)
    told, length = network.config.get_text_config().to_dict(), packed.labels.shape[1]
    context = told.get("max_position_embeddings") or told.get("n_positions") or length
    if length > context:
        raise DistillError(f"rows have {length} tokens and the student reads at most {context}", "max_length")
    if isinstance(objective, WhiteBoxObjective):
        if not isinstance(signal, TeacherSignal):
            raise DistillError(
                f"{type(objective).__name__} looks inside the teacher at each step, which no stored signal allows; "
                "take signal=text with a local teacher",
                "signal",
            )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive(seed, "objective"))
            objective = objective.between(network, signal.teacher.network)
        given = signal.of_layers([layer for _, layer in objective.pairs or ()])
    features = TensorFeatures({key: torch.from_numpy(column) for key, column in packed.columns().items()})
    # The loop tells one training from another by its targets.
    identity = derive(0, _told(objective), type(given), packed.fingerprint)
    targets = {
        "positions": (features.tensors["labels"] >= 0).sum(dim=1),
        "identity": torch.full((len(packed),), identity, dtype=torch.int64),
    }
    module = LanguageModule(network, objective, given)
    history = trainer.fit(module, features, targets, Computed(), recipe, seed=seed, name=name, directory=directory)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    history["packing"] = packed.report()
    if isinstance(objective, WhiteBoxObjective):
        history["layers"] = [list(pair) for pair in objective.pairs or ()]
    if isinstance(given, AlignedSignal):
        history["alignment"] = given.alignment.report
    history["parameters"] = {"all": sum(n for n, _ in sizes), "trained": sum(n for n, learns in sizes if learns)}
    return network.eval(), history


def _told(method: Any) -> str:
    """A method with its options, those of a method inside it too, as text."""
    options = {
        key: _told(value) if isinstance(value, LanguageObjective) else value
        for key, value in vars(method).items()
        if isinstance(value, (bool, int, float, str, tuple, LanguageObjective))
    }
    return f"{type(method).__qualname__} {sorted(options.items())}"
