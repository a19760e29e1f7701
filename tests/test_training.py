"""The training loop: one process or two, in one piece or many, interrupted or not, the result is the same."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import distributed_fit
import numpy as np
import pytest
import torch
from commands import Running

from distill import training
from distill.config import build
from distill.errors import DistillError
from distill.objectives.soft_cross_entropy import SoftCrossEntropy
from distill.records import InputSpec, TransferSet
from distill.students.lenet import LeNet
from distill.students.mlp import MLP
from distill.training import LazyFeatures, Recipe, Standardise, TensorFeatures, Trainer, measure, split_rows

IMAGE = InputSpec("image", (8, 8, 1))
TABLE = InputSpec("table", (5,))
N = 43


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(n: int = N) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 8, 8, 1), dtype=np.uint8)


def targets(n: int = N, classes: int = 3) -> dict[str, torch.Tensor]:
    posteriors = np.random.default_rng(1).dirichlet([0.3] * classes, n).astype(np.float32)
    return SoftCrossEntropy().prepare(TransferSet(np.arange(n), posteriors))


class Run:
    """One training of a LeNet with dropout, with everything that came of it."""

    def __init__(self, recipe: Recipe, directory: Path | None = None, stop_at: int | None = None, **options):
        self.rows: list[dict] = []
        self.stop_at = stop_at
        trainer = Trainer(device="cpu", log=self.log, workers=options.get("workers", 0))
        student = LeNet(dropout=options.get("dropout", 0.5))
        self.module = trainer.build(student, IMAGE, 3, seed=0)
        features = options.get("features", student.encode(images(), IMAGE))
        self.history = trainer.fit(
            self.module,
            features,
            targets(),
            SoftCrossEntropy(),
            recipe,
            seed=options.get("seed", 0),
            name="student",
            directory=directory,
        )
        self.seconds = self.history.pop("seconds")
        self.weights = {key: value.clone() for key, value in self.module.state_dict().items()}

    def log(self, row: dict) -> None:
        self.rows.append(row)
        if row["step"] == self.stop_at:
            raise InterruptedError


def assert_same(a: Run, b: Run, exactly: bool = True) -> None:
    for key in a.weights:
        if exactly:
            assert torch.equal(a.weights[key], b.weights[key]), key
        else:
            torch.testing.assert_close(a.weights[key], b.weights[key], atol=1e-5, rtol=1e-5)
    if exactly:
        assert a.history == b.history


# --- sums over processes and pieces ---------------------------------------------------------------------------------


def test_two_processes_are_one(tmp_path):
    script = Path(__file__).with_name("distributed_fit.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launch, str(script), str(tmp_path / "two.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    alone = Running(distributed_fit.main, tmp_path / "one.pt", cwd=tmp_path).end()
    assert alone.returncode == 0, alone.stderr
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["rows"]) == len(two["rows"])
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    for a, b in zip(one["weights"], two["weights"], strict=True):
        for key in a:
            torch.testing.assert_close(a[key], b[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 10, 16])
def test_accumulation_changes_nothing(micro_batch_size):
    # 43 rows in batches of 16: the last has 11.
    recipe = {"epochs": 3, "batch_size": 16, "log_steps": 1, "gradient_clip": 1.0, "validation_share": 0.2}
    whole = Run(Recipe(**recipe), dropout=0.0)
    pieces = Run(Recipe(**recipe, micro_batch_size=micro_batch_size), dropout=0.0)
    assert_same(whole, pieces, exactly=False)
    for a, b in zip(whole.rows, pieces.rows, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


class Tokens:
    """Rows with differing numbers of valid positions, as in a language model."""

    def loss(self, output, targets):
        return (torch.nn.functional.cross_entropy(output, targets["labels"], reduction="none") * targets["n"]).sum()

    def positions(self, targets):
        return int(targets["n"].sum())


def test_the_loss_is_per_position_and_not_per_row():
    def train(micro_batch_size):
        rows = []
        trainer = Trainer(device="cpu", log=rows.append)
        module = trainer.build(LeNet(), IMAGE, 3, seed=0)
        wanted = {"labels": torch.arange(N) % 3, "n": torch.arange(N) % 5}
        recipe = Recipe(epochs=1, batch_size=N, micro_batch_size=micro_batch_size, optimizer="sgd", lr=0.1, log_steps=1)
        before = module(torch.from_numpy(images())).detach()
        trainer.fit(module, LeNet().encode(images(), IMAGE), wanted, Tokens(), recipe, seed=0, name="s")
        expected = Tokens().loss(before, wanted).item() / wanted["n"].sum().item()
        assert rows[0]["loss"] == pytest.approx(expected, rel=1e-5)
        return module.state_dict()

    whole, pieces = train(None), train(4)
    for key in whole:
        torch.testing.assert_close(whole[key], pieces[key], atol=1e-6, rtol=1e-5)


def test_it_is_the_textbook_loop():
    recipe = Recipe(epochs=2, batch_size=N, optimizer="sgd", lr=0.1, momentum=0.9, schedule="constant")
    ours = Run(recipe, dropout=0.0)
    module = Trainer(device="cpu").build(LeNet(), IMAGE, 3, seed=0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(module(torch.from_numpy(images())), targets()["posteriors"])
        loss.backward()
        optimizer.step()
    for key, value in module.state_dict().items():
        torch.testing.assert_close(ours.weights[key], value, atol=1e-6, rtol=1e-5)


# --- reproducible and resumable -------------------------------------------------------------------------------------


def test_the_seed_decides():
    recipe = Recipe(epochs=2, batch_size=16)
    torch.manual_seed(1)
    first = Run(recipe)
    torch.manual_seed(2)
    drawn = torch.rand(3)
    torch.manual_seed(2)
    assert_same(first, Run(recipe))
    assert torch.equal(torch.rand(3), drawn)  # and nothing was drawn from the caller's stream
    assert not torch.equal(Run(recipe, seed=1).weights["features.0.weight"], first.weights["features.0.weight"])


RESUMED = {
    "epochs": 6,
    "batch_size": 8,
    "optimizer": "adam",
    "log_steps": 2,
    "validation_share": 0.2,
    "selection": "best",
    "patience": 3,
}


@pytest.mark.parametrize("stop_at", [2, 4, 6, 14, 20])
@pytest.mark.parametrize("checkpoint_steps", [3, 5])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, stop_at, checkpoint_steps):
    recipe = Recipe(**RESUMED, checkpoint_steps=checkpoint_steps)  # 35 rows: 5 steps an epoch
    whole = Run(recipe)
    with pytest.raises(InterruptedError):
        Run(recipe, tmp_path, stop_at=stop_at)
    torch.manual_seed(12345)
    resumed = Run(recipe, tmp_path)
    assert_same(whole, resumed)
    # It went on from the last checkpoint, and says of each later step what the whole run said.
    done = (stop_at if stop_at % 2 else stop_at - 1) // checkpoint_steps * checkpoint_steps
    assert [
        row for row in whole.rows if row["step"] > done or (row["step"] == done and "epoch_loss" in row)
    ] == resumed.rows
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("harm", ["truncated", "flipped", "half-written", "empty"])
def test_a_damaged_checkpoint_is_ignored_with_a_warning(tmp_path, harm, caplog):
    recipe = Recipe(**RESUMED, checkpoint_steps=3)
    with pytest.raises(InterruptedError):
        Run(recipe, tmp_path, stop_at=8)
    (saved,) = (tmp_path / "checkpoint").glob("*.pt")
    content = bytearray(saved.read_bytes())
    if harm == "half-written":
        saved.rename(saved.with_name("writing"))
    else:
        content[len(content) // 2] ^= 1
        saved.write_bytes({"truncated": content[: len(content) // 2], "flipped": content, "empty": b""}[harm])
    with caplog.at_level(logging.WARNING):
        resumed = Run(recipe, tmp_path)
    assert_same(Run(recipe), resumed)
    assert resumed.rows[0]["step"] == 2
    assert harm == "half-written" or "is damaged" in caplog.text


def test_a_checkpoint_of_another_recipe_is_ignored(tmp_path, caplog):
    with pytest.raises(InterruptedError):
        Run(Recipe(**RESUMED, checkpoint_steps=3), tmp_path, stop_at=8)
    other = Recipe(**RESUMED, checkpoint_steps=3, lr=0.01)
    assert_same(Run(other), Run(other, tmp_path))
    assert "another run" in caplog.text


def test_there_is_one_whole_checkpoint_at_any_time(tmp_path):
    with pytest.raises(InterruptedError):
        Run(Recipe(**RESUMED, checkpoint_steps=1), tmp_path, stop_at=8)
    assert [path.name[:10] for path in (tmp_path / "checkpoint").iterdir()] == ["000000007-"]


# --- selection ------------------------------------------------------------------------------------------------------


def test_the_best_epoch_is_the_one_with_the_least_validation_loss():
    # So large a rate on so few rows overfits: the validation loss turns up again.
    recipe = {"epochs": 12, "batch_size": 8, "lr": 0.005, "schedule": "constant", "validation_share": 0.3}
    best, last = Run(Recipe(**recipe, selection="best"), dropout=0.0), Run(Recipe(**recipe), dropout=0.0)
    losses = [row["validation_loss"] for row in best.history["curve"]]
    assert best.history["selected_epoch"] == int(np.argmin(losses)) + 1 < 12
    assert last.history["selected_epoch"] == 12
    assert best.history["rows"] + best.history["validation_rows"] == N
    train, held_out = split_rows(N, 0.3, 0, "student")
    assert len(held_out) == best.history["validation_rows"] == 13
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(N))
    best.module.eval()
    output = best.module(torch.from_numpy(images())[held_out])
    loss = SoftCrossEntropy().loss(output, {"posteriors": targets()["posteriors"][held_out]}).item() / len(held_out)
    assert loss == pytest.approx(min(losses), rel=1e-5)


def test_the_rows_held_out_are_not_trained_on():
    seen = []

    class Spy(TensorFeatures):
        def __getitem__(self, rows):
            seen.append(set(rows.tolist()))
            return super().__getitem__(rows)

    _, held_out = split_rows(N, 0.3, 0, "student")
    lazy = LazyFeatures(np.arange(N), lambda rows: Spy({"inputs": torch.from_numpy(images())})[torch.from_numpy(rows)])
    Run(Recipe(epochs=1, batch_size=1000, validation_share=0.3), features=lazy)
    assert len(seen) == 2
    assert seen[0] == set(range(N)) - set(held_out.tolist())
    assert seen[1] == set(held_out.tolist())


def test_patience_stops():
    recipe = Recipe(epochs=50, batch_size=8, lr=0.005, schedule="constant", validation_share=0.3, patience=2)
    history = Run(recipe, dropout=0.0).history
    losses = [row["validation_loss"] for row in history["curve"]]
    assert history["epochs"] == len(losses) == int(np.argmin(losses)) + 3 < 50


def test_max_steps_stops_in_an_epoch():
    history = Run(Recipe(epochs=50, batch_size=8, max_steps=8)).history
    assert (history["steps"], history["epochs"], history["examples_seen"]) == (8, 2, 43 + 16)


# --- features and predictions ---------------------------------------------------------------------------------------


def encode(rows: np.ndarray) -> dict[str, torch.Tensor]:
    return {"inputs": torch.from_numpy(rows)}


@pytest.mark.parametrize("workers", [0, 2])
def test_lazy_features_are_those_in_memory(workers):
    recipe = Recipe(epochs=2, batch_size=16, validation_share=0.2)
    assert_same(Run(recipe), Run(recipe, features=LazyFeatures(images(), encode), workers=workers))


@pytest.mark.parametrize("student", [LeNet(), MLP()], ids=["LeNet", "MLP"])
def test_a_prediction_does_not_depend_on_the_others(student):
    trainer = Trainer(device="cpu")
    module = trainer.build(student, IMAGE, 3, seed=0)
    pixels = images(300)
    every = trainer.predict(module, student.encode(pixels, IMAGE))
    assert every.shape == (300, 3)
    assert every.dtype == np.float32
    for rows in ([7], [290, 3, 3, 150], range(100, 300)):
        some = trainer.predict(module, student.encode(pixels[list(rows)], IMAGE))
        np.testing.assert_array_equal(some, every[list(rows)])


def test_predictions_are_made_in_evaluation_mode():
    trainer = Trainer(device="cpu")
    module = trainer.build(LeNet(dropout=0.9), IMAGE, 3, seed=0)
    features = LeNet().encode(images(), IMAGE)
    np.testing.assert_array_equal(trainer.predict(module, features), trainer.predict(module, features))
    with pytest.raises(ValueError, match="no rows"):
        trainer.predict(module, LeNet().encode(images(0), IMAGE))


def test_columns_are_standardised_by_the_training_rows():
    values = np.random.default_rng(0).normal([5, -3, 0, 1e4, 2], [1e-3, 10, 1, 1, 0], (N, 5)).astype(np.float32)
    trainer = Trainer(device="cpu")
    module = trainer.build(MLP(), TABLE, 3, seed=0)
    recipe = Recipe(epochs=1, validation_share=0.3)
    trainer.fit(module, MLP().encode(values, TABLE), targets(), SoftCrossEntropy(), recipe, seed=0, name="student")
    (layer,) = (part for part in module.modules() if isinstance(part, Standardise))
    train, _ = split_rows(N, 0.3, 0, "student")
    standardised = layer(torch.from_numpy(values)[train])
    torch.testing.assert_close(standardised.mean(dim=0), torch.zeros(5), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        standardised.std(dim=0, correction=0), torch.tensor([1.0, 1, 1, 1, 0]), atol=1e-3, rtol=0
    )


def test_measure_counts_what_can_be_counted_by_hand():
    trainer = Trainer(device="cpu")
    module = trainer.build(MLP(hidden=(7,)), IMAGE, 3, seed=0)
    sizes = measure(module, MLP().encode(images(), IMAGE))
    assert sizes["parameters"] == 64 * 7 + 7 + 7 * 3 + 3
    assert sizes["flops_per_query"] == 2 * (64 * 7 + 7 * 3)
    assert 0 < sizes["latency_s"] < 1


# --- errors ---------------------------------------------------------------------------------------------------------


def test_a_device_that_is_not_there():
    with pytest.raises(DistillError, match=r"run\.device: there is no device 'cuda:77' here; there is cpu"):
        Trainer(device="cuda:77")
    with pytest.raises(DistillError, match="precision"):
        Trainer(device="cpu", precision="fp16")


def test_precision_may_change_from_one_trainer_to_the_next():
    def train(precision):
        trainer = Trainer(device="cpu", precision=precision)
        module = trainer.build(LeNet(), IMAGE, 3, seed=0)
        features = LeNet().encode(images(), IMAGE)
        trainer.fit(module, features, targets(), SoftCrossEntropy(), Recipe(epochs=2), seed=0, name="s")
        assert {value.dtype for value in module.state_dict().values()} == {torch.float32}
        return trainer.predict(module, features)

    exact, rough, again = train("no"), train("bf16"), train("no")
    np.testing.assert_array_equal(exact, again)
    assert 0 < np.abs(exact - rough).max() < 0.1


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(DistillError, match="not finite by step"):
        Run(Recipe(epochs=60, optimizer="sgd", lr=1e12, schedule="constant"))


def test_too_few_rows():
    with pytest.raises(DistillError, match="too few"):
        split_rows(1, 0.1, 0, "student")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": 0}, r"epochs:? is at least 1"),
        ({"epochs": 1.5}, r"epochs:? is a whole number"),
        ({"batch_size": -3}, r"batch_size:? is at least 1"),
        ({"lr": "fast"}, r"lr:? is a number"),
        ({"lr": 0}, r"lr:? is more than 0"),
        ({"lr": float("nan")}, r"lr:? is more than 0"),
        ({"optimizer": "adamm"}, r"optimizer:? is one of sgd, adam, adamw"),
        ({"schedule": "cosin"}, r"schedule:? is one of"),
        ({"validation_share": 1.0}, r"validation_share:? is at least 0 and less than 1"),
        ({"weight_decay": -1}, r"weight_decay:? is at least 0"),
        ({"selection": "best"}, "set validation_share"),
        ({"patience": 3}, "set validation_share"),
        ({"gradient_clip": 0}, r"gradient_clip:? is more than 0"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_one_line(options, says):
    with pytest.raises(DistillError, match=says) as caught:
        build({"_target_": "distill.training.Recipe", **options}, "training")
    assert str(caught.value).startswith("training")
    assert "\n" not in str(caught.value)


def test_learning_rates():
    def rates(steps=10, **options):
        recipe = Recipe(lr=1.0, **options)
        return [round(recipe.learning_rate(step, steps, step // 5), 4) for step in range(steps)]

    assert rates(schedule="constant") == [1.0] * 10
    assert rates(schedule="linear", steps=4) == [1.0, 0.75, 0.5, 0.25]
    assert rates(schedule="cosine", steps=4) == [1.0, 0.8536, 0.5, 0.1464]
    assert rates(schedule="step", step_epochs=1, gamma=0.1) == [1.0] * 5 + [0.1] * 5
    assert rates(schedule="constant", warmup_share=0.3) == [0.25, 0.5, 0.75] + [1.0] * 7


def test_no_checkpoint_is_left_at_the_last_step(tmp_path, monkeypatch):
    """The end of the epoch still has to be written then, and a checkpoint does not know of it."""
    saved = []
    save = training._Checkpoints.save

    def note(self, state):
        saved.append(state["progress"]["step"])
        save(self, state)

    monkeypatch.setattr(training._Checkpoints, "save", note)
    run = Run(Recipe(epochs=2, batch_size=8, checkpoint_steps=1, log_steps=1), tmp_path)
    steps = run.history["steps"]
    assert saved == list(range(1, steps)), "after every step but the last"
