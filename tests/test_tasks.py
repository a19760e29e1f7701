"""Tasks of the generation domain: what they ask, what their checkers find right, and who gets which prompts."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from assets import need
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_toys import chats

from distill.data.chat_local import ChatLocal
from distill.data.chats import last_number, number_in
from distill.data.plain_text import PlainText
from distill.data.reasoning_gym import ReasoningGym
from distill.data.straight_line import StraightLine, answer_right, steps_right
from distill.errors import DistillError, MissingAsset
from distill.language import Prompts, Task, texts


def parts(task: Task) -> list[Prompts]:
    return [task.train, task.held_out, task.test]


def small(**options: int) -> StraightLine:
    return StraightLine(**({"train_rows": 300, "held_out_rows": 100, "test_rows": 50} | options))


# --- straight-line programs -----------------------------------------------------------------------------------------


def test_the_written_out_steps_are_what_python_computes() -> None:
    lengths = set()
    for prompts in parts(small().load()):
        for row in range(len(prompts)):
            (message,) = prompts.messages(row)
            assert message["role"] == "user"
            *lines, question = message["content"].split(";")
            values: dict[str, int] = {}
            steps = ""
            for i, line in enumerate(lines):
                name, _, expression = line.partition("=")
                # Each variable uses the one before it, so that no line can be skipped.
                assert i == 0 or re.fullmatch(rf"{chr(96 + i)}[+-]([a-z]|\d)", expression)
                written = "".join(str(values.get(letter, letter)) for letter in expression)
                values[name] = eval(written) % 10
                steps += f"{name}={written};" if i == 0 else f"{name}={written}={values[name]};"
            assert question == f"{name}?"
            assert prompts.references[row] == f"{steps}.{values[name]}"
            lengths.add(len(lines))
    assert lengths == set(range(4, 10))


def test_no_two_programs_are_equal_and_fewer_are_a_prefix_of_more() -> None:
    task, larger = small().load(), small(train_rows=600).load()
    columns = np.concatenate([prompts.column for prompts in parts(task)])
    assert len(set(columns)) == len(columns) == 450
    assert larger.train.column[:300].tolist() == task.train.column.tolist()
    assert larger.held_out.fingerprint == task.held_out.fingerprint == small().load().held_out.fingerprint
    assert small(split_seed=1).load().test.fingerprint != task.test.fingerprint


def test_results_are_spread_over_the_digits() -> None:
    last = [answer[-1] for answer in small(train_rows=5_000).load().train.references]
    counts = np.unique(last, return_counts=True)[1]
    # A test of 10 equal chances: 27.9 is exceeded by chance once in a thousand; that 0 is likelier stays below 2 %.
    assert len(counts) == 10
    assert counts.max() < 0.12 * len(last)


def test_checkers_read_the_digit_after_the_last_dot_or_every_step() -> None:
    prompts = small().load().test.take([0])
    right = str(prompts.references[0])
    wrong_step = right.replace(";", "; ", 1)
    wrong = f"{right[:-1]}{(int(right[-1]) + 1) % 10}"
    judged = [(right, 1, 1), (f" {right}\n", 1, 1), (wrong_step, 1, 0), (f".{right[-1]}", 1, 0), (wrong, 0, 0),
              (right[-1], 0, 0), (right + "0", 0, 0), (right[:-1], 0, 0), ("", 0, 0)]  # fmt: skip
    for answer, digit, steps in judged:
        assert answer_right(prompts, texts([answer])).tolist() == [digit], answer
        assert steps_right(prompts, texts([answer])).tolist() == [steps], answer
    assert small().load().check is answer_right
    assert StraightLine(30, 10, 5, check_steps=True).load().check is steps_right


@given(st.integers(0, 10_000), st.text("abc=+-;.0123456789 ", max_size=20))
@settings(max_examples=50, deadline=None)
def test_a_checker_never_raises_and_gives_right_answers_one(seed: int, answer: str) -> None:
    prompts = StraightLine(1, 1, 3, split_seed=seed).load().test
    for check in (answer_right, steps_right):
        assert check(prompts, prompts.references).tolist() == [1, 1, 1]
        assert set(check(prompts, texts([answer] * 3)).tolist()) <= {0.0, 1.0}


def test_programs_that_do_not_exist_are_refused() -> None:
    with pytest.raises(DistillError, match="too many for their lengths"):
        StraightLine(1_000, 100, 100, min_assignments=2, max_assignments=2)
    for options in ({"test_rows": 0}, {"min_assignments": 1}, {"min_assignments": 5, "max_assignments": 4}):
        with pytest.raises(DistillError, match="must be"):
            StraightLine(**options)
    with pytest.raises(DistillError, match="can't be checked"):
        answer_right(Prompts.of_users(["hello"]), texts(["hello"]))


# --- reasoning-gym --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", ["chain_sum", "gsm_symbolic", "letter_counting"])
def test_reasoning_gym_scores_its_own_answers_as_right(generator: str) -> None:
    need(importlib.util.find_spec("reasoning_gym"), "pip install reasoning-gym")
    task = ReasoningGym(generator, train_rows=20, held_out_rows=10, test_rows=10).load()
    columns = np.concatenate([prompts.column for prompts in parts(task)])
    assert len(set(columns)) == len(columns) == 40
    for prompts in parts(task):
        assert task.check(prompts, prompts.references).tolist() == [1.0] * len(prompts)
        tagged = texts([f"Let me think: 0. <answer>{answer}</answer>" for answer in prompts.references])
        assert task.check(prompts, tagged).tolist() == [1.0] * len(prompts)
        assert (task.check(prompts, texts(["no idea"] * len(prompts))) < 0.1).all()
    assert task.test.fingerprint == ReasoningGym(generator, 20, 10, 10).load().test.fingerprint


def test_what_reasoning_gym_does_not_have_is_said() -> None:
    need(importlib.util.find_spec("reasoning_gym"), "pip install reasoning-gym")
    with pytest.raises(DistillError, match=r"data.generator: no generator 'chain_sun'. Did you mean 'chain_sum'\?"):
        ReasoningGym("chain_sun").load()
    with pytest.raises(DistillError, match=r"data.options: chain_sum refuses them \(.*nope"):
        ReasoningGym(options={"nope": 1}).load()
    tiny = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(DistillError, match=r"data.train_rows: chain_sum makes only"):
        ReasoningGym(train_rows=2_000, held_out_rows=5, test_rows=5, options=tiny).load()


def test_reasoning_gym_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingAsset, match="pip install reasoning-gym"):
        ReasoningGym().load()


# --- your own chats -------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def test_chats_are_shared_out_and_the_last_reply_is_the_reference(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"question {i}"},
                      {"role": "assistant", "content": f"Answer {i}"}]}
        for i in range(20)
    ]  # fmt: skip
    data = ChatLocal(jsonl(tmp_path / "chats.jsonl", rows), check="exact", test_share=0.25)
    task = data.load()
    assert (len(task.train), len(task.held_out), len(task.test)) == (0, 15, 5)
    asked = {prompts.messages(row)[1]["content"] for prompts in parts(task) for row in range(len(prompts))}
    assert asked == {f"question {i}" for i in range(20)}
    first = task.test.messages(0)
    assert [message["role"] for message in first] == ["system", "user"]
    assert task.test.references[0] == first[1]["content"].replace("question", "Answer")
    assert task.check(task.test, np.char.upper(task.test.references.astype(str)).astype(object)).all()
    assert not task.check(task.test, texts(["other"] * 5)).any()
    assert ChatLocal(str(tmp_path / "chats.jsonl"), test_rows=2, held_out_rows=3).load().held_out.column.size == 3


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_columns_of_texts_in_every_format(tmp_path: Path, kind: str) -> None:
    import datasets

    rows = datasets.Dataset.from_dict(
        {"question": [f"How many is {i}? – ü" for i in range(8)], "answer": [f"Well.\n#### {i},000" for i in range(8)]}
    )
    path = tmp_path / f"mine.{kind}"
    {"csv": rows.to_csv, "parquet": rows.to_parquet, "jsonl": rows.to_json}[kind](str(path))
    task = ChatLocal(str(path), reference_column="answer", check="last_number").load()
    assert len(task.held_out) + len(task.test) == 8
    number = re.search(r"\d", task.test.messages(0)[0]["content"]).group()
    assert task.test.references[0] == f"Well.\n#### {number},000"
    assert task.check(task.test.take([0]), texts([f"I say {number}000."])).tolist() == [1.0]
    assert task.check(task.test.take([0, 0]), texts([f"{number}001", "none"])).tolist() == [0.0, 0.0]


def test_a_prompt_of_the_test_is_none_that_an_attacker_holds(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i % 5}"} for i in range(50)]
    task = ChatLocal(jsonl(tmp_path / "a.jsonl", rows), test_share=0.06).load()
    assert not set(task.held_out.column) & set(task.test.column)


def test_a_folder_with_a_test_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    jsonl(folder / "train.jsonl", [{"prompt": f"t{i}"} for i in range(6)])
    jsonl(folder / "test.jsonl", [{"prompt": f"e{i}"} for i in range(3)])
    task = ChatLocal(str(folder), test_split="test").load()
    assert (len(task.held_out), len(task.test)) == (6, 3)
    with pytest.raises(DistillError, match=r"data.test_split: no split 'tset'. Did you mean 'test'\?"):
        ChatLocal(str(folder), test_split="tset").load()


BAD = {
    "missing column": ({"prompt_column": "promt"}, [{"prompt": "a"}], r"data.prompt_column: no column 'promt'. Did"),
    "unknown column": ({}, [{"words": "a"}], "data.prompt_column: which column holds the prompts"),
    "missing reference": ({"reference_column": "x"}, [{"prompt": "a"}], "data.reference_column: no column 'x'"),
    "empty": ({}, [{"prompt": "a"}, {"prompt": " "}], "data.prompt_column: a.jsonl, row 1: the prompt is empty"),
    "null": ({}, [{"prompt": "a"}, {"prompt": None}], "data.prompt_column: a.jsonl, row 1: a prompt is a text"),
    "role": ({}, [{"prompt": [{"role": "robot", "content": "a"}]}], "data.prompt_column: .* row 0: a message has"),
    "no question": ({}, [{"prompt": [{"role": "assistant", "content": "a"}]}], "row 0: a chat to be answered ends"),
    "null reference": (
        {"reference_column": "r"},
        [{"prompt": "a", "r": "b"}, {"prompt": "b", "r": None}],
        "data.reference_column: .* none in row 1",
    ),
    "one row": ({}, [{"prompt": "a"}], "data.path: 1 prompts for the attacker and 0 for the test"),
    "no reference": ({"check": "exact"}, [{"prompt": str(i)} for i in range(9)], "data.reference_column: there are no"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_one_line_that_names_the_key(tmp_path: Path, case: str) -> None:
    options, rows, message = BAD[case]
    with pytest.raises(DistillError, match=message) as caught:
        ChatLocal(jsonl(tmp_path / "a.jsonl", rows), **options).load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_files_that_are_not_utf_8_are_one_line(tmp_path: Path, kind: str) -> None:
    content = {"csv": "prompt\nnaïve\nplain\n", "jsonl": '{"prompt": "naïve"}\n{"prompt": "plain"}\n'}[kind]
    path = tmp_path / f"latin.{kind}"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DistillError, match=r"^data.path: .*utf-8") as caught:
        ChatLocal(str(path)).load()
    assert "\n" not in str(caught.value)


def test_nothing_stated_and_nothing_there() -> None:
    with pytest.raises(DistillError, match=r"data.path: state your prompts"):
        ChatLocal().load()
    with pytest.raises(MissingAsset, match=r"data.path: there is nothing at"):
        ChatLocal("nowhere.jsonl").load()
    with pytest.raises(DistillError, match=r"check has no 'exakt'. Did you mean 'exact'\?"):
        ChatLocal("x.jsonl", check="exakt")


def test_the_last_number_is_found_as_people_write_it() -> None:
    for text, number in {"so 1,234.5 is it.": 1234.5, "#### -7": -7, "3 + 4 = 7.": 7, "none": None, "$5": 5}.items():
        assert number_in(text) == number
    with pytest.raises(DistillError, match=r"data.reference_column"):
        last_number(Prompts.of_users(["a"]), texts(["1"]))
    assert last_number(chats(3), chats(3).references).all()


# --- plain text -----------------------------------------------------------------------------------------------------


def test_passages_are_cut_without_loss_and_shared_out(tmp_path: Path) -> None:
    text = "".join(f"word{i}{' ' if i % 7 else chr(10)}" for i in range(1_000))
    path = tmp_path / "text.txt"
    path.write_text(text)
    task = PlainText(str(path), prompt_words=5, answer_words=15).load()
    assert (len(task.held_out), len(task.test)) == (40, 10)
    assert not task.test.chat
    assert task.check is None
    pairs = [pair for prompts in parts(task)[1:] for pair in zip(prompts.column, prompts.references, strict=True)]
    assert all(len(start.split()) == 5 for start, _ in pairs)
    both = [start + rest for start, rest in pairs]
    assert all(passage in text for passage in both)
    both.sort(key=lambda passage: int(passage.split()[0][4:]))
    assert [passage.split() for passage in both] == [text.split()[i : i + 20] for i in range(0, 1_000, 20)]
    assert sorted(task.held_out_text) == sorted(
        start + rest for start, rest in zip(task.test.column, task.test.references, strict=True)
    )


def test_texts_that_can_not_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("naïve words".encode("latin-1"))
    with pytest.raises(DistillError, match=r"data.path: .* can't be read as UTF-8"):
        PlainText(str(path)).load()
    path.write_text("too short")
    with pytest.raises(DistillError, match=r"data.path: a text of 2 words has no passage of 128"):
        PlainText(str(path)).load()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingAsset, match=r"data.path: which text\? .* apt-get install bible-kjv"):
        PlainText().load()


def test_the_program_that_prints_the_bible_is_used_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bible"
    program.write_text('#!/bin/sh\n[ "$*" = "-f ge1:1-re22:21" ] && for i in 1 2 3 4; do echo "Ge1:$i In the $i"; done')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    task = PlainText(prompt_words=1, answer_words=2).load()
    assert {*task.test.column, *task.held_out.column} == {"In"}
    assert sorted([*task.test.references, *task.held_out.references]) == [f" the {i}" for i in range(1, 5)]


def test_the_king_james_bible_itself() -> None:
    import shutil

    need(shutil.which("bible"), "apt-get install bible-kjv")
    task = PlainText().load()
    assert (len(task.held_out), len(task.test)) == (4_935, 1_234)  # of 820,736 words, 31,102 of them verse numbers
