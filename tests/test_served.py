"""Cells of a grid in one process: a provider is measured once, whatever students are compared with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_contracts import an_experiment

from distill.experiment import Experiment
from distill.query import query
from distill.records import InputSpec
from distill.students.lenet import LeNet


def asked(queries: Path, *overrides: str) -> Experiment:
    experiment = an_experiment(queries, "teacher.recipe.epochs=2", *overrides)
    query(experiment)
    return experiment


def test_students_share_what_was_measured_of_their_provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = asked(tmp_path / "q", "defense=modelguard_s")
    served = first.served()
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "_serve", lambda self: pytest.fail("it was measured before"))
        assert asked(tmp_path / "q", "defense=modelguard_s", "recovery=top1").served() is served
    # Of a defense that remembers, what it remembers counts; so do the seed of its noise, and what is measured.
    assert asked(tmp_path / "fewer", "defense=modelguard_s", "budget.queries=3").served() is not served
    less = asked(tmp_path / "q", "defense=modelguard_s", "metric=[accuracy]").served()
    assert set(less.judged["teacher"]) == {"accuracy"}
    noises = [asked(tmp_path / seed, "defense=gaussian_noise", f"seed={seed}").served() for seed in "01"]
    one, other = (noise.answers["defended_teacher"].posteriors for noise in noises)
    assert (one != other).any()


def test_a_result_is_the_same_whether_its_provider_was_measured_before(tmp_path: Path) -> None:
    experiment = asked(tmp_path / "q", "defense=gaussian_noise", "pool@outliers=noise")
    kept, anew = experiment.served(), experiment._serve()
    assert {"accuracy", "calibration"} <= set(kept.judged["teacher"])
    assert "ood_auroc" in kept.judged["defended_teacher"]["calibration"]
    assert kept.judged == anew.judged
    assert kept.utility.keys() == anew.utility.keys()
    assert kept.utility["l1_mean"] == anew.utility["l1_mean"] > 0


@pytest.mark.parametrize("shape", [(28, 28, 1), (9, 11, 3)])
def test_lenet_answers_the_same_with_and_without_a_gradient(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = LeNet().build(InputSpec("image", shape), 10).eval()
    images = (torch.rand(64, *shape) * 4).to(torch.uint8)  # few values: many ties
    with torch.inference_mode():
        quick = module(images)
    assert torch.equal(quick, module(images).detach())
