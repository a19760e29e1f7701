"""Shards, the row cache, the key index: nothing lost, nothing computed twice, damage noticed."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import Running
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import ToyTeacher, flip_a_bit, tables, tallied, truncate

from distill.errors import DistillError
from distill.provider.cache import RowCache
from distill.provider.keys import KeyIndex, RepeatCounter
from distill.provider.shards import MANY_FILES, Shards
from distill.records import content_keys


def columns(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"key": content_keys(tables(rows, seed)), "value": np.random.default_rng(seed).random((rows, 3), np.float32)}


def test_a_shard_is_read_as_it_was_written(tmp_path: Path) -> None:
    shards = Shards(tmp_path)
    written = [shards.write(0, columns(5)), shards.write(5, columns(2, seed=1))]
    assert Shards(tmp_path).scan() == written
    read = shards.read(written[1])
    assert read is not None
    assert {name: column.tobytes() for name, column in read.items()} == {
        name: column.tobytes() for name, column in columns(2, seed=1).items()
    }


@pytest.mark.parametrize("damage", [flip_a_bit, truncate])
def test_damage_is_noticed_named_and_moved_aside(tmp_path: Path, damage, caplog: pytest.LogCaptureFixture) -> None:
    shards = Shards(tmp_path)
    bad, good = shards.write(0, columns(5)), shards.write(5, columns(2))
    damage(tmp_path / bad.name)
    assert shards.read(bad) is None
    assert bad.name in caplog.text
    assert "5 rows" in caplog.text
    assert (tmp_path / f"{bad.name}.damaged").exists()
    assert shards.scan() == [good]


def test_what_an_interrupted_write_left_is_ignored_and_removed(tmp_path: Path) -> None:
    shards = Shards(tmp_path)
    good = shards.write(0, columns(5))
    leftover = tmp_path / f"{good.name}.unfinished"
    leftover.write_bytes(b"half")
    assert shards.scan() == [good]
    assert not leftover.exists()


def test_many_small_files_are_joined_and_an_interrupted_join_does_no_harm(tmp_path: Path) -> None:
    shards = Shards(tmp_path)
    for row in range(MANY_FILES):
        shards.write(row, columns(1, seed=row))
    contents = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (joined,) = shards.tidy(shards.scan())
    assert (joined.first, joined.rows) == (0, MANY_FILES)
    read = shards.read(joined)
    assert read is not None
    assert read["key"].tolist() == [columns(1, seed=row)["key"][0] for row in range(MANY_FILES)]
    for name in list(contents)[:10]:  # as if it had been killed while removing the parts
        (tmp_path / name).write_bytes(contents[name])
    assert shards.scan() == [joined]


def test_a_full_disk_is_said_and_leaves_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    shards = Shards(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DistillError, match=r"No space left on device.*run the same command again"):
        shards.write(0, columns(5))
    assert list(tmp_path.iterdir()) == []


# --- keys -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 60), max_size=12), max_size=12))
def test_the_index_and_the_counter_agree_with_a_dictionary(batches: list[list[int]]) -> None:
    keys = content_keys(np.arange(61, dtype=np.float32)[:, None])
    index, numbers = KeyIndex(), dict[int, int]()
    counter, asked = RepeatCounter(), dict[int, int]()
    for batch in batches:
        expected = []
        for item in batch:
            expected.append(asked.get(item, 0))
            asked[item] = expected[-1] + 1
        assert counter.count(keys[np.array(batch, dtype=int)]).tolist() == expected

        assert index.find(keys).tolist() == [numbers.get(item, -1) for item in range(61)]
        new = [item for item in dict.fromkeys(batch) if item not in numbers]
        for item, number in zip(new, index.add(keys[np.array(new, dtype=int)]).tolist(), strict=True):
            numbers[item] = number
        assert sorted(numbers.values()) == list(range(len(index)))


def test_keys_that_begin_alike_are_told_apart() -> None:
    """Half a key decides, unless two have the same half."""
    keys = np.array([b"12345678" + bytes([65 + i]) * 8 for i in range(6)] + [b"other..." * 2], dtype="S16")
    index = KeyIndex()
    assert index.add(keys[[4, 1]]).tolist() == [0, 1]
    assert index.add(keys[[3, 6, 0]]).tolist() == [2, 3, 4]
    assert index.find(keys).tolist() == [4, 1, -1, 2, 0, -1, 3]
    assert RepeatCounter().count(keys[[0, 1, 0, 5, 1, 0]]).tolist() == [0, 0, 1, 0, 1, 2]


# --- the cache ------------------------------------------------------------------------------------------------------


class Counted:
    """Computes the first feature and the row sum, and remembers what it was asked."""

    def __init__(self, inputs: np.ndarray) -> None:
        self.inputs, self.calls = inputs, list[list[int]]()

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        self.calls.append(rows.tolist())
        return np.stack([self.inputs[rows, 0], self.inputs[rows].sum(axis=1)], axis=1)


def test_the_cache_computes_each_content_once_in_chunks(tmp_path: Path) -> None:
    inputs = tables(10)[[0, 1, 1, 2, 3, 4, 0, 5]]
    compute = Counted(inputs)
    cache = RowCache(tmp_path)
    values = cache.get_or_compute(content_keys(inputs), compute, rows_at_once=4)
    assert compute.calls == [[0, 1, 3, 4], [5, 7]]
    np.testing.assert_array_equal(values[:, 0], inputs[:, 0])
    np.testing.assert_array_equal(cache.get_or_compute(content_keys(inputs), compute, 4), values)
    np.testing.assert_array_equal(RowCache(tmp_path).get_or_compute(content_keys(inputs), compute, 4), values)
    assert len(compute.calls) == 2


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
def test_only_the_rows_of_a_damaged_shard_are_computed_again(tmp_path: Path, damage) -> None:
    inputs = tables(12)
    keys = content_keys(inputs)
    values = RowCache(tmp_path).get_or_compute(keys, Counted(inputs), rows_at_once=4)
    damage(sorted(tmp_path.glob("*.npz"))[1])
    compute = Counted(inputs)
    np.testing.assert_array_equal(RowCache(tmp_path).get_or_compute(keys, compute, 4), values)
    assert compute.calls == [[4, 5, 6, 7]]
    compute = Counted(inputs)
    RowCache(tmp_path).get_or_compute(keys, compute, 4)
    assert compute.calls == []


def test_ten_thousand_small_asks_do_not_leave_ten_thousand_files(tmp_path: Path) -> None:
    inputs = tables(300)
    cache = RowCache(tmp_path)
    for row in range(len(inputs)):
        cache.get_or_compute(content_keys(inputs[row : row + 1]), Counted(inputs[row : row + 1]), 1)
    assert len(list(tmp_path.iterdir())) <= MANY_FILES + 2
    compute = Counted(inputs)
    values = RowCache(tmp_path).get_or_compute(content_keys(inputs), compute, 4)
    np.testing.assert_array_equal(values[:, 0], inputs[:, 0])
    assert compute.calls == []


def test_a_failing_computation_stores_nothing_of_its_chunk_and_frees_the_lock(tmp_path: Path) -> None:
    inputs = tables(4)
    cache = RowCache(tmp_path)

    def fail(rows: np.ndarray) -> np.ndarray:
        raise RuntimeError("no teacher today")

    with pytest.raises(RuntimeError):
        cache.get_or_compute(content_keys(inputs), fail, 4)
    assert list(tmp_path.glob("*.npz")) == []
    assert len(cache.get_or_compute(content_keys(inputs), Counted(inputs), 4)) == 4


def share(folder: Path, first: int) -> None:
    inputs = tables(400)[first : first + 300]
    teacher = ToyTeacher(tally=folder / "tally", seconds_per_call=0.005)
    cache = RowCache(folder / "cache")
    values = cache.get_or_compute(content_keys(inputs), lambda rows: teacher.predict(inputs[rows]), 7)
    assert (values == ToyTeacher().predict(inputs)).all()


def test_two_processes_never_compute_the_same_row_twice(tmp_path: Path) -> None:
    running = [Running(share, tmp_path, first, cwd=tmp_path) for first in (0, 100, 50)]
    assert [one.end().returncode for one in running] == [0, 0, 0]
    assert tallied(tmp_path / "tally") == 400


def test_waiting_for_another_process_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import filelock, sys, time\n"
            "with filelock.FileLock(sys.argv[1]): print('held', flush=True); time.sleep(0.5)",
            str(tmp_path / ".lock"),
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    inputs = tables(3)
    RowCache(tmp_path).get_or_compute(content_keys(inputs), Counted(inputs), 3)
    assert "waiting for another process" in caplog.text
    holder.wait()
    holder.stdout.close()
