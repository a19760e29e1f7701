"""Which tokens of two vocabularies stand for the same bytes of a text."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from distill.heads import Head, Sparse

# --- bytes ----------------------------------------------------------------------------------------------------------


def _byte_characters() -> dict[str, int]:
    """How byte-level BPE writes bytes: printable Latin-1 characters for themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Boundaries:
    """Where the tokens of a tokenizer end in the UTF-8 bytes of a text.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special |= set(tokenizer.all_special_ids)
        decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
        self._byte_level = decoder.get("type") == "ByteLevel"
        self._known: dict[int, bytes] = {}

    def ends(self, ids: list[int], text: str) -> np.ndarray:
        """(n,) int64: the byte of the text after which each token ends, non-decreasing.

        Special tokens have no bytes, but one that ends the list ends one byte after the text, where that is whole.
        What follows the first byte in which the tokens and the text differ is -1.
        """
        n = len(ids)
        while n and ids[n - 1] in self._special:
            n -= 1
        body, content = ids[:n], text.encode(errors="replace")
        pieces = [self._bytes(token) for token in body]
        if b"".join(pieces) == content:
            ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
            whole = True
        elif self._byte_level:
            ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
            ends[ends > _common(b"".join(pieces), content)] = -1
            whole = False
        else:  # a token's text depends on its neighbours; one that ends within a character counts from its start
            prefixes = [body[: i + 1] for i in range(n)]
            told = self._tokenizer.batch_decode(prefixes, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            whole = told[-1:] == [text] or not (told or text)
            told = [prefix if prefix == text else prefix.rstrip("\ufffd") for prefix in told]
            same = [_common(prefix.encode(errors="replace"), content) for prefix in told]
            right = [a == len(b.encode(errors="replace")) for a, b in zip(same, told, strict=True)]
            ends = np.where(right, np.maximum.accumulate(np.array(same, dtype=np.int64)), -1).astype(np.int64)
        final = np.full(len(ids) - n, len(content) if whole else -1, dtype=np.int64)
        final[-1:] += whole
        return np.concatenate([ends, final])

    def _bytes(self, token: int) -> bytes:
        if token not in self._known:
            self._known[token] = b"" if token in self._special else self._piece(token)
        return self._known[token]

    def _piece(self, token: int) -> bytes:
        if not self._byte_level:
            return self._tokenizer.decode([token], clean_up_tokenization_spaces=False).encode(errors="replace")
        written = self._tokenizer.convert_ids_to_tokens(token) or ""
        if all(character in _BYTES for character in written):
            return bytes(_BYTES[character] for character in written)
        return written.encode()  # a token that was added as text


_BYTES = _byte_characters()


def _common(one: bytes, other: bytes) -> int:
    """How many first bytes are the same."""
    size = min(len(one), len(other))
    differ = np.frombuffer(one, np.uint8, size) != np.frombuffer(other, np.uint8, size)
    return int(differ.argmax()) if differ.any() else size


# --- chunks ---------------------------------------------------------------------------------------------------------


def chunks(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The chunk of each token on two sides, counted from 0; -1 behind the last one.

    A chunk ends where tokens of both sides end at the same byte; it is the shortest such stretch. A token without
    bytes, or the first part of a character, belongs to what follows it.

    Args:
        one: (n,) int64, as `Boundaries.ends` returns it.
        other: (m,) int64.

    Returns:
        (n,) and (m,) int64.
    """
    _, *lasts = np.intersect1d(one, other, return_indices=True)
    result = []
    for ends, last in zip((one, other), lasts, strict=True):
        # `intersect1d` returns the first token that ends there; those at byte 0 and -1 close nothing.
        last = last[ends[last] > 0]
        chunk = np.searchsorted(last, np.arange(len(ends)))
        result.append(np.where(chunk < len(last), chunk, -1))
    return result[0], result[1]


@dataclass(frozen=True)
class Aligned:
    """A teacher's answers in its own m tokens, beside the same answers in n tokens of a student.

    Args:
        tokens: (m,) int64, the teacher's.
        teacher: (m,) int64, the chunk of each; -1 for none.
        student: (n,) int64, the chunk of each of the student's tokens; -1 for none.
        pairs: (n,) int64: which teacher token has the same place in the same answer; -1 where that is shorter.
        logprobs: (m,) float32, what the teacher gave its tokens; None where the answers came without.
        signal: The teacher's distributions at its tokens; None where the answers are all that there is.
    """

    tokens: torch.Tensor
    teacher: torch.Tensor
    student: torch.Tensor
    pairs: torch.Tensor
    logprobs: torch.Tensor | None = None
    signal: Head | Sparse | None = None

    @classmethod
    def same(cls, tokens: torch.Tensor, signal: Head | Sparse) -> Aligned:
        """Both sides have the same tokens, (n,) int64."""
        each = torch.arange(len(tokens), device=tokens.device)
        return cls(tokens, each, each, each, signal=signal)

    def take(self, rows: torch.Tensor) -> Aligned:
        """The student's tokens at these rows (a mask), which cuts through no answer. The teacher's side is kept."""
        return replace(self, student=self.student[rows], pairs=self.pairs[rows])


class Alignment:
    """Answers in the tokens of two vocabularies.

    Args:
        theirs: n lists of the teacher's tokens.
        ours: n lists of the student's.
        texts: (n,) object array of `str`, what they stand for.
        teachers: The teacher's tokenizer.
        tokenizer: The student's.
    """

    def __init__(
        self, theirs: list[list[int]], ours: list[list[int]], texts: np.ndarray, teachers: Any, tokenizer: Any
    ) -> None:
        self.theirs = theirs
        of_teacher, of_student = Boundaries(teachers), Boundaries(tokenizer)
        self.chunks = [
            chunks(of_teacher.ends(a, text), of_student.ends(b, text))
            for a, b, text in zip(theirs, ours, texts.tolist(), strict=True)
        ]

    @cached_property
    def report(self) -> dict[str, float]:
        """Number of chunks, and which share of either side's tokens is in one."""
        sides = [np.concatenate([np.empty(0, np.int64), *side]) for side in zip(*self.chunks, strict=True)]
        counts = {"chunks": float(sum(pair[0].max(initial=-1) + 1 for pair in self.chunks))}
        shares = [float((side >= 0).mean()) if len(side) else 0.0 for side in sides]
        return counts | dict(zip(("teacher_share", "student_share"), shares, strict=True))

    def at(self, sequence: np.ndarray, token: np.ndarray) -> tuple[Aligned, np.ndarray, np.ndarray]:
        """The answers that n of the student's tokens are from. A chunk whose tokens are not all among them is left out.

        Args:
            sequence: (n,) int32, which answer.
            token: (n,) int32, which of its tokens, from 0.

        Returns:
            Them, and of each of the teacher's tokens the answer and which token of it it is: (m,) int64 both.
        """
        examples, which = np.unique(sequence, return_inverse=True)
        lengths = np.array([len(self.theirs[i]) for i in examples], dtype=np.int64)
        firsts, total, start = np.cumsum(lengths) - lengths, 0, []
        teacher, student = np.empty(lengths.sum(), np.int64), np.full(len(sequence), -1, np.int64)
        for place, example in enumerate(examples.tolist()):
            theirs, ours = self.chunks[example]
            here = which == place
            mine = ours[token[here]]
            count = int(ours.max(initial=-1)) + 1
            whole = np.bincount(mine[mine >= 0], minlength=count) == np.bincount(ours[ours >= 0], minlength=count)
            number = np.append(np.where(whole, np.arange(count) + total, -1), -1)  # the last one is that of -1
            teacher[firsts[place] : firsts[place] + lengths[place]] = number[theirs]
            student[here] = number[mine]
            total += count
            start.append(np.array(self.theirs[example], dtype=np.int64))
        pairs = np.where(token < lengths[which], firsts[which] + token, -1)
        tokens = np.concatenate([np.empty(0, np.int64), *start])
        aligned = Aligned(
            tokens=torch.from_numpy(tokens),
            teacher=torch.from_numpy(teacher),
            student=torch.from_numpy(student),
            pairs=torch.from_numpy(pairs),
        )
        return aligned, np.repeat(examples, lengths), np.arange(lengths.sum()) - np.repeat(firsts, lengths)
