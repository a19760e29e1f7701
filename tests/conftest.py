"""One thread, a cache of the tests' own, no network: set before anything is imported, and inherited by subprocesses."""

from __future__ import annotations

import os
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"
if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker inherits the one cache of the process that started it
    CACHE = tempfile.TemporaryDirectory(prefix="distill-tests-")
    os.environ["DISTILL_CACHE"] = CACHE.name
os.environ["WANDB_MODE"] = "offline"
os.environ["COLUMNS"] = "180"
os.environ.pop("DISTILL_TRACEBACK", None)
