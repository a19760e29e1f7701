"""The command line: help without torch, and one line for everything that a user can get wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from commands import complaint, distill, refused

from distill.attacks.knockoff_random import KnockoffRandom
from distill.config import CONFIG_DIR
from distill.records import Reveals


def test_help_lists_every_option_and_loads_no_torch() -> None:
    for module in ("train", "query", "report", "evaluate", "audit", "benchmark"):
        code = (
            f"import sys; sys.argv = ['x', '--help']\nfrom distill.{module} import main\n"
            "try:\n    main()\nexcept SystemExit:\n    pass\n"
            "heavy = {'torch', 'transformers', 'datasets', 'wandb', 'sklearn'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if module in ("train", "query"):
            for path in CONFIG_DIR.glob("*/*.yaml"):
                if path.parent.name not in ("hydra", "accelerate", "benchmark"):
                    assert f"\n  {path.stem} " in done.stdout, path
        if module == "benchmark":
            for path in [*CONFIG_DIR.glob("benchmark/*.yaml"), *CONFIG_DIR.glob("launch/*.yaml")]:
                assert f"\n  {path.stem} " in done.stdout, path
        assert f"distill.{module}" in done.stdout


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, distill, distill.report, distill.contracts, distill.records; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


BAD = {
    "+budgett=5": "budgett: no such key. Did you mean 'budget'?",
    "budgett=5": "budgett: no such key. Did you mean 'budget'?",
    "budget.queries=0": "budget.queries: must be at least 1, not 0",
    "budget.queries=-3": "budget.queries: must be at least 1, not -3",
    "budget.usd=0": "budget.usd: must be more than 0",
    "budget.queries=many": "budget.queries: Value 'many' of type 'str' could not be converted to Integer",
    "budget.querys=5": "budget.querys: no such key",
    "defense=roundin": "defense: no option 'roundin'. Did you mean 'rounding'?",
    "+experiment=quickstrat": "experiment: no option 'quickstrat'. Did you mean 'quickstart'?",
    "defense.decimal=1": "decimal",
    "+defense.digits=1": "defense: Rounding has no option 'digits'; it takes decimals",
    "defense=top_k defense.k=11": "defense.k: 11 is more than the 10 classes",
    "access=top_k access.top_k=11": "access.top_k: 11 is more than the 10 classes",
    "objective=kl access=label": "objective: kl requires probs",
    "objective=logit_mse defense=label_only": "compatible: hard_cross_entropy, soft_cross_entropy",
    "run.device=cuda:9": "run.device: there is no device 'cuda:9' here",
    "run.device=gpu": "run.device: there is no device 'gpu' here",
    "training.epochs=0": "training.epochs: is at least 1, not 0",
    "training.lr=fast": "lr",
    "precision=int8": "precision: is no, bf16 or fp16",
    "data=local data.path=nowhere.csv": "data.path",
    "data=local": "data.path: Local needs it; set data.path=",
    "data.victim_share=1.0": "data.victim_share",
    "data.victim_share=0": "data.victim_share",
    "student=text_encoder": "student",
    "pool=random_words": "pool",
    "curve=[1.5]": "curve: shares of the budget between 0 and 1",
    "seed=x": "seed: Value 'x'",
    "hydra.run.dir=/dev/null/x": "hydra.run.dir: cannot write to",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = [] if "+experiment" in words else ["+experiment=quickstart"]
    assert BAD[words] in refused([*first, *words.split()], tmp_path, monkeypatch, capsys)
    assert not list(tmp_path.rglob("provider_log/*")), "nothing was asked"


@pytest.mark.parametrize("words", ["+budgett=5", "budget.queries=0", "run.device=cuda:9", "defense=roundin"])
def test_bad_input_is_one_line_for_the_command_too(words: str, tmp_path: Path) -> None:
    done = distill("train", "+experiment=quickstart", words, cwd=tmp_path, check=False, fresh=True)
    assert done.returncode == 2, done.stdout + done.stderr
    assert BAD[words] in complaint(done.stderr)
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_an_attack_that_needs_more_than_the_interface_reveals_is_told_before_any_query(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(KnockoffRandom, "requires", Reveals.PROBS)
    line = refused(["+experiment=quickstart", "defense=label_only"], tmp_path, monkeypatch, capsys)
    assert "attack: knockoff_random requires probs, but defense=label_only behind access=probs reveals label" in line
    assert "compatible: " in line
    assert "ground_truth_labels" in line
    assert not list(tmp_path.rglob("provider_log/*"))


def test_the_traceback_is_there_when_asked_for(tmp_path: Path) -> None:
    done = distill(
        "train", "+experiment=quickstart", "budget.queries=0", cwd=tmp_path, check=False, env={"DISTILL_TRACEBACK": "1"}
    )
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "budget.queries" in done.stderr


def test_reports_and_evaluations_of_nothing_say_so(tmp_path: Path) -> None:
    for module, words in (("report", ["outputs"]), ("evaluate", ["outputs/none"])):
        done = distill(module, *words, cwd=tmp_path, check=False)
        assert done.returncode == 2
        assert "error: " in done.stderr
