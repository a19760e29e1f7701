"""One thread, a cache of the tests' own, no network: set before anything is imported, and inherited by subprocesses."""

from __future__ import annotations

import os
import tempfile

CACHE = tempfile.TemporaryDirectory(prefix="distill-tests-")

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["DISTILL_CACHE"] = CACHE.name
os.environ["WANDB_MODE"] = "offline"
os.environ["COLUMNS"] = "180"
os.environ.pop("DISTILL_TRACEBACK", None)
