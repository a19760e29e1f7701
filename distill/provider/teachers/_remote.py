"""What teachers behind a network share: who may be asked, how long to wait for them, notes of what they answered."""

from __future__ import annotations

import email.utils
import ipaddress
import os
import random
import threading
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from distill.errors import DistillError

LONGEST_BACKOFF_S = 60.0
LONGEST_WAIT_S = 900.0  # a server that asks for more than this is obeyed by stopping; the run can be continued later


def address(url: str, authorized: bool) -> SplitResult:
    """The parts of an address that may be asked.

    Raises:
        DistillError: It is no http or https address, holds a password, or is elsewhere and not `authorized`.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DistillError(f"'{url}' is not an http or https address", "teacher.url")
    if parts.username or parts.password:
        raise DistillError("put the key in an environment variable and name it in api_key_env", "teacher.url")
    if not (is_loopback(parts.hostname) or authorized):
        raise DistillError(
            f"{parts.hostname} is not this machine; state with teacher.authorized=true that its terms allow "
            "querying it to train another model, or don't query it",
            "teacher.authorized",
        )
    return parts


def key_from(variable: str | None) -> str:
    """The key in an environment variable, "" where none is named. Raises `DistillError` if it is not set."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "")
    if not key:
        raise DistillError(
            f"the environment variable {variable} is not set; export it with the key", "teacher.api_key_env"
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its very address: no name but ``localhost`` is looked up or believed."""
    if host == "localhost":
        return True
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        return False
    return number in ipaddress.ip_network("127.0.0.0/8") or number == ipaddress.ip_address("::1")


def retry_after_s(header: str | None, now_s: float) -> float | None:
    """The seconds that a ``Retry-After`` asks to wait, in either of its forms (RFC 9110, 10.2.3); None without one.

    Args:
        header: A number of seconds, or a date.
        now_s: The time now, in seconds since the epoch.
    """
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - now_s)
    except ValueError:
        return None


def is_passing(status: int) -> bool:
    """Whether a status is worth another attempt: a timeout, too many requests, or trouble of the server's own."""
    return status in (408, 429) or status >= 500


def pause_s(asked_s: float | None, attempt: int, first_s: float, jitter: random.Random, where: str) -> float:
    """How long to wait after a failed attempt.

    Args:
        asked_s: What the server asks for; None where it does not say, for an exponential, jittered wait.
        attempt: The attempt that failed, from 1 on.
        first_s: The longest wait after the first attempt; doubled after each further one.
        jitter: Where the jitter comes from.
        where: The server, for the message.

    Raises:
        DistillError: The server asks for more than `LONGEST_WAIT_S`.
    """
    if asked_s is None:
        return min(LONGEST_BACKOFF_S, first_s * 2 ** (attempt - 1)) * jitter.uniform(0.5, 1.0)
    if asked_s > LONGEST_WAIT_S:
        raise DistillError(
            f"{where} asks to wait {asked_s / 60:.0f} minutes; continue this run then, with the same command",
            "teacher",
        )
    return asked_s


def excerpt(text: str, key: str) -> str:
    """What a server says of a failure, on one short line and without the key, which some servers repeat."""
    text = " ".join(text[:2000].split())
    if key:
        text = text.replace(key, "***")
    return f" ({text[:200]})" if text else ""


def write_note(note: Path, text: str) -> None:
    """Write a file that is there whole or not at all, whoever else writes it."""
    part = note.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    part.write_text(text)
    part.replace(note)
