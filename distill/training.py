"""The training loop: one loop on `accelerate` for students and teachers, classifiers and language models.

What holds for every run, and what the tests check:

* The loss of a step is the sum over its global batch divided by the number of valid positions in the *global* batch, so
  neither gradient accumulation nor the number of processes changes it. (BatchNorm is the exception, as everywhere: it
  sees the rows of one forward pass. Choose GroupNorm where this matters. So is dropout: each process has its stream.)
* Nothing random has a state. The order of epoch e comes from (seed, name, e) and dropout from (seed, name, step,
  process), so a run that is continued from a checkpoint ends with the same bits as one that was never interrupted.
* A row's prediction does not depend on what else is predicted: every batch has the same number of rows.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, broadcast_object_list
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from distill.contracts import Features, Loss, Student
from distill.errors import DistillError
from distill.randomness import derive, generator
from distill.records import Inputs, InputSpec, file_hash

logger = logging.getLogger(__name__)

# Columns smaller than this are moved to an accelerator once instead of batch by batch.
RESIDENT_BYTES = 2 * 1024**3
# One process may query a slow API for hours while the others wait for it.
PROCESS_TIMEOUT = timedelta(days=7)


# --- features -------------------------------------------------------------------------------------------------------


class TensorFeatures:
    """Features in memory. Args: `tensors`: for each argument of the module, a tensor of n rows."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)
        if len({len(tensor) for tensor in self.tensors.values()}) != 1:
            raise ValueError("all features have the same number of rows")

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: torch.Tensor, /) -> dict[str, torch.Tensor]:
        return _take(self.tensors, rows)


@dataclass(frozen=True)
class LazyFeatures:
    """Features that are encoded when asked for, in `run.workers` processes.

    Args:
        inputs: n inputs.
        encode: From some of the inputs to the module's keyword arguments. It can be pickled, and what it makes of an
            input does not depend on the others (pad to a fixed length).
    """

    inputs: Inputs
    encode: Callable[[np.ndarray], dict[str, torch.Tensor]]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: torch.Tensor, /) -> dict[str, torch.Tensor]:
        return self.encode(self.inputs[rows.numpy()])


class Standardise(torch.nn.Module):
    """Columns with mean 0 and variance 1 over the rows that a module is trained on; `Trainer.fit` sets the statistics.

    They are those of the trainer's own rows, the same in each process and for each way to divide a batch. Constant
    columns become 0.

    Args:
        feature: The module's argument that holds the columns.
        columns: How many there are.
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, feature: str, columns: int) -> None:
        super().__init__()
        self.feature = feature
        self.register_buffer("mean", torch.zeros(columns))
        self.register_buffer("deviation", torch.ones(columns))

    def observe(self, features: Features, rows: torch.Tensor) -> None:
        def total(of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
            parts = [of(features[some][self.feature].double()).sum(dim=0) for some in rows.split(65_536)]
            return torch.stack(parts).sum(dim=0)

        mean = total(lambda values: values) / len(rows)
        deviation = (total(lambda values: (values - mean).square()) / len(rows)).sqrt()
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(deviation > 0, deviation, 1.0))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(n, columns) to (n, columns)."""
        return (values - self.mean) / self.deviation


def _take(tensors: Mapping[str, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: tensor.index_select(0, rows.to(tensor.device)) for name, tensor in tensors.items()}


# --- the recipe -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How to train: everything that can change the result, and nothing about the machine.

    Args:
        epochs: Passes over the rows.
        batch_size: Rows of one optimiser step, whatever the number of processes and the accumulation.
        micro_batch_size: At most this many rows in one forward pass of one process; None for no bound.
        optimizer: "sgd", "adam" or "adamw".
        lr: Peak learning rate.
        momentum: Of "sgd".
        weight_decay: On all parameters; decoupled with "adamw", added to the gradient otherwise.
        schedule: "constant", "cosine" (to 0), "linear" (to 0) or "step", after the warm-up.
        step_epochs: With "step", the learning rate is multiplied by `gamma` each time so many epochs have passed.
        gamma: See `step_epochs`.
        warmup_share: Share of the steps in which the learning rate rises linearly from 0.
        gradient_clip: Largest L2 norm of the gradient, or None.
        validation_share: Share of the rows that are held out of training for selection.
        selection: "last" epoch or the "best" one by the loss on the rows held out.
        patience: Stop after so many epochs without a better validation loss; None for never.
        checkpoint_steps: Steps between checkpoints.
        log_steps: Steps between rows of the log.
        max_steps: Stop after so many steps; None for no bound.

    Raises:
        ValueError: A value is out of its range; one sentence that names it.
    """

    epochs: int = 20
    batch_size: int = 128
    micro_batch_size: int | None = None
    optimizer: str = "adam"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "cosine"
    step_epochs: int = 10
    gamma: float = 0.1
    warmup_share: float = 0.0
    gradient_clip: float | None = None
    validation_share: float = 0.0
    selection: str = "last"
    patience: int | None = None
    checkpoint_steps: int = 500
    log_steps: int = 50
    max_steps: int | None = None

    def __post_init__(self) -> None:
        whole = {"epochs", "batch_size", "micro_batch_size", "step_epochs", "patience"}
        whole |= {"checkpoint_steps", "log_steps", "max_steps"}
        may_be_none = ("micro_batch_size", "patience", "max_steps", "gradient_clip")
        for name in (f.name for f in fields(self) if f.name not in ("optimizer", "schedule", "selection")):
            value = vars(self)[name]
            if value is None and name in may_be_none:
                continue
            if isinstance(value, bool) or not isinstance(value, int if name in whole else (int, float)):
                raise ValueError(f"{name} is {'a whole number' if name in whole else 'a number'}, not {value!r}")
            if name in whole and value < 1:
                raise ValueError(f"{name} is at least 1, not {value}")
        for name, known in {
            "optimizer": ("sgd", "adam", "adamw"),
            "schedule": ("constant", "cosine", "linear", "step"),
            "selection": ("last", "best"),
        }.items():
            if vars(self)[name] not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {vars(self)[name]!r}")
        for name in ("lr", "gamma", "gradient_clip"):
            value = vars(self)[name]
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is more than 0, not {value}")
        for name in ("momentum", "warmup_share", "validation_share"):
            if not 0 <= vars(self)[name] < 1:
                raise ValueError(f"{name} is at least 0 and less than 1, not {vars(self)[name]}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is at least 0, not {self.weight_decay}")
        if self.validation_share == 0 and (self.selection == "best" or self.patience is not None):
            raise ValueError("selection=best and patience need rows to select on; set validation_share, such as 0.1")

    def steps(self, rows: int) -> int:
        """Optimiser steps of a whole run over so many training rows."""
        steps = self.epochs * math.ceil(rows / self.batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def learning_rate(self, step: int, steps: int, epoch: int) -> float:
        """The learning rate of step number `step` of `steps`, which lies in epoch number `epoch` (from 0)."""
        warmup = round(self.warmup_share * steps)
        if step < warmup:
            return self.lr * (step + 1) / (warmup + 1)
        passed = (step - warmup) / max(1, steps - warmup)
        factors = {
            "constant": 1.0,
            "linear": 1.0 - passed,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * passed)),
            "step": self.gamma ** (epoch // self.step_epochs),
        }
        return self.lr * factors[self.schedule]

    def build_optimizer(self, parameters: Iterable[torch.nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        fused = device.type in ("cpu", "cuda")
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                trained, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, fused=fused
            )
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(trained, lr=self.lr, weight_decay=self.weight_decay, fused=fused)


# --- the state of a run ---------------------------------------------------------------------------------------------


@dataclass
class _Progress:
    """Where a run stands: everything besides tensors that a checkpoint holds.

    The sums are of losses and of positions, over all processes, since the epoch began and since the last logged row.
    """

    step: int = 0
    epoch: int = 0
    examples: int = 0
    epoch_sums: tuple[float, float] = (0.0, 0.0)
    log_sums: tuple[float, float] = (0.0, 0.0)
    best_epoch: int = 0
    best_loss: float = math.inf
    curve: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, loss: float, positions: float) -> None:
        self.epoch_sums = (self.epoch_sums[0] + loss, self.epoch_sums[1] + positions)
        self.log_sums = (self.log_sums[0] + loss, self.log_sums[1] + positions)


class _Checkpoints:
    """The newest state of one run, in one file whose name holds the hash of its content.

    The file appears by an atomic rename and its predecessor is removed afterwards, so a kill leaves a whole one; a
    damaged one, or one of another run, is told apart and ignored.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._folder, self._identity = folder, identity

    def save(self, state: Mapping[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        writing = self._folder / "writing"
        torch.save({**state, "identity": self._identity}, writing)
        saved = self._folder / f"{state['progress']['step']:09d}-{file_hash(writing)}.pt"
        writing.replace(saved)
        for other in self._folder.glob("*.pt"):
            if other != saved:
                other.unlink()

    def find(self) -> Path | None:
        """The newest checkpoint of this very run, checked; None where there is none."""
        for path in sorted(self._folder.glob("*.pt"), reverse=True):
            if file_hash(path) != path.stem.partition("-")[2]:
                logger.warning("%s is damaged; training does not continue from it", path)
                continue
            if self.load(path)["identity"] == self._identity:
                return path
            logger.warning("%s belongs to another run; training does not continue from it", path)
        return None

    @staticmethod
    def load(path: Path) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", weights_only=True)

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


# --- the trainer ----------------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """The rows of one forward pass of one process. `weight` is 0 for a row that only keeps the process in step."""

    rows: torch.Tensor
    weight: int


@dataclass
class _Run:
    """What one call of `Trainer.fit` works with. `model` and `optimizer` are as accelerate wrapped them."""

    name: str
    seed: int
    module: torch.nn.Module
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    features: Features
    targets: Mapping[str, torch.Tensor]
    objective: Loss
    recipe: Recipe
    rows: torch.Tensor
    held_out: torch.Tensor
    checkpoints: _Checkpoints | None
    progress: _Progress
    best: dict[str, torch.Tensor] | None
    began: float

    @property
    def steps(self) -> int:
        return self.recipe.steps(len(self.rows))

    def batches(self) -> Sequence[torch.Tensor]:
        """The rows of each global batch that is left of this epoch, where they are indexed fastest."""
        order = generator(self.seed, self.name, "order", self.progress.epoch).permutation(len(self.rows))
        rows = self.rows[torch.from_numpy(order)]
        if isinstance(self.features, TensorFeatures):
            rows = rows.to(self.features.device)
        first = self.progress.epoch * math.ceil(len(rows) / self.recipe.batch_size)
        return rows.split(self.recipe.batch_size)[self.progress.step - first : self.steps - first]

    def seconds(self) -> float:
        return time.monotonic() - self.began


class Trainer:
    """Builds, trains and applies modules on the hardware that there is.

    Args:
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        workers: Processes that encode lazy features ahead of time.
        progress: Show a progress bar in a terminal, or a line a minute in the log elsewhere.
        precision: "no" (float32), "bf16" or "fp16" mixed precision.
        log: Called on the main process with rows such as ``{"stage": …, "step": …, "epoch": …, "loss": …, "lr": …}``
            and, after each epoch where rows are held out, with ``"epoch_loss"`` and ``"validation_loss"``.

    Attributes:
        device: Where modules are trained.
        is_main: True in one of the processes.
        processes: Number of processes that `accelerate launch` started.
        precision: As above.

    Raises:
        DistillError: The device is not there, or can't do this precision.
    """

    def __init__(
        self,
        *,
        device: str = "auto",
        workers: int = 0,
        progress: bool = True,
        precision: str = "no",
        log: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        _check_device(device, precision)
        # A process may run several experiments that differ in device or precision; accelerate keeps the first it saw.
        AcceleratorState._reset_state(reset_partial_state=True)
        self._accelerator = Accelerator(
            # Told nothing where there is only a CPU, accelerate takes each of several processes to be alone.
            cpu=device == "cpu" or not torch.accelerator.is_available(),
            mixed_precision=precision,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
        )
        # The scale of one training is no business of the next.
        self._fresh_scale = None if self._accelerator.scaler is None else self._accelerator.scaler.state_dict()
        self.device = self._accelerator.device
        self.is_main = self._accelerator.is_main_process
        self.processes = self._accelerator.num_processes
        self.precision = precision
        if self.processes > 1:
            atexit.register(_leave_process_group)
        self._workers, self._progress, self._log = workers, progress, log
        if self.device.type == "cuda":
            torch.backends.cudnn.deterministic = True

    def build(self, student: Student, spec: InputSpec, classes: int, seed: int) -> torch.nn.Module:
        """A fresh module, the same for the same seed whatever was drawn before. Raises what `student.build` raises."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return student.build(spec, classes)

    def wait(self) -> None:
        """Until all processes are here."""
        self._accelerator.wait_for_everyone()

    def broadcast(self, value: Any) -> Any:
        """The main process's value, in every process. It can be pickled."""
        return broadcast_object_list([value])[0]

    def fit(
        self,
        module: torch.nn.Module,
        features: Features,
        targets: Mapping[str, torch.Tensor],
        objective: Loss,
        recipe: Recipe,
        *,
        seed: int,
        name: str,
        directory: Path | None = None,
    ) -> dict[str, Any]:
        """Train a module in place. With several processes, all of them call this with the same arguments.

        Args:
            module: ``module(**features)`` gives what the objective takes.
            features: n rows.
            targets: Tensors of n rows, as `objective.prepare` makes them.
            objective: The loss.
            recipe: How to train.
            seed: With `name`, the seed of the order of rows, of the split and of dropout.
            name: What is trained, such as "student": the stage in the log.
            directory: Where the checkpoint lies while this runs; None for no checkpoints.

        Returns:
            The history, JSON-able: steps, epochs, selected_epoch (from 1), rows, validation_rows, examples_seen, curve
            (a row for each epoch: epoch, loss, validation_loss) and seconds. All but the seconds are reproducible.

        Raises:
            DistillError: There are too few rows, or the loss is no longer finite.
        """
        for key, tensor in targets.items():
            if len(tensor) != len(features):
                raise ValueError(f"there are {len(features)} rows of features but {len(tensor)} of the target '{key}'")
        rows, held_out = split_rows(len(features), recipe.validation_share, seed, name)
        module.to(self.device)
        for part in module.modules():
            if isinstance(part, Standardise):
                part.observe(features, rows)
        optimizer = recipe.build_optimizer(module.parameters(), self.device)
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(self._fresh_scale)
        checkpoints, progress, best = None, _Progress(), None
        if directory is not None:
            identity = _identity(module, targets, objective, recipe, seed, name)
            checkpoints = _Checkpoints(directory / "checkpoint", identity)
            # All processes must agree on where to continue, so one of them looks.
            found = self.broadcast(checkpoints.find() if self.is_main else None)
            if found is not None:
                state = checkpoints.load(found)
                module.load_state_dict(state["module"])
                optimizer.load_state_dict(state["optimizer"])
                if self._accelerator.scaler is not None:
                    self._accelerator.scaler.load_state_dict(state["scaler"])
                progress, best = _Progress(**state["progress"]), state["best"]
                logger.info("%s: continuing after step %d", name, progress.step)
        model, optimizer = self._accelerator.prepare(module, optimizer)
        # accelerate's wrapper looks for optional packages in each step; it matters where there is a loss scale, or
        # where another library takes the step.
        if type(optimizer) is AcceleratedOptimizer and self._accelerator.scaler is None:
            optimizer = optimizer.optimizer
        run = _Run(
            name=name,
            seed=seed,
            module=module,
            model=model,
            optimizer=optimizer,
            features=self._resident(features),
            targets=self._move_if_small(targets),
            objective=objective,
            recipe=recipe,
            rows=rows,
            held_out=held_out,
            checkpoints=checkpoints,
            progress=progress,
            best=best,
            began=time.monotonic() - progress.seconds,
        )
        shown = self._progress and self.is_main
        terminal = sys.stderr.isatty()
        bar = tqdm(
            total=run.steps,
            initial=progress.step,
            desc=name,
            unit="step",
            leave=False,
            disable=not (shown and terminal),
        )
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                spoken = time.monotonic()
                while progress.epoch < recipe.epochs and progress.step < run.steps:
                    for note in self._train_epoch(run):
                        bar.update()
                        if note:
                            bar.set_postfix_str(note, refresh=False)
                        if shown and not terminal and time.monotonic() - spoken > 60:
                            spoken = time.monotonic()
                            logger.info("%s: step %d of %d", name, progress.step, run.steps)
                    self._close_epoch(run)
                    if recipe.patience is not None and progress.epoch - progress.best_epoch >= recipe.patience:
                        break
        finally:
            bar.close()
            optimizer.zero_grad()
            self._accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            # Forget the two; free_memory() would do that and then collect garbage, which takes longer than short runs.
            self._accelerator._models.clear()
            self._accelerator._optimizers.clear()
        if self.processes > 1:
            for buffer in module.buffers():
                broadcast(buffer)  # running statistics differ between processes; the main one's are kept
        if run.best is not None:
            module.load_state_dict(run.best)
        self.wait()
        if checkpoints is not None and self.is_main:
            checkpoints.remove()
        return {
            "steps": progress.step,
            "epochs": progress.epoch,
            "selected_epoch": progress.best_epoch if run.best is not None else progress.epoch,
            "rows": len(rows),
            "validation_rows": len(held_out),
            "examples_seen": progress.examples,
            "curve": progress.curve,
            "seconds": run.seconds(),
        }

    def predict(self, module: torch.nn.Module, features: Features, batch_size: int = 256) -> np.ndarray:
        """(n, classes) float32 logits in evaluation mode. Needs no other process.

        Every forward pass has exactly `batch_size` rows (the last row is repeated), because the kernels that are
        chosen, and so the last bits of a result, depend on the size of the batch.

        Raises:
            ValueError: There are no rows.
        """
        if len(features) == 0:
            raise ValueError("there are no rows to predict")
        plan = []
        for rows in torch.arange(len(features)).split(batch_size):
            plan.append(torch.cat([rows, rows[-1:].expand(batch_size - len(rows))]))
        module.to(self.device).eval()
        outputs = []
        with torch.inference_mode(), self._accelerator.autocast():
            for batch in self._load(features, plan):
                outputs.append(module(**batch).float().cpu())
        return torch.cat(outputs)[: len(features)].numpy()

    # --- epochs and steps -------------------------------------------------------------------------------------------

    def _train_epoch(self, run: _Run) -> Iterator[str]:
        """The rest of the epoch that the run is in. Yields after each step, with the loss where it was read."""
        recipe, progress = run.recipe, run.progress
        batches = run.batches()
        plan = [self._pieces(batch, recipe.micro_batch_size) for batch in batches]
        loaded = self._load(run.features, [piece.rows for pieces in plan for piece in pieces])
        unread, positions = torch.zeros((), device=self.device), 0
        run.model.train()
        for i, (batch, pieces) in enumerate(zip(batches, plan, strict=True)):
            rate = recipe.learning_rate(progress.step, run.steps, progress.epoch)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            self._seed(derive(run.seed, run.name, "step", progress.step, self._accelerator.process_index))
            loss, count = self._accumulate(run, pieces, loaded)
            if recipe.gradient_clip is not None:
                self._accelerator.clip_grad_norm_(run.model.parameters(), recipe.gradient_clip)
            run.optimizer.step()
            run.optimizer.zero_grad()
            unread, positions = unread + loss, positions + count
            progress.step += 1
            progress.examples += len(batch)

            note = ""
            log_due = progress.step % recipe.log_steps == 0
            # After the last step there is nothing to go on with but the epoch's end, which a checkpoint does not hold.
            checkpoint_due = progress.step % recipe.checkpoint_steps == 0 and progress.step < run.steps
            # Reading the loss waits for the accelerator, so it is summed there in between.
            if log_due or checkpoint_due or i == len(batches) - 1:
                progress.add(*self._sum(run.name, progress.step, unread, positions))
                unread, positions = torch.zeros((), device=self.device), 0
            if log_due:
                mean = progress.log_sums[0] / max(1, progress.log_sums[1])
                progress.log_sums = (0.0, 0.0)
                note = f"loss {mean:.4f}"
                where = {"stage": run.name, "step": progress.step, "epoch": progress.epoch + 1}
                self._write({**where, "loss": mean, "lr": rate})
            if checkpoint_due and run.checkpoints is not None and self.is_main:
                progress.seconds = run.seconds()
                scaler = self._accelerator.scaler
                run.checkpoints.save(
                    {
                        "module": run.module.state_dict(),
                        "optimizer": run.optimizer.state_dict(),
                        "scaler": None if scaler is None else scaler.state_dict(),
                        "progress": asdict(progress),
                        "best": run.best,
                    }
                )
            yield note

    def _close_epoch(self, run: _Run) -> None:
        """Evaluate on the rows held out, and keep the weights where they are the best so far."""
        progress = run.progress
        row = {"epoch": progress.epoch + 1, "loss": progress.epoch_sums[0] / max(1, progress.epoch_sums[1])}
        progress.epoch, progress.epoch_sums = progress.epoch + 1, (0.0, 0.0)
        if len(run.held_out):
            row["validation_loss"] = self._validate(run)
            losses = {"epoch_loss": row["loss"], "validation_loss": row["validation_loss"]}
            self._write({"stage": run.name, "step": progress.step, "epoch": progress.epoch, **losses})
            if row["validation_loss"] < progress.best_loss:
                progress.best_epoch, progress.best_loss = progress.epoch, row["validation_loss"]
                if run.recipe.selection == "best":
                    run.best = {key: value.detach().cpu().clone() for key, value in run.module.state_dict().items()}
        progress.curve.append(row)

    def _pieces(self, batch: torch.Tensor, micro_batch_size: int | None) -> list[_Piece]:
        """What this process does of a global batch: as many pieces in every process, some possibly empty."""
        share = math.ceil(len(batch) / self.processes)
        count = 1 if micro_batch_size is None else math.ceil(share / micro_batch_size)
        if self.processes == count == 1:
            return [_Piece(batch, 1)]
        mine = batch.tensor_split(self.processes)[self._accelerator.process_index]
        return [_Piece(part, 1) if len(part) else _Piece(batch[:1], 0) for part in mine.tensor_split(count)]

    def _accumulate(
        self, run: _Run, pieces: Sequence[_Piece], loaded: Iterator[dict[str, torch.Tensor]]
    ) -> tuple[torch.Tensor, int]:
        """Gradients of the mean loss of one global batch. Returns this process's sum of losses and of positions."""
        targets = [self._place(_take(run.targets, piece.rows)) for piece in pieces]
        count = sum(run.objective.positions(some) * piece.weight for some, piece in zip(targets, pieces, strict=True))
        scale: float | torch.Tensor = 1 / max(1, count)
        if self.processes > 1:
            positions = self._accelerator.reduce(torch.tensor(float(count), device=self.device), "sum")
            scale = self.processes / positions.clamp(min=1)  # DDP takes the mean of the processes' gradients
        total = torch.zeros((), device=self.device)
        for i, (piece, some) in enumerate(zip(pieces, targets, strict=True)):
            last = i == len(pieces) - 1  # after which the processes exchange their gradients
            with nullcontext() if last else self._accelerator.no_sync(run.model):
                loss = run.objective.loss(run.model(**next(loaded)), some) * piece.weight
                self._accelerator.backward(loss * scale)
            total = total + loss.detach()
        return total, count

    def _validate(self, run: _Run) -> float:
        """The mean loss over the rows held out."""
        plan: list[_Piece] = []
        for batch in run.held_out.split(run.recipe.batch_size):
            plan += self._pieces(batch, run.recipe.micro_batch_size)
        total, count = torch.zeros((), device=self.device), 0
        run.model.eval()
        with torch.no_grad():
            for piece, batch in zip(plan, self._load(run.features, [piece.rows for piece in plan]), strict=True):
                targets = self._place(_take(run.targets, piece.rows))
                total += run.objective.loss(run.model(**batch), targets) * piece.weight
                count += run.objective.positions(targets) * piece.weight
        loss, positions = self._sum(run.name, run.progress.step, total, count)
        return loss / max(1, positions)

    def _sum(self, name: str, step: int, loss: torch.Tensor, positions: int) -> tuple[float, float]:
        """The sums over all processes, as numbers. Raises `DistillError` where the loss is not finite."""
        sums = [loss.item(), float(positions)]
        if self.processes > 1:
            on_device = torch.tensor(sums, dtype=torch.float64, device=self.device)
            sums = self._accelerator.reduce(on_device, "sum").tolist()
        if not math.isfinite(sums[0]):
            raise DistillError(
                f"the loss of {name} is not finite by step {step}; try a smaller learning rate", "training.lr"
            )
        return sums[0], sums[1]

    # --- moving data ------------------------------------------------------------------------------------------------

    def _load(self, features: Features, plan: Sequence[torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """One batch on the device for each entry of the plan, encoded ahead where that costs something."""
        if self._workers == 0 or isinstance(features, TensorFeatures):
            for rows in plan:
                yield self._place(features[rows])
            return
        loader = DataLoader(
            cast(Any, features),
            sampler=plan,
            batch_size=None,
            num_workers=self._workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # it draws one number, which must not come from the stream of dropout
        )
        for batch in loader:
            yield self._place(batch)

    def _place(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items()}

    def _resident(self, features: Features) -> Features:
        return (
            TensorFeatures(self._move_if_small(features.tensors)) if isinstance(features, TensorFeatures) else features
        )

    def _move_if_small(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        small = sum(tensor.nbytes for tensor in tensors.values()) <= RESIDENT_BYTES
        return self._place(tensors) if small else tensors

    def _seed(self, seed: int) -> None:
        # torch.manual_seed formats a stack trace on each call while CUDA is not in use.
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def _write(self, row: dict[str, Any]) -> None:
        if self._log is not None and self.is_main:
            self._log(row)


def _leave_process_group() -> None:
    """Join the threads of the process group before the interpreter ends: one that is still letting go of the last
    collective's tensors would abort the process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def split_rows(n: int, validation_share: float, seed: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows to train on and the rows held out, both (m,) int64 and sorted. Raises `DistillError` for too few."""
    held_out = max(1, round(validation_share * n)) if validation_share > 0 else 0
    if n - held_out < 1:
        raise DistillError(f"{n} rows are too few to train on (validation_share={validation_share})", "training")
    order = torch.from_numpy(generator(seed, name, "validation").permutation(n))
    return order[held_out:].sort().values, order[:held_out].sort().values


def _identity(
    module: torch.nn.Module,
    targets: Mapping[str, torch.Tensor],
    objective: Loss,
    recipe: Recipe,
    seed: int,
    name: str,
) -> str:
    """What tells one training from another, as far as it can be seen cheaply: not the features."""
    shapes = {key: list(value.shape) for key, value in module.state_dict().items()}
    answers = hashlib.blake2b(digest_size=16)
    for key, tensor in sorted(targets.items()):
        answers.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        answers.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    parts = [asdict(recipe), seed, name, type(objective).__qualname__, shapes, answers.hexdigest()]
    return json.dumps(parts, sort_keys=True)


def _check_device(device: str, precision: str) -> None:
    there = ["cpu"]
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    if device not in ("auto", *there):
        raise DistillError(f"there is no device '{device}' here; there is {', '.join(there)} (or auto)", "run.device")
    if precision not in ("no", "bf16", "fp16"):
        raise DistillError(f"is no, bf16 or fp16, not {precision!r}", "precision")
    if precision == "fp16" and (device == "cpu" or there == ["cpu"]):
        raise DistillError("fp16 needs a GPU; take bf16 or no", "precision")
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)


# --- sizes ----------------------------------------------------------------------------------------------------------


def measure(module: torch.nn.Module, features: Features, repeats: int = 20) -> dict[str, float]:
    """How large and how fast a module is, on the device where it lies.

    Returns:
        ``parameters``; ``flops_per_query`` (of the matrix products, convolutions and attention in one forward pass of
        one row); ``latency_s`` (median over `repeats` forward passes of one row, after three to warm up).
    """
    parameters = list(module.parameters())
    device = parameters[0].device
    row = {name: tensor.to(device) for name, tensor in features[torch.zeros(1, dtype=torch.int64)].items()}
    module.eval()
    # Fused attention and encoder layers are opaque to the counter; with gradients and plain products it sees them all.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        module(**row)
    seconds = []
    with torch.inference_mode():
        for _ in range(3 + repeats):
            started = time.perf_counter()
            module(**row)
            if device.type != "cpu":
                torch.get_device_module(device).synchronize()
            seconds.append(time.perf_counter() - started)
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "flops_per_query": counter.get_total_flops(),
        "latency_s": statistics.median(seconds[3:]),
    }
