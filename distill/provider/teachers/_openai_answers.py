"""What an OpenAI-compatible API answers, turned into completions."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from distill.errors import BadAnswer
from distill.language import Completions, texts

_ID = re.compile(r"token_id:(\d+)")  # how vLLM names tokens with return_tokens_as_token_ids
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how vocabularies of SentencePiece name bytes


class TokenNames:
    """The ids of tokens that an API names by their text: -1 where that is no token of the vocabulary, or none is known.

    A text can be the name of several tokens: some servers drop the space before a word of SentencePiece, or write "�"
    for bytes that are no characters. Ids that the server tells itself (llama.cpp's ``id``, vLLM's ``token_id:5``) and
    ``bytes`` go before the text.

    Args:
        tokenizer: A fast Hugging Face tokenizer, or None.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._ids: dict[bytes, int] = {}
        self._tokenizer = tokenizer
        if tokenizer is None:
            return
        pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        byte_level = _byte_level(tokenizer)
        for piece, number in pieces:
            self._ids.setdefault(_piece_bytes(piece, byte_level), number)

    def number(self, entry: Mapping[str, Any]) -> int:
        """The id of the token of one entry of the log-probabilities."""
        if isinstance(entry.get("id"), int):
            return entry["id"]
        if told := _ID.fullmatch(entry["token"]):
            return int(told[1])
        return self._ids.get(_content(entry), -1)

    def filled(self, numbers: np.ndarray, text: str) -> np.ndarray:
        """The ids of an answer, with those that its text has in the places of -1, where it agrees with all the others.

        Several tokens of one character have no text of their own.
        """
        if self._tokenizer is None or (numbers >= 0).all():
            return numbers
        whole = np.array(self._tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int32)
        agrees = len(whole) == len(numbers) and ((numbers < 0) | (numbers == whole)).all()
        return whole if agrees else numbers


def read(
    answer: Any, *, chat: bool, top_k: int, stop: Sequence[str], longest: tuple[int, int], names: TokenNames
) -> Completions:
    """The one completion of an answer.

    Args:
        answer: The JSON of a (chat) completion.
        chat: Which of the two.
        top_k: How many log-probabilities were asked for; a position that has fewer is padded.
        stop: Texts that end an answer, for servers that leave them in.
        longest: Tokens of prompt and answer at their most, which count where the answer states no usage.
        names: Finds the ids of tokens.

    Raises:
        BadAnswer: It is no completion, or its log-probabilities are none.
    """
    try:
        choice = answer["choices"][0]
        if chat:
            message = choice["message"]
            text = message.get("content") or message.get("refusal") or ""
        else:
            text = choice["text"]
        finish = choice.get("finish_reason") or "stop"
        if not isinstance(text, str) or not isinstance(finish, str):
            raise TypeError
        usage = answer.get("usage") or dict(zip(("prompt_tokens", "completion_tokens"), longest, strict=True))
        spent = [np.array([int(usage[name])], dtype=np.int64) for name in ("prompt_tokens", "completion_tokens")]
        if min(spent) < 0:
            raise ValueError("a negative number of tokens")
        entries = _entries(choice.get("logprobs")) if top_k else None
        cuts = [at for end in stop if (at := text.find(end)) >= 0]
        if cuts:
            text, finish = text[: min(cuts)], "stop"
            entries = entries and _before(entries, len(text.encode("utf-8", "surrogatepass")))
        tokens = {} if entries is None else _columns(entries, top_k, names, text)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BadAnswer(f"it is no completion ({type(error).__name__}: {error})".replace(": )", ")")) from None
    return Completions(texts([text]), texts([finish]), *spent, **tokens)


def with_end(answer: Completions, end: int, special: Collection[int]) -> Completions:
    """One answer that ended, with the token that ended it, which some APIs leave out: as certain, as no more is told.

    Args:
        answer: The answer; unchanged where it tells no tokens or ends with one of `special`.
        end: The token that ends an answer.
        special: The tokens that are no text.
    """
    tokens, logprobs, ids, values = answer.token_ids, answer.logprobs, answer.top_ids, answer.top_logprobs
    if tokens is None or logprobs is None or ids is None or values is None or (len(tokens) and tokens[-1] in special):
        return answer
    alone = np.full((1, answer.top_k), -1, np.int32), np.full((1, answer.top_k), -np.inf, np.float32)
    alone[0][0, 0], alone[1][0, 0] = end, 0.0
    return replace(
        answer,
        offsets=np.array([0, len(tokens) + 1], dtype=np.int64),
        token_ids=np.append(tokens, np.int32(end)),
        logprobs=np.append(logprobs, np.float32(0)),
        top_ids=np.concatenate([ids, alone[0]]),
        top_logprobs=np.concatenate([values, alone[1]]),
    )


def _entries(told: Any) -> list[dict[str, Any]] | None:
    """The log-probabilities as chats have them, ``[{"token", "logprob", "top_logprobs"}, …]``; None where not told."""
    if not told:
        return None
    if "content" in told:  # chats; and llama.cpp for plain text too
        return told["content"]
    tops = told.get("top_logprobs") or [None] * len(told["tokens"])
    return [
        {"token": token, "logprob": value, "top_logprobs": [{"token": t, "logprob": v} for t, v in (top or {}).items()]}
        for token, value, top in zip(told["tokens"], told["token_logprobs"], tops, strict=True)
    ]


def _before(entries: list[dict[str, Any]], end: int) -> list[dict[str, Any]]:
    """The tokens that begin before byte `end` of the answer."""
    lengths = [len(_content(entry)) for entry in entries]
    return [entry for entry, start in zip(entries, np.cumsum([0, *lengths[:-1]]), strict=True) if start < end]


def _columns(entries: Sequence[Mapping[str, Any]], top_k: int, names: TokenNames, text: str) -> dict[str, np.ndarray]:
    """The columns of tokens of one answer."""
    top_ids = np.full((len(entries), top_k), -1, dtype=np.int32)
    top_logprobs = np.full((len(entries), top_k), -np.inf, dtype=np.float32)
    for position, entry in enumerate(entries):
        ranked = sorted(entry.get("top_logprobs") or [], key=lambda other: -_logprob(other))[:top_k]
        top_ids[position, : len(ranked)] = [names.number(other) for other in ranked]
        top_logprobs[position, : len(ranked)] = [_logprob(other) for other in ranked]
    return {
        "offsets": np.array([0, len(entries)], dtype=np.int64),
        "token_ids": names.filled(np.array([names.number(entry) for entry in entries], dtype=np.int32), text),
        "logprobs": np.array([_logprob(entry) for entry in entries], dtype=np.float32),
        "top_ids": top_ids,
        "top_logprobs": top_logprobs,
    }


def _logprob(entry: Mapping[str, Any]) -> float:
    value = -math.inf if entry["logprob"] is None else float(entry["logprob"])  # JSON has no infinity
    if not value <= 1e-3:
        raise ValueError(f"{value} is no log-probability")
    return value


def _content(entry: Mapping[str, Any]) -> bytes:
    """The bytes that a token stands for."""
    told = entry.get("bytes")
    return bytes(told) if told else entry["token"].encode("utf-8", "surrogatepass")


def _piece_bytes(piece: str, byte_level: dict[str, int] | None) -> bytes:
    """The bytes that an entry of a vocabulary stands for."""
    if byte_level is not None:
        known = [byte_level.get(character) for character in piece]
        return bytes(b for b in known if b is not None) if None not in known else piece.encode()
    if byte := _BYTE.fullmatch(piece):
        return bytes.fromhex(byte[1])
    return piece.replace("▁", " ").encode()


def _byte_level(tokenizer: Any) -> dict[str, int] | None:
    """GPT-2's alphabet, which writes each byte as a printable character, where the vocabulary is written in it.

    A byte that is printable in Latin-1 (and no blank) stands for itself, the others are U+0100 on in their order.
    """
    if "ByteLevel" not in str(tokenizer.backend_tokenizer.decoder):
        return None
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
