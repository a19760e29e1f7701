"""Plain text, cut into passages."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np

from distill.data import assets
from distill.errors import DistillError, MissingAsset
from distill.language import Prompts, texts

WORD = re.compile(r"\S+\s*")
BIBLE = ("bible", "-f", "ge1:1-re22:21")  # one verse a line, each with its place in front


def read_passages(path: str | None, words: int, key: str) -> np.ndarray:
    """(n,) object array of `str`: the text in passages of so many words each, in order, without what is left over.

    Args:
        path: A file of UTF-8 text; None: the King James Bible of Debian's bible-kjv.
        words: Length of a passage; white space inside stays as it is.
        key: The config key of `path`, for messages.

    Raises:
        MissingAsset: There is no such file, or no bible-kjv.
        DistillError: It is not UTF-8, or shorter than one passage.
    """
    if path is None:
        text = _king_james(key)
    else:
        file = assets.find("a plain text", root=path, key=key)
        assert isinstance(file, Path)  # a stated path is used or refused
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DistillError(f"{file} can't be read as UTF-8 text ({error})", key) from error
    found = WORD.findall(text)
    passages = ["".join(found[start : start + words]).rstrip() for start in range(0, len(found) - words + 1, words)]
    if not passages:
        raise DistillError(f"a text of {len(found)} words has no passage of {words}; bring a longer one", key)
    return texts(passages)


def beginnings(passages: np.ndarray, words: int, name: str) -> Prompts:
    """Plain texts to be continued: the first words of each passage. All that follows them is the reference."""
    starts = [passage[: list(WORD.finditer(passage))[words].start()].rstrip() for passage in passages]
    rests = [passage[len(start) :] for passage, start in zip(passages, starts, strict=True)]
    return Prompts(texts(starts), chat=False, references=texts(rests), name=name)


def _king_james(key: str) -> str:
    program = shutil.which(BIBLE[0])
    if program is None:
        raise MissingAsset(f"which text? Set {key}=…, or install one: apt-get install bible-kjv", key)
    try:
        found = subprocess.run([program, *BIBLE[1:]], capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError, UnicodeDecodeError) as error:
        raise MissingAsset(f"the program bible can't be used ({error}); set {key}=…", key) from error
    return "\n".join(line.partition(" ")[2] for line in found.stdout.splitlines())
