"""Every class of every room against the contracts, and the door on the objects of a real experiment."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_one_door
import torch
import yaml
from attack_toys import CLASSES, NAMES, a_labelled_pool, extracted
from hydra import compose, initialize_config_dir
from toys import SPEC, a_pool, claims_hold

from distill import contracts
from distill.attacks._repeats import Repeats
from distill.config import CONFIG_DIR, build, locate
from distill.errors import DistillError
from distill.experiment import Experiment, make_trainer
from distill.provider.defenses.none import NoDefense
from distill.provider.oracle import serve
from distill.provider.teachers.torch_classifier import TorchClassifier
from distill.query import query
from distill.randomness import KeyedRandom
from distill.records import (
    Answers,
    Examples,
    InputSpec,
    InterfaceProfile,
    Queries,
    Reveals,
    TransferSet,
    content_keys,
    one_hot,
)
from distill.training import Trainer


def kind_of(group: str, option: str) -> type:
    return locate(yaml.safe_load((CONFIG_DIR / group / f"{option}.yaml").read_text())["_target_"], group)


def options(group: str, language: bool = False) -> list[str]:
    """The options of a group that are of one domain."""
    found = sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))
    return [option for option in found if contracts.of_language(group, kind_of(group, option)) is language]


def made(group: str, option: str) -> Any:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        return build(compose(f"{group}/{option}")[group], group)


def members(protocol: type) -> set[str]:
    """The attributes and methods that a protocol asks for."""
    kinds = [kind for kind in protocol.__mro__ if kind.__module__ == contracts.__name__]
    names = {name for kind in kinds for name in {*vars(kind), *kind.__annotations__}}
    return {name for name in names if not name.startswith("_")}


def first_kind(attack: Any) -> str:
    """Tables are the quickest."""
    return "table" if "table" in attack.inputs else attack.inputs[0]


@contextmanager
def refusing_small_budgets(provider_log: Path) -> Iterator[None]:
    """The rest of the test is left out where an attack says, before it asks anything, that it needs more to begin."""
    try:
        yield
    except DistillError as refused:
        if refused.key != "budget" or provider_log.exists():
            raise
        pytest.skip(f"refused: {refused}")


def answers_to_each(attack: Any) -> int:
    """How often an attack asks each query: it spends the largest multiple of it."""
    return attack.times if isinstance(attack, Repeats) else 1


@pytest.mark.parametrize("option", options("attack"))
@pytest.mark.parametrize("queries", [1, CLASSES, 30, 31])
def test_an_attack_spends_what_it_may_and_no_more(option: str, queries: int, tmp_path: Path) -> None:
    attack = made("attack", option)
    assert members(contracts.Attack) <= set(dir(attack))
    kind = first_kind(attack)
    pool, times = a_labelled_pool(kind, 30), answers_to_each(attack)
    with refusing_small_budgets(tmp_path / "provider_log"):
        transfer_set, provider, _ = extracted(attack, tmp_path, kind, queries, pool)
    spent = len(transfer_set)
    assert spent in (queries // times * times, min(queries // times, len(pool)) * times)
    assert provider.cost().queries == (spent if attack.uses_teacher else 0)
    assert transfer_set.pool == pool.fingerprint or (transfer_set.rows < 0).all()
    assert transfer_set.posteriors.shape == (spent, CLASSES)
    np.testing.assert_allclose(transfer_set.posteriors.sum(axis=1), 1, atol=1e-5)
    assert len(transfer_set.inputs(pool)) == spent
    again, _, _ = extracted(made("attack", option), tmp_path / "again", kind, queries, pool)
    np.testing.assert_array_equal(again.rows, transfer_set.rows)
    np.testing.assert_array_equal(again.posteriors, transfer_set.posteriors)


@pytest.mark.parametrize("option", options("attack"))
def test_an_attack_works_with_what_it_says_it_requires(option: str, tmp_path: Path) -> None:
    attack = made("attack", option)
    kind, top_k = first_kind(attack), 2 if attack.requires is Reveals.TOP_K else None
    access = InterfaceProfile(attack.requires, top_k)
    with refusing_small_budgets(tmp_path / "provider_log"):
        transfer_set, *_ = extracted(attack, tmp_path, kind, 60, a_labelled_pool(kind, 60), access=access)
    assert len(transfer_set) == 60 // answers_to_each(attack) * answers_to_each(attack)


def test_controls_take_the_very_rows_that_the_random_attack_asks_about(tmp_path: Path) -> None:
    pool = a_labelled_pool("table", 40)
    rows = [
        extracted(made("attack", option), tmp_path / option, "table", 15, pool)[0].rows
        for option in ("knockoff_random", "copycat", "ground_truth_labels", "no_teacher")
    ]
    for other in rows[1:]:
        np.testing.assert_array_equal(other, rows[0])


def test_ground_truth_of_other_classes_is_refused(tmp_path: Path) -> None:
    pool = Examples(a_pool(10).inputs, SPEC, np.arange(10) % CLASSES, tuple("wxyz"), "other")
    with pytest.raises(DistillError, match="labelled with the teacher's classes"):
        extracted(made("attack", "ground_truth_labels"), tmp_path, "table", 5, pool)
    pool = a_labelled_pool("table", 10)
    truth, *_ = extracted(made("attack", "ground_truth_labels"), tmp_path, "table", 5, pool)
    assert pool.labels is not None
    np.testing.assert_array_equal(truth.posteriors, one_hot(pool.labels[truth.rows], CLASSES))


IMAGES = Examples(
    np.random.default_rng(1).integers(0, 256, (20, 4, 4, 1)).astype(np.uint8), InputSpec("image", (4, 4, 1))
)


def some_answers(logits: bool = False) -> TransferSet:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(20, CLASSES)).astype(np.float32)
    posteriors = torch.from_numpy(scores).softmax(1).numpy()
    kept = scores if logits else None
    return TransferSet(np.arange(20), posteriors, logits=kept, pool=IMAGES.fingerprint, profile="probs")


class Quick:
    """An apprentice whose students are a fixed function of the pixels."""

    class_names = NAMES

    def fit(self, transfer_set: TransferSet, pool: Examples) -> Any:
        return self

    def predict(self, inputs: Any) -> np.ndarray:
        return inputs[:].reshape(len(inputs), -1)[:, :CLASSES].astype(np.float32) / 64


def knowing(knows: str, cache: Path) -> contracts.Knowledge:
    """Of an undefended provider."""
    knowledge = contracts.Knowledge(IMAGES, Quick(), Trainer(device="cpu", progress=False), 0, cache)
    match knows:
        case "the defense's code":
            return replace(knowledge, defense=NoDefense())
        case "the clean answers":
            return replace(knowledge, defense=NoDefense(), clean=some_answers().posteriors)
        case _:
            return knowledge


@pytest.mark.parametrize("option", options("recovery"))
def test_a_recovery_sets_targets_that_are_distributions(option: str, tmp_path: Path) -> None:
    recovery = made("recovery", option)
    assert members(contracts.Recovery) <= set(dir(recovery))
    assert recovery.knows in ("nothing", "the defense's name", "the defense's code", "the clean answers")
    given = some_answers(logits=True)
    recovered = recovery.targets(given, knowing(recovery.knows, tmp_path))
    assert recovered.targets is not None
    np.testing.assert_allclose(recovered.targets.sum(axis=1), 1, atol=1e-5)
    assert given.targets is None, "the transfer set that was paid for stays as it is"
    if option == "top1":
        np.testing.assert_array_equal(recovered.targets, one_hot(given.posteriors.argmax(axis=1), CLASSES))


@pytest.mark.parametrize("option", options("objective"))
@pytest.mark.parametrize("logits", [False, True])
def test_an_objective_is_a_sum_over_rows(option: str, logits: bool) -> None:
    objective = made("objective", option)
    assert members(contracts.Objective) <= set(dir(objective))
    targets = objective.prepare(
        made("recovery", "as_returned").targets(some_answers(logits), knowing("nothing", Path("unused")))
    )
    output = torch.randn(20, CLASSES, generator=torch.Generator().manual_seed(0))
    whole = objective.loss(output, targets)
    parts = [
        objective.loss(output[part], {name: value[part] for name, value in targets.items()})
        for part in (slice(0, 7), slice(7, 20))
    ]
    assert torch.isclose(whole, sum(parts), rtol=1e-5)
    assert objective.positions(targets) == 20
    assert torch.isfinite(whole)


@pytest.mark.parametrize(
    ("group", "protocol", "language"),
    [
        ("defense", contracts.Defense, False),
        ("metric", contracts.Metric, False),
        ("metric", contracts.LanguageMetric, True),
        ("student", contracts.Student, False),
        ("student", contracts.LanguageStudent, True),
        ("objective", contracts.LanguageObjective, True),
        ("attack", contracts.PromptAttack, True),
        ("recovery", contracts.Curation, True),
        ("tracker", contracts.Tracker, False),
        ("data", contracts.Data, False),
        ("pool", contracts.Pool, False),
        ("pool", contracts.PromptPool, True),
    ],
)
def test_classes_have_what_their_contract_asks_for(group: str, protocol: type, language: bool) -> None:
    for option in options(group, language):
        node = yaml.safe_load((CONFIG_DIR / group / f"{option}.yaml").read_text())
        # One that needs something of the user, or is composed, can't be built here; its class has the methods.
        kind = kind_of(group, option) if "???" in node.values() or "defaults" in node else build(node, group)
        assert members(protocol) <= set(dir(kind)), option


def test_a_teacher_has_what_its_contract_asks_for() -> None:
    """The attributes that `prepare` sets are there after it, on a real teacher."""
    experiment = an_experiment(Path("."))
    assert members(contracts.Teacher) <= set(dir(experiment.teacher))


def an_experiment(queries: Path, *overrides: str) -> Experiment:
    words = ["+experiment=quickstart", "budget.queries=60", "training.epochs=2", "run.progress=false", *overrides]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        config = compose("train", overrides=words, return_hydra_config=True)
    choices = {name: str(option) for name, option in config.hydra.runtime.choices.items()}
    return Experiment.build(config, make_trainer(config), choices, queries)


def test_the_attackers_real_objects_do_not_lead_behind_the_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `distill.train` hands to an attack, a recovery, an objective and a student, after a real extraction."""
    monkeypatch.setattr(test_one_door, "FORBIDDEN", (*test_one_door.FORBIDDEN, TorchClassifier))
    experiment = an_experiment(tmp_path, "defense=gaussian_noise")
    transfer_set, _ = query(experiment)
    student = experiment.students.fit(transfer_set, experiment.pool)
    clean = experiment.provider.clean(experiment.pool.inputs[transfer_set.rows])
    handed = {
        "apprentice": experiment.students,
        "attack": experiment.attack,
        "pool": experiment.pool.inputs,
        "transfer_set": transfer_set,
        "history": student.history,
        "spec": student.spec,
    }
    handed["apprentice"].trainer._accelerator = None  # accelerate's own state: large, and made before any teacher
    assert test_one_door.leaks(handed, clean) == []
    assert test_one_door.leaks({"provider": experiment.provider}, clean), "the walk would have found one"


@pytest.mark.parametrize("option", options("defense"))
def test_a_defense_keeps_what_it_claims(option: str, tmp_path: Path) -> None:
    """With the options of its file, on answers of a real teacher; its networks are trained briefly."""
    trained = "training@recipe" in (CONFIG_DIR / f"defense/{option}.yaml").read_text()
    experiment = an_experiment(tmp_path, f"defense={option}", *["defense.recipe.epochs=1"] * trained)
    defense, inputs = experiment.defense, experiment.pool.inputs[:100]
    clean, info, keys = experiment.provider.clean(inputs), defense.query_info(inputs), content_keys(inputs)

    def perturbed(defense: contracts.Defense, repeat: int, rows: slice = slice(None)) -> Answers:
        given = None if info is None else info[rows]
        return defense.perturb(clean[rows], given, KeyedRandom(5, keys[rows], np.full(len(keys[rows]), repeat)))

    in_parts = copy.deepcopy(defense)
    once = perturbed(defense, 0)
    claims_hold(defense, clean, once)
    parts = [perturbed(in_parts, 0, rows) for rows in (slice(0, 1), slice(1, 60), slice(60, None))]
    np.testing.assert_array_equal(Answers.join(parts).posteriors, once.posteriors)
    assert np.array_equal(perturbed(defense, 1).posteriors, once.posteriors) == defense.deterministic


@pytest.mark.parametrize("option", options("attack"))
def test_real_attacks_on_real_answers(option: str, tmp_path: Path) -> None:
    if "image" not in kind_of("attack", option).inputs:
        with pytest.raises(DistillError, match=r"and digits holds images; compatible: .*knockoff_random"):
            an_experiment(tmp_path, f"attack={option}")
        return
    experiment = an_experiment(tmp_path, f"attack={option}")
    with refusing_small_budgets(tmp_path / "provider_log"):
        _, cost = query(experiment)
    assert cost["queries"] == (60 if experiment.attack.uses_teacher else 0)
    if option == "knockoff_random":
        with serve(experiment.provider) as oracle:
            assert oracle.affordable() == 0
            with pytest.raises(DistillError, match="affords only 0"):
                oracle.ask(Queries.of_pool(experiment.pool, np.arange(1)))
