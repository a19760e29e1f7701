"""Transfer sets on disk: what is read is what was written, damage is noticed, and other tools can load them."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
from toys import a_pool, a_provider, collect, flip_a_bit, truncate

from distill import transfer
from distill.errors import DamagedTransferSet, DistillError
from distill.provider.defenses.gaussian_noise import GaussianNoise
from distill.records import Examples, InputSpec, TransferSet

IMAGES = InputSpec("image", (5, 4, 3))
GREY = InputSpec("image", (5, 4, 1))
TEXTS = InputSpec("text")
TABLES = InputSpec("table", (6,))


def some_inputs(spec: InputSpec, rows: int, seed: int = 0, dtype: str = "") -> np.ndarray:
    random = np.random.default_rng(seed)
    if spec.kind == "text":
        return np.array([f"text {i} – {seed}\n" for i in range(rows)], dtype=object)
    if spec.kind == "image" and dtype != "float32":
        return random.integers(0, 256, size=(rows, *spec.shape), dtype=np.uint8)
    return random.random(size=(rows, *spec.shape), dtype=np.float32)


def some_answers(rows: int, classes: int = 4) -> np.ndarray:
    return np.random.default_rng(9).dirichlet(np.ones(classes), size=rows).astype(np.float32)


def equal(one: TransferSet, other: TransferSet) -> bool:
    def same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
        if a is None or b is None:
            return a is b
        return a.dtype == b.dtype and np.array_equal(a, b)

    columns = ("rows", "posteriors", "made", "logits")
    values = ("pool", "profile", "note")
    return all(same(vars(one)[name], vars(other)[name]) for name in columns) and all(
        vars(one)[name] == vars(other)[name] for name in values
    )


def made_by(spec: InputSpec, dtype: str = "") -> TransferSet:
    """Nine queries, of which the attack made those at 0, 4 and 8."""
    rows = np.array([-1, 5, 5, 0, -1, 2, 1, 3, -1])
    made = some_inputs(spec, 3, seed=1, dtype=dtype)
    return TransferSet(
        rows, some_answers(9), made, logits=np.log(some_answers(9)), pool="abc", profile="logits", note="n"
    )


@pytest.mark.parametrize(("spec", "dtype"), [(IMAGES, "uint8"), (IMAGES, "float32"), (TEXTS, ""), (TABLES, "")])
def test_what_is_loaded_is_what_was_saved(
    tmp_path: Path, spec: InputSpec, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for batch_bytes in (1, 10_000_000):  # a row a batch, and all in one
        monkeypatch.setattr(transfer, "BATCH_BYTES", batch_bytes)
        transfer_set = made_by(spec, dtype)
        transfer.save(transfer_set, tmp_path / "set")
        assert equal(transfer.load(tmp_path / "set"), transfer_set)


def test_pool_rows_alone_and_no_rows_at_all(tmp_path: Path) -> None:
    for rows in (7, 0):
        transfer_set = TransferSet(np.arange(rows), some_answers(rows), pool="p", profile="probs")
        transfer.save(transfer_set, tmp_path / "set")
        assert equal(transfer.load(tmp_path / "set"), transfer_set)


def test_hugging_face_loads_it(tmp_path: Path) -> None:
    transfer_set = made_by(TABLES)
    transfer.save(transfer_set, tmp_path / "set")
    loaded = datasets.load_from_disk(str(tmp_path / "set"))
    assert set(loaded.column_names) == {"row", "label", "posterior", "logits", "input"}
    assert loaded.features["posterior"] == datasets.List(datasets.Value("float32"), length=4)
    columns = loaded.with_format("numpy")
    np.testing.assert_array_equal(columns["row"][:], transfer_set.rows)
    np.testing.assert_array_equal(columns["posterior"][:], transfer_set.posteriors)
    np.testing.assert_array_equal(columns["label"][:], transfer_set.posteriors.argmax(axis=1))
    assert loaded[1]["input"] is None
    np.testing.assert_allclose(loaded[4]["input"], transfer_set.made[1])
    assert "queries: 9, of which the attack made 3" in (tmp_path / "set" / "README.md").read_text()


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "transfer_set.json"])
def test_damage_is_noticed_and_the_file_is_named(tmp_path: Path, damage, name: str) -> None:
    path = tmp_path / "set"
    transfer.save(made_by(TABLES), path)
    damage(path / name)
    with pytest.raises(DamagedTransferSet, match=str(path)):
        transfer.load(path)
    transfer.save(made_by(TABLES), path)
    assert equal(transfer.load(path), made_by(TABLES))


def test_any_flipped_bit_of_the_sidecar_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "set"
    transfer.save(made_by(TABLES), path)
    content = (path / "transfer_set.json").read_bytes()
    for position in range(0, len(content) - 1, 3):
        damaged = bytearray(content)
        damaged[position] ^= 4
        (path / "transfer_set.json").write_bytes(damaged)
        try:
            assert equal(transfer.load(path), made_by(TABLES))  # it was white space
        except DamagedTransferSet:
            continue
        assert content[position : position + 1].isspace()


def test_an_interrupted_save_is_no_transfer_set_and_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "set"
    monkeypatch.setattr(transfer, "_card", killed)
    with pytest.raises(KeyboardInterrupt):
        transfer.save(made_by(TABLES), path)
    with pytest.raises(DamagedTransferSet):
        transfer.load(path)
    monkeypatch.undo()
    transfer.save(made_by(TABLES), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


def test_a_folder_that_can_not_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DistillError, match="cannot write"):
        transfer.save(made_by(TABLES), tmp_path / "file" / "set")


# --- export ---------------------------------------------------------------------------------------------------------


def a_named_pool(spec: InputSpec) -> Examples:
    return Examples(some_inputs(spec, 10), spec)


@pytest.mark.parametrize("spec", [IMAGES, GREY, TEXTS, TABLES])
@pytest.mark.parametrize("with_made", [False, True])
def test_an_export_holds_its_inputs_and_loads_anywhere(tmp_path: Path, spec: InputSpec, with_made: bool) -> None:
    pool = a_named_pool(spec)
    transfer_set = made_by(spec) if with_made else TransferSet(np.array([3, 3, 9]), some_answers(3))
    transfer_set = TransferSet(**(vars(transfer_set) | {"pool": pool.fingerprint}))
    names = ("cat", "dog", "eel", "fox")
    transfer.export(transfer_set, pool, tmp_path / "export", names)
    loaded = datasets.load_dataset(str(tmp_path / "export"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features["label"].names == list(names)
    np.testing.assert_allclose(loaded["posterior"][:], transfer_set.posteriors)
    expected = transfer_set.inputs(pool)[0 : len(transfer_set)]
    if spec.kind == "text":
        assert loaded["text"][:] == expected.tolist()
    elif spec.kind == "table":
        np.testing.assert_array_equal(loaded.with_format("numpy")["features"][:], expected)
    else:
        assert isinstance(loaded.features["image"], datasets.Image)
        for image, pixels in zip(loaded["image"], expected, strict=True):
            np.testing.assert_array_equal(np.asarray(image).reshape(spec.shape), pixels)


def test_float_images_of_an_attack_stay_exact_beside_pixels_of_the_pool(tmp_path: Path) -> None:
    pool = a_named_pool(IMAGES)
    transfer_set = made_by(IMAGES, "float32")
    transfer_set = TransferSet(**(vars(transfer_set) | {"pool": pool.fingerprint}))
    transfer.export(transfer_set, pool, tmp_path / "export", ("a", "b", "c", "d"))
    loaded = datasets.load_dataset(str(tmp_path / "export"), split="train", cache_dir=str(tmp_path / "cache"))
    images = loaded.with_format("numpy")["image"][:]
    np.testing.assert_array_equal(images[[0, 4, 8]], transfer_set.made)
    np.testing.assert_allclose(images[1], pool.inputs[5] / 255, rtol=1e-6)


def test_an_export_from_another_pool_is_refused(tmp_path: Path) -> None:
    transfer_set = TransferSet(np.array([1]), some_answers(1), pool="another")
    with pytest.raises(DistillError, match="another pool"):
        transfer.export(transfer_set, a_named_pool(TABLES), tmp_path / "export", ("a", "b", "c", "d"))
    assert not (tmp_path / "export").exists()


def test_no_file_holds_a_clean_answer(tmp_path: Path) -> None:
    pool = a_pool(20)
    provider = a_provider(tmp_path / "provider", defense=GaussianNoise())
    transfer_set = collect(provider, pool, np.arange(20), 20)
    transfer.save(transfer_set, tmp_path / "attacker" / "set")
    transfer.export(transfer_set, pool, tmp_path / "attacker" / "export", ("a", "b", "c", "d"))
    clean = provider.clean(pool.inputs).posteriors
    files = [path.read_bytes() for path in (tmp_path / "attacker").rglob("*") if path.is_file()]
    assert any(transfer_set.posteriors.tobytes() in file for file in files)  # so it would be found
    assert not any(clean[row].tobytes() in file for file in files for row in range(20))
