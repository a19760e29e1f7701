"""Students that learn on text of their own: what ties a rollout to the training loop.

The rows of a step are written by the student as it is at that step, right before the loop reads them. By then the loop
has seeded torch by (seed, name, step, process) and all that is drawn comes from there, so a run that is continued ends
with the same bits as one that was never interrupted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from distill.contracts import Example, LanguageObjective, LanguageOracle, LanguageStudent, Rollout, Write
from distill.decoding import Decoder, Guided, Network, Processor
from distill.errors import DistillError
from distill.heads import Head, Sparse
from distill.language import Sampling, SyntheticSet
from distill.language_training import LanguageModule, Signal, build_language
from distill.packing import Encoded, Packed, encode, end_of_answer, pack, same_tokens
from distill.randomness import derive, generator
from distill.records import Reveals
from distill.training import Recipe, TensorFeatures, Trainer

WRITERS = 128  # answers that are written at once


# --- the student writes, the teacher scores -------------------------------------------------------------------------


class Writer:
    """Answers of a network as it is when it is called; see `Write`.

    Args:
        network: The student's.
        tokenizer: The student's, which is the teacher's.
        ends: The tokens that end an answer.
        oracle: Of the teacher.
        max_length: Positions of a row.
    """

    def __init__(self, network: Any, tokenizer: Any, ends: set[int], oracle: LanguageOracle, max_length: int) -> None:
        # An adapter is inside the model that it adapts.
        self._model = network if isinstance(network, PreTrainedModel) else network.get_base_model()
        self._tokenizer, self._ends, self._oracle, self._max_length = tokenizer, ends, oracle, max_length

    def __call__(self, prompts: list[list[int]], sampling: Sampling, teacher_share: float = 0.0) -> list[list[int]]:
        """Raises `DistillError` where the network can't be decoded or isn't finite, and what the oracle raises."""
        room = [self._max_length + 1 - len(prompt) for prompt in prompts]
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, max(room)))
        uniforms = None
        if not sampling.greedy:
            uniforms = torch.rand(len(prompts), sampling.max_tokens, dtype=torch.float64).numpy()
        processors: list[Processor | Guided] = [self._known]
        if teacher_share:
            processors = [_Mixed(self._oracle, teacher_share), self._known]
        training = self._model.training
        self._model.eval()
        try:
            decoder = Decoder(Network(self._model), self._tokenizer, self._ends, WRITERS)
            made = decoder.generate(prompts, sampling, uniforms, processors=processors)
        except DistillError as error:
            if error.key != "teacher.model":
                raise
            raise DistillError(
                f"it can't write text of its own; a smaller training.lr helps if it did before ({error})", "student"
            ) from error
        self._model.train(training)
        return [made.tokens(row).tolist()[:fits] for row, fits in enumerate(room)]

    def _known(self, tokens: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
        """Without the rows by which a head is wider than the vocabulary: they are no tokens."""
        logits[:, len(self._tokenizer) :] = -torch.inf
        return logits


class _Mixed:
    """Each next token is the teacher's to draw with probability α: drawn from α p + (1 − α) q."""

    def __init__(self, oracle: LanguageOracle, share: float) -> None:
        self._oracle, self._share = oracle, share

    def __call__(self, tokens: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
        rows = (torch.rand(len(tokens)) < self._share).nonzero()[:, 0].tolist()
        if not rows:
            return logits
        # The distribution after a prefix is that of any token behind it.
        heads = self._oracle.score([[*tokens[row], 0] for row in rows], [len(tokens[row]) for row in rows])
        whole = joined(heads)
        if isinstance(whole, Sparse):
            raise DistillError("draws from the teacher, which tells its likeliest tokens only", "rollout")
        theirs = whole.logits().to(logits)
        shared = min(theirs.shape[1], logits.shape[1])
        logits[rows] = -torch.inf
        logits[rows, :shared] = theirs[:, :shared]
        return logits


@dataclass(frozen=True, kw_only=True)
class Written(Head):
    """The teacher's distributions at text that a rollout gave. `sequence`: (n,) int64, as in `Rollout.credit`."""

    sequence: torch.Tensor


def joined(parts: Sequence[Head] | Sequence[Sparse]) -> Head | Sparse:
    """One after the other; they share one matrix, or have as many tokens told at each position."""
    heads = [part for part in parts if isinstance(part, Head)]
    if heads:
        return replace(heads[0], hidden=torch.cat([head.hidden for head in heads]))
    told = [part for part in parts if isinstance(part, Sparse)]
    return Sparse(torch.cat([part.ids for part in told]), torch.cat([part.logprobs for part in told]))


class ScoredSignal:
    """The teacher's distributions at the tokens of answers, whoever wrote them. The oracle is asked each time.

    Args:
        oracle: Of the teacher.
        encoded: n prompts and answers of the synthetic set.
        answered: The distributions at those; None to have them scored too.

    Attributes:
        written: What the rollout gave in this step: examples n, n + 1, …
    """

    def __init__(self, oracle: LanguageOracle, encoded: Encoded, answered: Signal | None) -> None:
        self._oracle, self._encoded, self._answered = oracle, encoded, answered
        self.written: list[Example] = []

    def for_positions(self, sequence: np.ndarray, token: np.ndarray) -> Head | Sparse:
        """As of `Signal`; all of these examples are of the synthetic set, or none."""
        given = int(sequence[0]) < len(self._encoded)
        if given and self._answered is not None:
            return self._answered.for_positions(sequence, token)
        examples, which = np.unique(sequence, return_inverse=True)
        last = np.zeros(len(examples), dtype=np.int64)
        np.maximum.at(last, which, token)
        pairs = [self._example(int(i)) for i in examples]
        heads = self._oracle.score(
            [prompt + answer[: end + 1] for (prompt, answer), end in zip(pairs, last, strict=True)],
            [len(prompt) for prompt, _ in pairs],
        )
        rows = torch.from_numpy(np.cumsum([0, *map(len, heads)])[:-1][which] + token)
        signal = joined(heads)
        if isinstance(signal, Sparse):
            return Sparse(signal.ids[rows], signal.logprobs[rows])
        head = signal.take(rows.to(signal.hidden.device))
        return head if given else Written(**vars(head), sequence=torch.from_numpy(which))

    def _example(self, i: int) -> Example:
        n = len(self._encoded)
        return (self._encoded.prompts[i], self._encoded.answers[i]) if i < n else self.written[i - n]


# --- the loop's side ------------------------------------------------------------------------------------------------


class OnPolicyModule(LanguageModule):
    """A `LanguageModule` whose checkpoints hold the number of steps and the state of a rollout."""

    steps: torch.Tensor

    def __init__(
        self, network: Any, objective: LanguageObjective, rollout: Rollout, signal: Signal, state: nn.Module | None
    ) -> None:
        super().__init__(network, _Credited(objective, rollout), signal)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.rollout = state


class _Credited:
    """An objective, and what a rollout adds to it."""

    def __init__(self, objective: LanguageObjective, rollout: Rollout) -> None:
        self._objective, self._rollout = objective, rollout
        self.requires = objective.requires

    def loss(self, student: Head, labels: torch.Tensor, signal: Head | Sparse | None) -> torch.Tensor:
        loss = self._objective.loss(student, labels, signal)
        if isinstance(signal, Written):
            credit = self._rollout.credit(student, signal, labels, signal.sequence)
            if credit is not None:
                loss = loss + credit
        return loss


class RolloutFeatures:
    """Packed rows, which a rollout may replace whenever they are trained on; and the objective of the loop.

    A step's rows are made when the loop asks how many positions they have, which it does before it reads any of them,
    and are handed out in the same order. Rows held out are those of the synthetic set.

    Args:
        packed: The synthetic set.
        encoded: The same, as examples.
        rollout: On whose text a step learns.
        write: The student.
        signal: Where it is left what was written.
        module: What is trained.
        max_length: Positions of a row.
        steps: Of the whole training.
        seed: With `name`, of each step's chance.
        name: The stage.
    """

    requires = Reveals.LABEL

    def __init__(
        self,
        packed: Packed,
        encoded: Encoded,
        rollout: Rollout,
        write: Write,
        signal: ScoredSignal,
        module: OnPolicyModule,
        *,
        max_length: int,
        steps: int,
        seed: int,
        name: str,
    ) -> None:
        self._given = TensorFeatures({key: torch.from_numpy(column) for key, column in packed.columns().items()})
        self._encoded, self._rollout, self._write, self._signal = encoded, rollout, write, signal
        self._module, self._max_length = module, max_length
        self._steps, self._seed, self._name = steps, seed, name
        self._chance = self._progress = 0.0
        self._ready: deque[dict[str, torch.Tensor]] = deque()
        self._validation = [0.0, 0]

    def __len__(self) -> int:
        return len(self._given)

    def __getitem__(self, rows: torch.Tensor, /) -> dict[str, torch.Tensor]:
        if not self._module.training:
            return self._given[rows]
        if not self._ready:
            raise DistillError(
                "a student that learns on its own text writes it in the process that trains it; set run.workers=0",
                "run.workers",
            )
        return self._ready.popleft()

    def prepare(self, transfer_set: Any) -> Mapping[str, torch.Tensor]:
        raise TypeError("language models are trained by fit_on_policy")

    def loss(self, output: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the module has computed."""
        if not self._module.training:
            self._validation[0] += output.item()
        return output

    def positions(self, targets: Mapping[str, torch.Tensor]) -> int:
        """Of a forward pass over ``targets["row"]``. In training, this is when the student writes."""
        rows = targets["row"].cpu()
        if self._module.training:
            if not self._ready:
                self._begin_step()
            features = self._make(rows)
            self._ready.append(features)
            return int((features["labels"] >= 0).sum())
        count = int((self._given[rows]["labels"] >= 0).sum())
        self._validation[1] += count
        return count

    def _begin_step(self) -> None:
        if self._validation[1]:
            self._rollout.validated(self._validation[0] / self._validation[1])
            self._validation = [0.0, 0]
        step = int(self._module.steps)
        self._module.steps += 1
        self._chance = float(generator(self._seed, self._name, "rollout", step).random())
        self._progress = step / self._steps
        self._signal.written.clear()

    def _make(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        given = self._given[rows]
        which = given["sequence"].unique()
        prompts = [self._encoded.prompts[i] for i in which[which >= 0].tolist()]
        examples = self._rollout.examples(prompts, self._write, self._chance, self._progress)
        if examples is None:
            return given
        columns = pack(
            Encoded([prompt for prompt, _ in examples], [answer for _, answer in examples]), self._max_length
        )
        features = {key: torch.from_numpy(column) for key, column in columns.columns().items()}
        features["sequence"] += torch.where(
            features["sequence"] < 0, 0, len(self._encoded) + len(self._signal.written)
        ).int()
        self._signal.written += examples
        return features


# --- a whole training -----------------------------------------------------------------------------------------------


def fit_on_policy(
    trainer: Trainer,
    student: LanguageStudent,
    synthetic: SyntheticSet,
    objective: LanguageObjective,
    recipe: Recipe,
    rollout: Rollout,
    oracle: LanguageOracle,
    *,
    signal: Signal | None = None,
    max_length: int = 512,
    seed: int,
    name: str,
    directory: Path | None = None,
) -> tuple[Any, dict[str, Any]]:
    """A student trained from its first weights on answers, some or all of which it writes itself as it learns.

    A row of a step is the prompts of a packed row of the synthetic set; answers to them are written, scored by the
    teacher and packed anew. They count alike, whatever the weights of the synthetic set's answers.

    Args:
        trainer: The loop and the device; one process.
        student: What is trained.
        synthetic: Prompts, and the answers of the steps that the rollout leaves to them.
        objective: The loss at each token, on either kind of text. `recipe.batch_size` counts packed rows.
        recipe: How to train.
        rollout: On whose text a step learns.
        oracle: Scores what the student wrote, one query a sequence. What was scored before an interruption is not
            billed to the continued run.
        signal: The teacher's distributions at the tokens of the synthetic set; None to have those scored too, whenever
            they are met.
        max_length: Positions of a packed row.
        seed: Of the first weights, the order of rows, dropout and all that is drawn.
        name: The stage in the log.
        directory: Where the checkpoint lies while this runs; None for none.

    Returns:
        As `distill.language_training.fit_language_student`; ``packing`` is that of the synthetic set.

    Raises:
        BudgetExceeded: The budget is spent before the training is over.
        DistillError: The API does not score tokens; the student's tokenizer is not the teacher's; the objective looks
            at text alone; the rollout needs rows held out and there are none; or there are several processes.
    """
    if trainer.processes > 1:
        raise DistillError("a student that learns on its own text is trained in one process", "rollout")
    if objective.requires <= Reveals.LABEL:
        raise DistillError(
            f"{type(objective).__name__} looks at text alone, and on its own text a student learns nothing that way; "
            "choose token_reverse_kl or token_jsd, or rollout=off_policy",
            "objective",
        )
    if rollout.needs_validation and recipe.validation_share == 0:
        raise DistillError(
            f"{type(rollout).__name__} goes by the loss on rows held out; set it to a share, such as 0.1",
            "training.validation_share",
        )
    oracle.score([], [])  # tells before the first step where the API does not
    tokenizer = student.tokenizer(oracle.tokenizer)
    if oracle.tokenizer is None or not same_tokens(tokenizer, oracle.tokenizer):
        raise DistillError(
            "the teacher scores its own tokens and this student's tokenizer has others; choose a student with the "
            "teacher's tokenizer, or rollout=off_policy",
            "student",
        )
    encoded = encode(synthetic, tokenizer, oracle.tokenizer)
    packed = pack(encoded, max_length)
    network = build_language(student, tokenizer, seed)
    ends = {end_of_answer(tokenizer, synthetic.prompts.chat), tokenizer.eos_token_id} - {None}
    scored = ScoredSignal(oracle, encoded, signal)
    module = OnPolicyModule(network, objective, rollout, scored, rollout.state(max_length + 1))
    features = RolloutFeatures(
        packed,
        encoded,
        rollout,
        Writer(network, tokenizer, ends, oracle, max_length),
        scored,
        module,
        max_length=max_length,
        steps=recipe.steps(len(packed) - _held_out(len(packed), recipe)),
        seed=seed,
        name=name,
    )
    # The loop tells one training from another by its targets.
    identity = derive(0, _told(objective), _told(rollout), type(signal), packed.fingerprint)
    targets = {
        "row": torch.arange(len(packed)),
        "identity": torch.full((len(packed),), identity, dtype=torch.int64),
    }
    history = trainer.fit(module, features, targets, features, recipe, seed=seed, name=name, directory=directory)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    history["packing"] = packed.report()
    history["parameters"] = {"all": sum(n for n, _ in sizes), "trained": sum(n for n, learns in sizes if learns)}
    return network.eval(), history


def _told(part: Any) -> str:
    """A method with its options, as text."""
    options = {key: value for key, value in vars(part).items() if isinstance(value, (bool, int, float, str, Sampling))}
    return f"{type(part).__qualname__} {sorted(options.items())}"


def _held_out(rows: int, recipe: Recipe) -> int:
    return max(1, round(recipe.validation_share * rows)) if recipe.validation_share > 0 else 0
