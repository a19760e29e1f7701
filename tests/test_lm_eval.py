"""lm-evaluation-harness as a metric: tasks on a local file, a tiny network, and numbers worked out without either."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.errors import DistillError
from distill.language import Evidence, Prompts, Sampling
from distill.metrics.lm_eval import LMEval
from distill.provider.teachers import tiny_cot
from distill.speaker import CausalLM

pytest.importorskip("lm_eval", reason="pip install lm-eval")

CONTEXT = 64
QUESTIONS = ["one and two", "cat", "a b c d", "is it so", "zebra", "seven", "why not", "nothing at all"]
CHOICES = ["yes", "nay", "hmm"]
NO_PROMPTS = Prompts.of_users([])

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
"""


@pytest.fixture(scope="module")
def speaker() -> CausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=97, num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.3, **sizes
    )
    characters = Prompts.of_users(["".join(map(chr, range(32, 124)))], references=np.array(["|"], dtype=object))
    made = CausalLM(batch_size=4)
    made.hold(LlamaForCausalLM(config), tiny_cot._characters(characters))
    return made


def ids(speaker: CausalLM, text: str) -> list[int]:
    return speaker.tokenizer(text, add_special_tokens=False).input_ids


@torch.no_grad()
def logprobs_by_hand(speaker: CausalLM, before: list[int], after: list[int]) -> torch.Tensor:
    """(len(after), vocabulary), from transformers alone."""
    logits = speaker.network(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return logits.double().log_softmax(dim=1)


def nats_by_hand(speaker: CausalLM, before: list[int], after: list[int]) -> float:
    logprobs = logprobs_by_hand(speaker, before, after)
    return float(sum(row[token] for row, token in zip(logprobs, after, strict=True)))


def favourite(speaker: CausalLM, text: str, space: str = " ") -> int:
    """The choice that multiple-choice scoring takes."""
    nats = [nats_by_hand(speaker, ids(speaker, text), ids(speaker, space + choice)) for choice in CHOICES]
    return int(np.argmax(nats))


def written(folder: Path, name: str, rows: list[dict[str, Any]], **fields: str) -> str:
    """A task yaml with its data. Returns the folder."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file, **({"more": ""} | fields)))
    return str(folder)


def evidence(**speakers: Any) -> Evidence:
    return Evidence(NO_PROMPTS, Sampling(), {}, None, None, speakers)


def choices_task(folder: Path, rows: list[dict[str, Any]]) -> str:
    more = f"doc_to_choice: {json.dumps(CHOICES)}\nmetric_list: [{{metric: acc}}]"
    return written(folder, "toy_choice", rows, kind="multiple_choice", text="{{q}}", target="{{gold}}", more=more)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=some) for some in arguments]


def test_loglikelihoods_are_sums_of_log_softmax(speaker: CausalLM) -> None:
    from distill.metrics._harness import Harness

    pairs = [("one and two", " is"), ("a", "b"), ("", "cat"), ("q" * 80, " no"), ("trailing ", "space")]
    found = Harness(speaker).loglikelihood(requests(*pairs), disable_tqdm=True)
    start = [Harness(speaker).prefix_token_id]
    by_hand = [
        (ids(speaker, "one and two"), ids(speaker, " is")),
        (ids(speaker, "a"), ids(speaker, "b")),
        (start, ids(speaker, "cat")),
        (ids(speaker, "q" * (CONTEXT - 3)), ids(speaker, " no")),
        (ids(speaker, "trailing"), ids(speaker, " space")),
    ]
    for (nats, greedy), (before, after) in zip(found, by_hand, strict=True):
        assert nats == pytest.approx(nats_by_hand(speaker, before, after), abs=1e-4)
        assert greedy == (logprobs_by_hand(speaker, before, after).argmax(dim=1).tolist() == after)
    best = int(logprobs_by_hand(speaker, ids(speaker, "a"), [0])[0].argmax())
    ((nats, greedy),) = Harness(speaker)._loglikelihood_tokens([(("", ""), ids(speaker, "a"), [best])])
    assert greedy
    assert nats == pytest.approx(nats_by_hand(speaker, ids(speaker, "a"), [best]), abs=1e-4)


def test_a_long_text_is_read_in_windows_and_every_token_counts_once(speaker: CausalLM) -> None:
    from distill.metrics._harness import Harness

    text = "the cat sat on the mat and " * 6
    tokens = ids(speaker, text)
    assert len(tokens) > 2 * CONTEXT
    (found,) = Harness(speaker).loglikelihood_rolling(requests((text,)))
    window, by_hand = CONTEXT - 1, 0.0
    start = [Harness(speaker).prefix_token_id]
    by_hand += nats_by_hand(speaker, start, tokens[:window])
    for first in range(window, len(tokens), window):
        part = tokens[first : first + window]
        end = first + len(part)
        before = tokens[max(0, end - window - 1) : first]
        by_hand += nats_by_hand(speaker, before, part)
    assert found == pytest.approx(by_hand, abs=1e-3)


def test_multiple_choice_accuracy_is_the_share_worked_out_by_hand(speaker: CausalLM, tmp_path: Path) -> None:
    """Five gold answers are the network's own, three are not."""
    golds = [(favourite(speaker, q) + (i >= 5)) % len(CHOICES) for i, q in enumerate(QUESTIONS)]
    folder = choices_task(tmp_path, [{"q": q, "gold": gold} for q, gold in zip(QUESTIONS, golds, strict=True)])
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    metric = LMEval([folder])
    numbers = metric.judge(evidence(student=speaker), "student")
    assert numbers["lm_eval/toy_choice/acc"] == 5 / 8
    assert numbers["lm_eval/toy_choice/n"] == 8
    assert numbers["lm_eval/toy_choice/acc_stderr"] == pytest.approx(math.sqrt(5 / 8 * 3 / 8 / 7))
    assert set(numbers) == {f"lm_eval/toy_choice/{name}" for name in ("acc", "acc_stderr", "n")}
    assert metric.judge(evidence(student=speaker), "teacher") == {}, "not at hand"
    assert np.random.get_state()[1].tolist() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    first_six = LMEval([folder], limit=6).judge(evidence(student=speaker), "student")
    assert first_six["lm_eval/toy_choice/acc"] == 5 / 6


def test_answers_are_those_of_greedy_decoding_up_to_the_stop_text(speaker: CausalLM, tmp_path: Path) -> None:
    rows = []
    for i, question in enumerate(QUESTIONS[:4]):
        tokens = torch.tensor([ids(speaker, question)])
        whole = speaker.network.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        answer = speaker.tokenizer.decode(whole[0, tokens.shape[1] :], skip_special_tokens=True)
        rows.append({"q": question, "a": answer if i < 3 else answer + "!"})
    more = "generation_kwargs: {until: [], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]"
    folder = written(tmp_path, "toy_answer", rows, kind="generate_until", text="{{q}}", target="{{a}}", more=more)
    numbers = LMEval([folder]).judge(evidence(teacher=speaker), "teacher")
    assert numbers["lm_eval/toy_answer/exact_match"] == 3 / 4

    from distill.metrics._harness import Harness

    answer = rows[0]["a"]
    stop = answer[3:5]
    options = {"until": [stop], "max_gen_toks": 12}
    cut, long = Harness(speaker).generate_until(requests((QUESTIONS[0], options), ("q" * 200 + "cat", options)))
    assert cut == answer[: answer.index(stop)]
    (same,) = Harness(speaker).generate_until(requests((("q" * 200 + "cat")[-(CONTEXT - 12) :], options)))
    assert long == same, "a prompt that is too long loses its beginning"


def test_chats_are_put_through_the_models_template(speaker: CausalLM, tmp_path: Path) -> None:
    """The template changes what is favoured, and the accuracy is that of the templated prompts."""
    templated = [
        speaker.tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False
        )
        for q in QUESTIONS
    ]
    # Behind a generation prompt the harness puts no space before a choice.
    golds = [favourite(speaker, text, space="") for text in templated]
    assert golds != [favourite(speaker, q) for q in QUESTIONS]
    folder = choices_task(tmp_path, [{"q": q, "gold": gold} for q, gold in zip(QUESTIONS, golds, strict=True)])
    numbers = LMEval([folder], apply_chat_template=True).judge(evidence(student=speaker), "student")
    assert numbers["lm_eval/toy_choice/acc"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "list of tasks"),
        ({"tasks": "arc_easy"}, "list of tasks"),
        ({"tasks": ["arc_easy"], "limit": 0}, "at least 1"),
        ({"tasks": ["arc_easy"], "num_fewshot": -1}, "at least 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        LMEval(**options)


def test_what_is_not_there_is_told_when_the_metric_is_built(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="arc_easy"):
        LMEval(["arc_eazy"])
    with pytest.raises(DistillError, match="no yaml"):
        LMEval([str(tmp_path)])
    folder = choices_task(tmp_path, [{"q": "a", "gold": 0}])
    (tmp_path / "toy_choice.jsonl").unlink()
    with pytest.raises(DistillError, match="can't be loaded"):
        LMEval([folder])


def test_answers_longer_than_the_context_are_refused(speaker: CausalLM) -> None:
    from distill.metrics._harness import Harness

    with pytest.raises(DistillError, match="max_gen_toks"):
        Harness(speaker).generate_until(requests(("cat", {"until": ["."], "max_gen_toks": CONTEXT})))
    with pytest.raises(DistillError, match="leave the task out"):
        Harness(speaker).loglikelihood(requests(("cat", "x" * CONTEXT)), disable_tqdm=True)
