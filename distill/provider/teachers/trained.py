"""Teachers that are trained here once and kept: one process trains, damaged weights are noticed."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from distill.records import file_hash

log = logging.getLogger(__name__)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Held by one process on this machine at a time; the system frees it when its holder is killed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.info("waiting for the process that is training this teacher (%s)", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def find_trained(folder: Path) -> dict[str, Any] | None:
    """The record of whole weights, or None. What is damaged is named in a warning."""
    if not folder.exists():
        return None
    try:
        record = json.loads((folder / "teacher.json").read_text())
        if file_hash(folder / "model.safetensors") == record["weights"]:
            return record
        damaged = "model.safetensors"
    except (OSError, ValueError, KeyError, TypeError):
        damaged = "teacher.json"
    log.warning("%s is damaged; the teacher is trained anew", folder / damaged)
    return None
