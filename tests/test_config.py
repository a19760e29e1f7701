"""The configuration: every yaml fits its class, every experiment composes, identity is what it says."""

from __future__ import annotations

import importlib
import inspect
import os
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from distill import config as distill_config
from distill.config import CONFIG_DIR, Config, build, identity, locate, query_id, run_id
from distill.errors import DistillError

# Each group and the room that its classes live in.
ROOMS = {
    "attack": "attacks",
    "data": "data",
    "defense": "provider/defenses",
    "leak": "leaks",
    "metric": "metrics",
    "objective": "objectives",
    "pool": "data/pools",
    "recovery": "recovery",
    "rollout": "rollouts",
    "signal": "signals",
    "student": "students",
    "teacher": "provider/teachers",
    "tracker": "trackers",
}
PACKAGE = Path(distill_config.__file__).parent
SNAPSHOTS = Path(__file__).parent / "snapshots"
OPTIONS = [(group, path.stem) for group in ROOMS for path in sorted((CONFIG_DIR / group).glob("*.yaml"))]
EXPERIMENTS = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))


def composed(*overrides: str) -> object:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        return compose("train", overrides=list(overrides), return_hydra_config=True)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_an_option_is_one_yaml_beside_one_class(group: str, option: str) -> None:
    text = (CONFIG_DIR / group / f"{option}.yaml").read_text()
    described = next(line for line in text.splitlines() if not line.startswith("# @"))
    assert described.startswith("# "), "the first comment describes the option for --help"
    assert len(described) < 110
    node = yaml.safe_load(text)
    target = locate(node["_target_"], group)
    module = f"distill.{ROOMS[group].replace('/', '.')}.{option}"
    assert target.__module__ == module, "the yaml's stem is the module's"
    doc = inspect.getdoc(target)
    assert doc, f"{target.__name__} has no docstring"
    nested = {
        name.split("@")[1].partition(".")[0]
        for default in node.pop("defaults", [])
        if isinstance(default, dict)
        for name in default
    }
    keys = set(node) - {"_target_"} | nested
    signature = inspect.signature(target).parameters
    assert keys == set(signature), "the yaml's keys are the constructor's options"
    for name, parameter in signature.items():
        if name in nested:
            continue
        if parameter.default is inspect.Parameter.empty:
            # The yaml leaves it open, or shows components (the members of a chain), which have no default in code.
            assert node[name] == "???" or isinstance(node[name], list), f"{name} has no default"
        else:
            value = node[name]
            default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
            assert value == default or str(value) == str(default), f"{name}: {value!r} in the yaml, {default!r} in code"


# The method by which a class of each room is known.
CALLED = {
    "attack": {"extract", "synthesise"},
    "data": {"load"},
    "defense": {"perturb"},
    "leak": {"extract"},
    "metric": {"measure", "judge"},
    "objective": {"loss"},
    "pool": {"load", "load_prompts"},
    "recovery": {"targets", "curate"},
    "rollout": {"examples"},
    "signal": {"fit"},
    "student": {"build", "build_language"},
    "teacher": {"predict", "prepare"},
    "tracker": {"start"},
}


@pytest.mark.parametrize("group", ROOMS)
def test_every_method_of_a_room_has_its_yaml(group: str) -> None:
    options = {option for g, option in OPTIONS if g == group}
    found = set()
    for path in sorted((PACKAGE / ROOMS[group]).glob("[!_]*.py")):
        module = importlib.import_module(f"distill.{ROOMS[group].replace('/', '.')}.{path.stem}")
        for name, value in vars(module).items():
            here = inspect.isclass(value) and value.__module__ == module.__name__
            if here and CALLED[group] & set(dir(value)) and name.lower() == path.stem.replace("_", ""):
                found.add(path.stem)
    assert found, "the room is empty"
    assert found <= options, "a method without a yaml"


@pytest.mark.parametrize("path", sorted((CONFIG_DIR / "training").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_are_complete_and_valid(path: Path) -> None:
    node = yaml.safe_load(path.read_text())
    recipe = build(node, "training")
    assert set(node) - {"_target_"} == set(vars(recipe))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_compose_and_match_their_snapshot(name: str) -> None:
    """A change of any default shows here. DISTILL_UPDATE_SNAPSHOTS=1 accepts what changed."""
    config = composed(f"+experiment={name}", *(["data.path=x.csv", "teacher.architecture.model=m"]
                                               if name == "bring_your_own" else []))  # fmt: skip
    HydraConfig.instance().set_config(config)
    assert config.hydra.runtime.choices.experiment == name
    resolved = {key: config[key] for key in Config.__dataclass_fields__}
    text = OmegaConf.to_yaml(OmegaConf.create(resolved), resolve=True)
    path = SNAPSHOTS / f"{name}.yaml"
    if os.environ.get("DISTILL_UPDATE_SNAPSHOTS") == "1":
        path.write_text(text)
    assert path.read_text() == text
    header = (CONFIG_DIR / "experiment" / f"{name}.yaml").read_text()
    assert f"+experiment={name}" in header, "the header says how to run it"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_build_every_object(name: str, tmp_path: Path) -> None:
    csv = tmp_path / "x.csv"
    csv.write_text("text,label\na,0\nb,1\n")
    config = composed(f"+experiment={name}", *([f"data.path={csv}", "teacher.architecture.model=m"]
                                               if name == "bring_your_own" else []))  # fmt: skip
    HydraConfig.instance().set_config(config)
    for group in (*ROOMS, "sampling", "training"):
        if group in config and config[group] is not None:  # those of the other domain, or of the audit
            assert build(config[group], group) is not None


def test_identity_is_about_what_not_where(tmp_path: Path) -> None:
    base = composed("+experiment=quickstart")
    same = composed("+experiment=quickstart", "run.device=cpu", "run.workers=3", "tracker=trackio", "run.threads=1")
    assert run_id(base) == run_id(same)
    other_student = composed("+experiment=quickstart", "student=lenet")
    assert run_id(other_student) != run_id(base)
    assert query_id(other_student) == query_id(base)
    for change in ("seed=1", "budget.queries=7", "defense=none", "teacher.seed=3", "access.usd_per_query=0.1"):
        changed = composed("+experiment=quickstart", change)
        assert query_id(changed) != query_id(base), change
        assert run_id(changed) != run_id(base), change


def test_identity_takes_a_files_content_for_its_path(tmp_path: Path) -> None:
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    one.write_text("a,label\n1,0\n")
    two.write_text("a,label\n1,0\n")
    assert identity({"path": str(one)}) == identity({"path": str(two)})
    two.write_text("a,label\n2,0\n")
    assert identity({"path": str(one)}) != identity({"path": str(two)})
    assert identity({"path": "no/such/file"}) == {"path": "no/such/file"}


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ({"_target_": "distill.provider.defenses.rounding.Rounding", "digits": 1}, "Rounding has no option 'digits'"),
        ({"_target_": "distill.provider.defenses.rounding.Roundin"}, "Did you mean 'Rounding'?"),
        ({"_target_": "distill.provider.defenses.nothing.Nothing"}, "cannot import"),
        ({"_target_": "os.system", "command": "true"}, "DISTILL_ALLOW_TARGETS"),
        ({"_target_": "distill.data.local.Local", "path": "???"}, "defense.path"),
    ],
)
def test_build_says_what_is_wrong(node: dict[str, object], says: str) -> None:
    with pytest.raises(DistillError, match="defense") as error:
        build(node, "defense")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_targets_outside_of_distill_have_to_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"_target_": "collections.Counter"}
    with pytest.raises(DistillError):
        build(node, "defense")
    monkeypatch.setenv("DISTILL_ALLOW_TARGETS", "collections.")
    assert build(node, "defense") == {}
