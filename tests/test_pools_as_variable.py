"""How large a pool is and how near to the teacher's task, as variables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from attack_toys import IMAGE, NAMES, SPECS, a_labelled_pool
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config import CONFIG_DIR, build
from distill.data.pools.distribution_aware import DistributionAware
from distill.data.pools.held_out import HeldOut
from distill.data.pools.local import Local
from distill.data.pools.noise import Noise
from distill.data.pools.prompts_held_out import PromptsHeldOut
from distill.data.pools.subset import Subset
from distill.errors import DistillError, MissingAsset
from distill.records import Dataset, Examples


class Given:
    """A pool that is there already."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def load(self, data: Dataset) -> Examples:
        return self.examples


def some_data(kind: str, held_out: int = 60) -> Dataset:
    rows = a_labelled_pool(kind, held_out + 20, seed=3)
    train, rest = rows.take(np.arange(20)), rows.take(np.arange(20, held_out + 20))
    return Dataset("toy", SPECS[kind], NAMES, train, train, rest)


@settings(max_examples=20, deadline=None)
@given(small=st.integers(1, 60), large=st.integers(1, 60), seed=st.integers(0, 3))
def test_sizes_nest(small: int, large: int, seed: int) -> None:
    small, large = sorted((small, large))
    data = some_data("table")
    few, many = (Subset(HeldOut(), size, seed).load(data) for size in (small, large))
    assert (len(few), len(many)) == (small, large)
    np.testing.assert_array_equal(few.inputs, many.inputs[:small])
    np.testing.assert_array_equal(few.labels, many.labels[:small])
    assert (few.fingerprint == many.fingerprint) == (small == large)
    assert len({row.tobytes() for row in many.inputs}) == large


def test_a_subset_is_random_and_depends_on_its_seed_alone() -> None:
    data = some_data("table")
    one, same, other = (Subset(HeldOut(), 20, seed).load(data) for seed in (0, 0, 1))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert not np.array_equal(one.inputs, data.held_out.inputs[:20])
    assert "20 of" in one.name


@pytest.mark.parametrize("kind", [Subset, DistributionAware])
def test_more_than_there_is_is_refused(kind: type) -> None:
    with pytest.raises(DistillError, match=r"^pool\.size: .* has 60 rows, so not 61"):
        kind(HeldOut(), size=61, **({"examples": 5} if kind is DistributionAware else {})).load(some_data("table"))


@pytest.mark.parametrize("kind", [Subset, DistributionAware])
@pytest.mark.parametrize("other", [None, "noise", PromptsHeldOut()])
def test_what_is_no_pool_of_inputs_is_refused(kind: type, other: object) -> None:
    with pytest.raises(DistillError, match=r"pool@pool\.pool=photographs"):
        kind(other)


def test_the_other_pools_complaints_name_its_own_options() -> None:
    with pytest.raises(MissingAsset, match=r"^pool\.pool\.path: ") as told:
        Subset(Local("/nowhere/x.csv"), 5).load(some_data("table"))
    assert told.value.key == "pool.pool.path"
    with pytest.raises(DistillError, match=r"^data\.victim_share: ") as told:
        Subset(HeldOut(), 5).load(some_data("table", held_out=0))
    assert told.value.key == "data.victim_share"


@pytest.mark.parametrize("kind", ["image", "table", "text"])
def test_what_is_near_the_task_is_found_among_what_is_not(kind: str) -> None:
    data = some_data(kind)
    near = a_labelled_pool(kind, 40, seed=5)
    if kind == "image":
        far = Noise(160).load(data)
        blurred = [
            replace(rows, inputs=np.repeat(rows.inputs[:, :1], 8, axis=1) // 4) for rows in (near, data.held_out)
        ]
        near, data = blurred[0], replace(data, held_out=blurred[1])
    elif kind == "table":
        far = replace(near, inputs=np.random.default_rng(0).normal(8, 1, (160, 6)).astype(np.float32), labels=None)
    else:
        words = np.empty(160, dtype=object)
        words[:] = [f"lorem ipsum{i % 7} dolor sit{i % 5}" for i in range(160)]
        far = replace(near, inputs=words, labels=None)
    order = np.random.default_rng(1).permutation(200)
    mixed = Examples(np.concatenate([near.inputs, far.inputs])[order], SPECS[kind], name="a mixture")
    chosen = DistributionAware(Given(mixed), size=40, examples=30).load(data)
    found = {row.tobytes() if kind != "text" else row for row in chosen.inputs}
    truly = {row.tobytes() if kind != "text" else row for row in near.inputs}
    assert len(found & truly) >= 0.95 * len(truly)


def test_each_example_takes_its_nearest_in_turn_as_by_brute_force() -> None:
    """With as many components as columns, a projection keeps all distances."""
    data, pool = some_data("table"), a_labelled_pool("table", 50, seed=9)
    known = np.concatenate([data.held_out.inputs, pool.inputs]).astype(np.float64)
    own, rows = ((part - known.mean(0)) / known.std(0) for part in (data.held_out.inputs, pool.inputs))
    wishes = np.argsort(np.linalg.norm(rows[:, None] - own, axis=2), axis=0)  # (rank, example)
    expected: list[int] = []
    for rank in wishes:
        expected += sorted(set(rank.tolist()) - set(expected))
    for size in (7, 20, 50):
        chosen = DistributionAware(Given(pool), size, examples=60, components=6).load(data)
        np.testing.assert_array_equal(chosen.inputs, pool.inputs[expected[:size]])


def test_no_example_takes_all() -> None:
    """Rows that crowd around one example leave room for those of the others."""
    data = some_data("table")
    crowd = data.held_out.inputs[0] + np.random.default_rng(0).normal(0, 0.01, (100, 6)).astype(np.float32)
    others = data.held_out.inputs[1:11] + np.float32(0.3)
    pool = Examples(np.concatenate([crowd, others]), SPECS["table"], name="crowded")
    chosen = DistributionAware(Given(pool), size=60, examples=60).load(data)
    assert len({row.tobytes() for row in chosen.inputs} & {row.tobytes() for row in others}) == 10


def test_labels_come_along_and_the_seed_matters_where_examples_are_few() -> None:
    data, pool = some_data("image"), a_labelled_pool("image", 50, seed=9)
    one, same, other = (DistributionAware(Given(pool), 10, examples=3, seed=seed).load(data) for seed in (0, 0, 1))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert one.labels is not None
    assert one.spec == IMAGE


def test_examples_must_be_there() -> None:
    with pytest.raises(DistillError, match=r"^pool\.examples: .*victim_share"):
        DistributionAware(Given(a_labelled_pool("table", 9)), 5).load(some_data("table", held_out=0))


@pytest.mark.parametrize(("option", "inner"), [("subset", "held_out"), ("distribution_aware", "photographs")])
def test_the_other_pool_is_composed_by_name(option: str, inner: str, tmp_path: Path) -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        plain = compose("train", overrides=["+experiment=quickstart", f"pool={option}"])
        other = compose(
            "train", overrides=["+experiment=quickstart", f"pool={option}", "pool@pool.pool=noise", "pool.pool.size=30"]
        )
    assert plain.pool.pool._target_.rpartition(".")[0].endswith(inner)
    pool = build(other.pool, "pool")
    assert (type(pool.pool), pool.pool.size, pool.size) == (Noise, 30, 1000)
