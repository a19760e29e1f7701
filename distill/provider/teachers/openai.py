from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from distill.errors import BadAnswer, DistillError, MissingAsset, nearest
from distill.language import Completions, Prompts, Sampling, Task
from distill.packing import end_of_answer
from distill.provider.teachers._openai_answers import TokenNames, read, with_end
from distill.provider.teachers._purse import Purse
from distill.provider.teachers._remote import (
    address,
    excerpt,
    is_loopback,
    is_passing,
    key_from,
    pause_s,
    retry_after_s,
    write_note,
)
from distill.randomness import derive

if TYPE_CHECKING:
    from distill.training import Trainer

log = logging.getLogger(__name__)

FIRST_WAIT_S = 0.5  # before the second attempt; doubled before each further one
ROUNDS = 8  # requests that `generate` is best handed, in units of `concurrency`: answers differ in length
TEMPLATE_TOKENS = 32  # what a chat template adds at most to a chat (a default system prompt included) …
MESSAGE_TOKENS = 8  # … and to each of its messages, where no tokenizer tells
SERVED = ("model", "system_fingerprint")  # what an answer says about who gave it
LIMIT = re.compile(r"(?:max\w*(?: allowed)?|less than or equal to|at most|<=)\D{0,12}(\d+)", re.IGNORECASE)


class OpenAI:
    """A language model behind an OpenAI-compatible API: vLLM, SGLang, llama.cpp, ``transformers serve``, a vendor's.

    Chats go to ``POST url/chat/completions`` and plain text to ``POST url/completions``, one answer a request, through
    the `openai` client (``pip install 'distill-framework[text]'``). A drawn answer is asked for with a seed made from
    (sampling.seed, prompt, repeat); whether the server heeds it is the server's affair. (``transformers serve`` draws
    only where the model's generation_config.json says ``do_sample``, or else with ``extra_body={generation_config:
    '{"do_sample": true, "eos_token_id": …}'}``, and heeds a seed at ``concurrency=1`` only.)

    Status 408, 429 and 5xx, cut connections, timeouts and bodies that are no JSON are tried again, after the time that
    ``Retry-After`` asks for or else an exponential, jittered wait. A well-formed answer of the wrong shape is not: the
    same question would be billed again for it. Each request carries an ``Idempotency-Key`` made from its content.
    Answers are noted on disk the moment they arrive. Where one request fails for good, those under way are finished and
    noted, the rest is not sent, and the failure is raised; the same requests, made again in any process, are answered
    from the notes first. Notes are dropped when the call after the one that returned them begins.

    Log-probabilities are what the API says they are (vLLM: ask the server for ``--logprobs-mode raw_logprobs`` or
    ``processed_logprobs``). Some APIs (llama-cpp-python, for one) leave out the end-of-answer token. With a `tokenizer`
    it is put back, as a position that lists this token alone, as certain: that it was drawn is all that is known of it.

    An API can't prove which weights answer. The `model` and `system_fingerprint` of the first answer are kept with the
    cache, and an answer of another one is an error, in this run or a later one.

    Args:
        url: The base of the API, such as ``http://127.0.0.1:8000/v1``. No user name or password in it.
        model: The name of the model, one that ``GET url/models`` lists (an API without such a list is believed).
        authorized: Your statement that the terms of the endpoint allow querying it to train another model. Needed for
            every address that is not this machine's own (``localhost``, 127.0.0.0/8, ::1).
        api_key_env: Name of the environment variable that holds the key, sent as ``Authorization: Bearer``. The key
            itself is neither logged nor stored. No other variable is read for one.
        version: Anything that names the version of the remote weights: when you know that they changed, change this,
            and stored answers of another version are not reused.
        same_system: Whether another `system_fingerprint` is another teacher. False for an API that spreads its load
            over systems that differ; another `model` is an error all the same.
        tokenizer: Hub id or folder of the model's tokenizer. With it tokens have ids, prompts are counted exactly and
            students may use its vocabulary.
        usd_per_mtok_in: What a million prompt tokens cost you.
        usd_per_mtok_out: What a million answer tokens cost you.
        max_usd: Most that is ever spent on this model at this address, by all runs with the same cache. The longest
            answer is reserved before each attempt; an attempt that may have been billed although no answer arrived
            (a timeout, a cut connection, a broken body) counts as if it had been.
        top_k: Most log-probabilities that the API tells at each position; 0 where it tells none.
        context_tokens: Longest prompt and answer together. Left out, it is what the server states
            (``max_model_len``), or unknown.
        max_tokens_field: What the API calls the bound on a chat's answer: newer commercial models take
            ``max_completion_tokens`` alone.
        extra_body: Sent along with each request, such as ``{chat_template_kwargs: {enable_thinking: false}}``.
        concurrency: Requests under way at once.
        timeout_s: Longest time of one attempt.
        max_attempts: Attempts at one request before giving up.

    Raises:
        DistillError: A bad option, no `authorized`, a missing key or client, a model that is not served, a refusal by
            the server, no answer in time, another model than before, or `max_usd` reached.
        BadAnswer: The endpoint answered something that is no completion.
    """

    remote: ClassVar[bool] = True
    parameters: ClassVar[None] = None
    flops_per_token: ClassVar[None] = None

    def __init__(
        self,
        url: str,
        model: str,
        authorized: bool = False,
        api_key_env: str | None = None,
        version: str | None = None,
        same_system: bool = True,
        tokenizer: str | None = None,
        usd_per_mtok_in: float = 0.0,
        usd_per_mtok_out: float = 0.0,
        max_usd: float | None = None,
        top_k: int = 20,
        context_tokens: int | None = None,
        max_tokens_field: str = "max_tokens",
        extra_body: Mapping[str, Any] | None = None,
        concurrency: int = 8,
        timeout_s: float = 120.0,
        max_attempts: int = 6,
    ) -> None:
        for name, price in {"usd_per_mtok_in": usd_per_mtok_in, "usd_per_mtok_out": usd_per_mtok_out}.items():
            if not 0 <= price < float("inf"):
                raise DistillError(f"must be at least 0, not {price}", f"teacher.{name}")
        if max_usd is not None and not 0 < max_usd < float("inf"):
            raise DistillError(f"must be more than 0, not {max_usd}", "teacher.max_usd")
        if max_usd is not None and not (usd_per_mtok_in or usd_per_mtok_out):
            raise DistillError(
                "answers are free, so it bounds nothing; set teacher.usd_per_mtok_in and teacher.usd_per_mtok_out",
                "teacher.max_usd",
            )
        if top_k < 0:
            raise DistillError(f"must be at least 0, not {top_k}", "teacher.top_k")
        fields = ("max_tokens", "max_completion_tokens")
        if max_tokens_field not in fields:
            raise DistillError(
                f"no field '{max_tokens_field}'.{nearest(max_tokens_field, fields)}", "teacher.max_tokens_field"
            )
        for name, value in {"concurrency": concurrency, "max_attempts": max_attempts}.items():
            if value < 1:
                raise DistillError(f"must be at least 1, not {value}", f"teacher.{name}")
        if not timeout_s > 0:
            raise DistillError(f"must be more than 0, not {timeout_s}", "teacher.timeout_s")
        parts = address(url, authorized)
        self._own = is_loopback(parts.hostname or "")
        self._where = f"{parts.scheme}://{parts.netloc}{parts.path}"  # for messages: a query string may hold secrets
        self.url, self.model, self.version, self.same_system = url, model, version, same_system
        self.usd_per_mtok_in, self.usd_per_mtok_out = usd_per_mtok_in, usd_per_mtok_out
        self.top_k, self.context_tokens = top_k, context_tokens
        self.concurrency, self.timeout_s, self.max_attempts = concurrency, timeout_s, max_attempts
        self.requests_at_once = ROUNDS * concurrency
        self.tokenizer: Any = None
        self.fingerprint = ""  # known once the server has said what it serves
        self._tokenizer = tokenizer
        self._prices = [Fraction(str(price)) / 1_000_000 for price in (usd_per_mtok_in, usd_per_mtok_out)]
        self._max_usd = None if max_usd is None else Fraction(str(max_usd))
        self._max_tokens_field = max_tokens_field
        self._extra_body = dict(extra_body or {})
        self._api_key_env = api_key_env
        self._api_key = ""
        self._jitter = random.Random()  # of its own: waits must not disturb anybody's random stream

    def prepare(self, task: Task, trainer: Trainer, cache: Path) -> None:
        """Read the key, load the tokenizer, and ask what is served, which costs nothing.

        Raises:
            DistillError: The client or the key is missing, the server can't be reached, or the model is not there.
            MissingAsset: The tokenizer is neither a folder nor in reach.
        """
        try:
            import openai  # noqa: F401
        except ImportError:
            raise DistillError(
                "teacher=openai needs the client: pip install 'distill-framework[text]'", "teacher"
            ) from None
        self._api_key = key_from(self._api_key_env)
        if self._tokenizer is not None:
            self.tokenizer = load_tokenizer(self._tokenizer)
        self._names = TokenNames(self.tokenizer)
        stated = self._in_a_loop(self._ask_models)
        if self.context_tokens is None:
            self.context_tokens = stated.get("max_model_len")
        told = {name: stated.get(name) for name in ("root", "meta")}  # vLLM's path of the weights; llama.cpp's sizes
        facts = ["openai", self.url, self.model, self.version, self._max_tokens_field, self._extra_body, told]
        if self.tokenizer is not None:
            facts += [self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template]
        self.fingerprint = _hash(json.dumps(facts, sort_keys=True))
        teachers = cache / "teachers" / "openai"
        self._folder = teachers / self.fingerprint
        self._folder.mkdir(parents=True, exist_ok=True)
        self._purse = Purse(teachers / f"{_hash(json.dumps([self.url, self.model]))}.spent", self._max_usd)
        self._stale: list[Path] = []
        served = self._folder / "served.json"
        self._served: dict[str, Any] | None = json.loads(served.read_bytes()) if served.exists() else None

    def count_tokens(self, prompts: Prompts, sampling: Sampling) -> np.ndarray:
        """(n,) int64: the tokens of each prompt, template included: counted where `tokenizer` is given.

        Without one it is an estimate that is not too low: a token for each byte, and 32 for a template with 8 more for
        each message. (English is counted about four times too high.) Prompts too long for the context are then left
        to the server to refuse.

        Raises:
            DistillError: A prompt is empty, leaves no room for `sampling.max_tokens`, or is a chat where the tokenizer
                has no chat template.
        """
        return np.array([self._count(prompts, sampling, row) for row in range(len(prompts))], dtype=np.int64)

    def generate(self, prompts: Prompts, sampling: Sampling, repeats: np.ndarray, top_k: int = 0) -> Completions:
        """Clean answers; an API tells the tokens of an answer where log-probabilities are asked for.

        Args:
            prompts: n prompts.
            sampling: How to draw.
            repeats: (n,) int64.
            top_k: How many log-probabilities to tell at each position.

        Raises:
            DistillError: See above. Every answer that arrived is noted, and not asked or paid for again.
        """
        if top_k > self.top_k:
            raise DistillError(
                f"{self._where} tells at most {self.top_k} log-probabilities, not {top_k} (teacher.top_k={self.top_k})",
                "access.top_k",
            )
        end = end_of_answer(self.tokenizer, prompts.chat) if top_k and self.tokenizer is not None else None
        requests = [
            self._request(prompts, sampling, int(repeat), top_k, row, end) for row, repeat in enumerate(repeats)
        ]
        for note in self._stale:  # the caller has stored what the call before this one returned
            note.unlink(missing_ok=True)
        self._stale = []
        if not requests:
            return Completions.none()
        answers = self._in_a_loop(self._ask_all, requests)
        self._stale = [request.note for request in requests]
        return Completions.join(answers)

    # --- requests -------------------------------------------------------------------------------------------------

    def _count(self, prompts: Prompts, sampling: Sampling, row: int) -> int:
        name = prompts.name or "these prompts"
        messages = sampling.conversation(prompts, row) if prompts.chat else prompts.messages(row)
        if not messages[-1]["content"].strip():
            raise DistillError(f"prompt {row} of {name} is empty; leave it out", "pool")
        if self.tokenizer is None:
            written = sum(len(message["content"].encode()) for message in messages)
            return written + (TEMPLATE_TOKENS + MESSAGE_TOKENS * len(messages) if prompts.chat else 1)
        if not prompts.chat:
            tokens = len(self.tokenizer(messages[0]["content"]).input_ids)
        elif self.tokenizer.chat_template is None:
            raise DistillError(
                f"{self._tokenizer} has no chat template; name a tokenizer that has one, or none", "teacher.tokenizer"
            )
        else:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            tokens = len(self.tokenizer(text, add_special_tokens=False).input_ids)
        if self.context_tokens is not None and tokens + sampling.max_tokens > self.context_tokens:
            raise DistillError(
                f"{sampling.max_tokens} tokens do not fit behind prompt {row} of {name} with {tokens} tokens in a "
                f"context of {self.context_tokens}; shorten the answers or leave out such prompts",
                "sampling.max_tokens",
            )
        return tokens

    def _request(
        self, prompts: Prompts, sampling: Sampling, repeat: int, top_k: int, row: int, end: int | None
    ) -> _Request:
        longest = (self._count(prompts, sampling, row), sampling.max_tokens)
        body: dict[str, Any] = {"model": self.model, "temperature": sampling.temperature}
        if prompts.chat:
            body |= {"messages": sampling.conversation(prompts, row), self._max_tokens_field: sampling.max_tokens}
        else:
            body |= {"prompt": prompts.column[row], "max_tokens": sampling.max_tokens}
        if not sampling.greedy:  # some servers keep a seed in 32 bits, with a sign
            body["seed"] = derive(sampling.seed, "openai", prompts.keys[row].hex(), repeat) & 0x7FFFFFFF
        if sampling.top_p < 1:
            body["top_p"] = sampling.top_p
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.logit_bias:
            body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
        if top_k:
            body |= {"logprobs": True, "top_logprobs": top_k} if prompts.chat else {"logprobs": top_k}
        key = _hash(f"{self.fingerprint} {json.dumps(body, sort_keys=True)}")
        return _Request(body, prompts.chat, top_k, sampling.stop, end, longest, key, self._folder / f"{key}.json")

    # --- the server -----------------------------------------------------------------------------------------------

    def _in_a_loop(self, function: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        """What a coroutine function returns, run in a thread with a loop of its own: the caller may be inside one."""
        from anyio.from_thread import start_blocking_portal

        with start_blocking_portal() as portal:
            return portal.call(function, *arguments)

    def _client(self) -> Any:
        """A client for one loop. Address and key are stated: left out, it would take others from the environment."""
        import openai

        return openai.AsyncOpenAI(
            base_url=self.url,
            api_key=self._api_key or "none",
            max_retries=0,  # `_Round.send` tries again, and sees to the money each time
            timeout=self.timeout_s,
            http_client=openai.DefaultAsyncHttpxClient(
                trust_env=not self._own,  # a proxy from the environment can't reach this machine's own servers
                follow_redirects=False,
                timeout=self.timeout_s,
            ),
        )

    async def _ask_models(self) -> dict[str, Any]:
        """What the server says of the model, {} where it has no list."""
        async with self._client() as client:
            try:
                listed = await _Round(self, client).send(client.models.with_raw_response.list)
            except _NotFound:
                log.warning("%s has no list of models; %s is believed to be there", self._where, self.model)
                return {}
        try:
            models = {str(model["id"]): dict(model) for model in listed["data"]}
        except (KeyError, TypeError, ValueError):
            raise BadAnswer(f"{self._where}/models gave something that is no list of models", "teacher.url") from None
        if self.model not in models:
            hint = nearest(self.model, models)
            raise DistillError(f"{self._where} does not serve '{self.model}'.{hint}", "teacher.model")
        return models[self.model]

    async def _ask_all(self, requests: list[_Request]) -> list[Completions]:
        """The answers, in order; `concurrency` requests are under way at once."""
        answers: list[Completions | None] = [None] * len(requests)
        failures: list[DistillError] = []
        waiting = iter(range(len(requests)))
        async with self._client() as client:
            round_ = _Round(self, client)

            async def work() -> None:
                for row in waiting:
                    try:
                        answers[row] = self._noted(requests[row]) or await self._ask(round_, requests[row])
                    except DistillError as failure:
                        failures.append(failure)
                        await round_.give_up()
                    if failures:
                        return

            await asyncio.gather(*(work() for _ in range(min(self.concurrency, len(requests)))))
        if failures:
            raise failures[0]
        return [answer for answer in answers if answer is not None]

    def _noted(self, request: _Request) -> Completions | None:
        """The answer that is noted, if it is there, whole and of the model that answers now."""
        try:
            answer = json.loads(request.note.read_bytes())
            completion = self._read(answer, request)
        except (FileNotFoundError, ValueError, BadAnswer):
            return None
        if self._other(answer):
            return None
        return self._whole(completion, request)

    async def _ask(self, round_: _Round, request: _Request) -> Completions:
        """Ask, note, and only then find fault with who answered and how much was told."""
        api = round_.client.chat.completions if request.chat else round_.client.completions
        fields = {"extra_headers": {"Idempotency-Key": request.key}, "extra_body": self._extra_body}

        def call() -> Awaitable[Any]:
            return api.with_raw_response.create(**request.body, **fields)

        reserved = self._price(*request.longest)
        answer = await round_.send(call, reserved, request.top_k)
        try:
            completion = self._read(answer, request)
        except BadAnswer:
            await round_.settle(reserved, reserved)
            raise
        real = self._price(int(completion.prompt_tokens[0]), int(completion.completion_tokens[0]))
        write_note(request.note, json.dumps(answer))
        await round_.settle(reserved, real)
        if self._served is None:
            self._served = {name: answer.get(name) for name in SERVED}
            write_note(self._folder / "served.json", json.dumps(self._served))
        if other := self._other(answer):
            raise DistillError(
                f"{self._where} answers as {other} '{answer.get(other)}', but as '{self._served[other]}' before; what "
                "was paid for is kept, and a new teacher.version begins with the new one"
                + (", or teacher.same_system=false takes both" if other == "system_fingerprint" else ""),
                "teacher.model",
            )
        return self._whole(completion, request)

    def _read(self, answer: Any, request: _Request) -> Completions:
        try:
            return read(
                answer,
                chat=request.chat,
                top_k=request.top_k,
                stop=request.stop,
                longest=request.longest,
                names=self._names,
            )
        except BadAnswer as error:
            said = excerpt(json.dumps(answer), self._api_key)
            raise BadAnswer(f"{self._where} gave a bad answer: {error}{said}", "teacher") from None

    def _other(self, answer: Mapping[str, Any]) -> str:
        """What of `SERVED` is another than before: "" for nothing."""
        served = self._served or {name: answer.get(name) for name in SERVED}
        names = SERVED if self.same_system else SERVED[:1]
        return next((name for name in names if answer.get(name) != served[name]), "")

    def _whole(self, completion: Completions, request: _Request) -> Completions:
        """The answer with its end. Raises `DistillError` where it tells fewer log-probabilities than were asked for."""
        if not request.top_k:
            return completion
        told = completion.top_logprobs
        granted = 0 if told is None else int(np.isfinite(told).sum(axis=1).max(initial=0))
        empty = told is not None and not len(told)
        if granted < request.top_k and not empty:
            raise self._grants(granted, request.top_k)
        if request.end is None or completion.finish[0] != "stop":
            return completion
        return with_end(completion, request.end, self.tokenizer.all_special_ids)

    def _grants(self, granted: int, wanted: int) -> DistillError:
        remedy = f"set access.top_k={granted}" if granted else "let the profile reveal text alone"
        return DistillError(
            f"{wanted} log-probabilities were asked for, but {self._where} grants at most {granted}; {remedy}",
            "access.top_k",
        )

    def _price(self, tokens_in: int, tokens_out: int) -> Fraction:
        return tokens_in * self._prices[0] + tokens_out * self._prices[1]


@dataclass(frozen=True)
class _Request:
    """One request: what is sent, what is wanted of the answer, the token that ends one where that is known, the tokens
    of both at their most, and where it is noted."""

    body: dict[str, Any]
    chat: bool
    top_k: int
    stop: tuple[str, ...]
    end: int | None
    longest: tuple[int, int]
    key: str
    note: Path


class _NotFound(DistillError):
    """Status 404 or 405."""


class _Round:
    """What the requests that are under way at once share: a client, the money, and whether to go on."""

    def __init__(self, teacher: OpenAI, client: Any) -> None:
        self.client = client
        self._teacher = teacher
        self._stopped = asyncio.Event()
        self._settled = asyncio.Condition()
        self._reservations = 0

    async def give_up(self) -> None:
        """Wake those that wait: no more attempts are made."""
        self._stopped.set()
        async with self._settled:
            self._settled.notify_all()

    async def send(self, call: Callable[[], Awaitable[Any]], longest: Fraction = Fraction(0), top_k: int = 0) -> Any:
        """The JSON of an answer, whose price is still reserved; the caller settles it.

        Raises:
            DistillError: A refusal, no answer after the last attempt, or no money.
        """
        import openai

        teacher, where = self._teacher, self._teacher._where
        error: type[DistillError] = DistillError
        for attempt in range(1, teacher.max_attempts + 1):
            await self._reserve(longest)
            wait_s, billed = None, longest  # an attempt without an answer may have been billed
            try:
                async with asyncio.timeout(teacher.timeout_s):
                    return (await call()).http_response.json()
            except openai.APIStatusError as failure:
                billed = Fraction(0)
                response = failure.response
                said = excerpt(response.text, teacher._api_key)
                error, problem = DistillError, f"status {response.status_code}{said}"
                if not is_passing(response.status_code):
                    await self.settle(longest, billed)
                    raise self._refusal(response.status_code, said, top_k) from None
                wait_s = retry_after_s(response.headers.get("Retry-After"), time.time())
            except (TimeoutError, openai.APITimeoutError):
                error, problem = DistillError, f"no answer in {teacher.timeout_s:g} s"
            except openai.APIConnectionError as failure:
                cause = failure.__cause__
                error, problem = DistillError, f"{type(cause).__name__}: {cause}".rstrip(": ")
            except ValueError:
                error, problem = BadAnswer, "the answer is not JSON"
            await self.settle(longest, billed)
            if attempt == teacher.max_attempts or self._stopped.is_set():
                break
            wait_s = pause_s(wait_s, attempt, FIRST_WAIT_S, teacher._jitter, where)
            log.info("%s: %s; attempt %d in %.1f s", where, problem, attempt + 1, wait_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), wait_s)
                break
        raise error(
            f"{where} gave no answer in {attempt} attempts (the last: {problem}); the same command continues", "teacher"
        )

    def _refusal(self, status: int, said: str, top_k: int) -> DistillError:
        """The error for a status that no further attempt would change."""
        teacher = self._teacher
        if top_k and "logprobs" in said:
            if (limit := LIMIT.search(said)) and int(limit[1]) < top_k:
                return teacher._grants(int(limit[1]), top_k)
            return DistillError(f"{teacher._where} does not grant {top_k} log-probabilities{said}", "access.top_k")
        problem = f"{teacher._where} refused: status {status}{said}"
        if status in (404, 405):
            return _NotFound(f"{problem}; teacher.url is the base of the API, such as https://…/v1", "teacher.url")
        remedy = "; check the key in api_key_env" if status in (401, 403) else ""
        return DistillError(f"{problem}{remedy}", "teacher")

    async def _reserve(self, usd: Fraction) -> None:
        """Set money aside, when those under way have left enough. Raises `DistillError` where there is not enough."""
        if not usd:
            return
        purse = self._teacher._purse
        async with self._settled:
            while not purse.take(usd):
                if not self._reservations or self._stopped.is_set():
                    spent, bound, price = (float(some) for some in (purse.spent(), purse.limit or 0, usd))
                    raise DistillError(
                        f"{spent:.6g} of {bound:.6g} usd are spent, and the next answer may cost {price:.6g}; what was "
                        "paid for is kept, and a higher bound continues",
                        "teacher.max_usd",
                    )
                await self._settled.wait()
            self._reservations += 1

    async def settle(self, reserved: Fraction, real: Fraction) -> None:
        """Put back what was set aside and not spent."""
        if not reserved:
            return
        async with self._settled:
            self._teacher._purse.add(real - reserved)
            self._reservations -= 1
            self._settled.notify_all()


def load_tokenizer(name: str) -> Any:
    """A fast tokenizer of the hub or of a folder. Raises `MissingAsset` or `DistillError`."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise MissingAsset(
            f"'{name}' is neither a folder with a tokenizer nor within reach on the hub; give teacher.tokenizer=DIR, "
            f"or null to do without ({type(error).__name__})",
            "teacher.tokenizer",
        ) from None
    if not tokenizer.is_fast:
        raise DistillError(f"'{name}' is a slow tokenizer; a fast one (tokenizer.json) is needed", "teacher.tokenizer")
    return tokenizer


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
