"""Running the entry points as a user does: a process of its own in some working directory."""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distill.train import main

# Four of the five seconds of a small command go into imports. On Linux one process makes them, once for each worker of
# the tests, and every command is a fork of it; elsewhere, where a fork may crash, a command is a new interpreter.
PROCESSES: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    named = ("train", "query", "evaluate", "report", "audit", "benchmark", "experiment")
    entry_points = [f"distill.{name}" for name in named]
    heavy = ["torch._dynamo", "datasets", "pandas", "sklearn.datasets", "tabulate", "rouge_score.rouge_scorer"]
    heavy += ["transformers.models.llama.modeling_llama", "distill.language_experiment"]
    PROCESSES.set_forkserver_preload(["pytest", *entry_points, *heavy])


@dataclass
class Ended:
    returncode: int  # minus the signal, of a process that was killed
    stdout: str
    stderr: str
    cpu_s: float | None = None  # None of a process that was killed


class Running:
    """A function of a test module, called in a process of its own.

    With `cpu_s` it is killed, as by kill -9, after so many seconds of processor time: however busy the machine is, that
    is the same share of its work.
    """

    def __init__(
        self,
        function: Callable[..., None],
        *arguments: Any,
        cwd: Path,
        env: dict[str, str | None] | None = None,
        cpu_s: float | None = None,
    ) -> None:
        self.said = tempfile.TemporaryDirectory(prefix="distill-said-")
        words = (self.said.name, str(cwd), environment(env), cpu_s, function, arguments)
        self.process = PROCESSES.Process(target=_call, args=words)
        self.process.start()

    def end(self, timeout: float = 240) -> Ended:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"still running after {timeout} s")
        said = Path(self.said.name)
        stdout, stderr = ((said / name).read_text() if (said / name).exists() else "" for name in ("1", "2"))
        cpu_s = float((said / "cpu_s").read_text()) if (said / "cpu_s").exists() else None
        self.said.cleanup()
        return Ended(self.process.exitcode, stdout, stderr, cpu_s)


def _call(
    said: str,
    cwd: str,
    env: dict[str, str],
    cpu_s: float | None,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    for descriptor in (1, 2):
        os.dup2(os.open(f"{said}/{descriptor}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
    started = time.process_time()
    if cpu_s is not None:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process where it stands, no line of Python is run
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        function(*arguments)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        atexit._run_exitfuncs()  # an interpreter does at its end, a process of `multiprocessing` does not
        Path(said, "cpu_s").write_text(str(time.process_time() - started))


def environment(changes: dict[str, str | None] | None) -> dict[str, str]:
    return {name: value for name, value in (os.environ | (changes or {})).items() if value is not None}


def command(module: str, *words: str) -> None:
    """What ``python -m distill.<module> <words>`` runs."""
    sys.argv = [f"distill.{module}", *words]
    importlib.import_module(f"distill.{module}").main()


def distill(
    module: str,
    *words: str,
    cwd: Path,
    check: bool = True,
    env: dict[str, str | None] | None = None,
    fresh: bool = False,
) -> Ended:
    """Run ``python -m distill.<module> <words>``; with `check`, a failure fails the test and shows what was printed.

    With `fresh` it is that very command, for what is read before `main`: PYTHONPATH, HOME, or another seed of hashes.
    """
    if fresh:
        line = [sys.executable, "-m", f"distill.{module}", *words]
        run = subprocess.run(line, cwd=cwd, env=environment(env), capture_output=True, text=True, timeout=240)
        done = Ended(run.returncode, run.stdout, run.stderr)
    else:
        done = Running(command, module, *words, cwd=cwd, env=env).end()
    if check:
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def refused(words: list[str], cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which ``python -m distill.train <words>`` stops, exit code 2.

    It is the same `main` as the command's, called here to spare the seconds that a fresh interpreter needs.
    """
    monkeypatch.setattr(sys, "argv", ["distill.train", *words])
    monkeypatch.chdir(cwd)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # `launch` sets it; this takes it away again
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    return complaint(capsys.readouterr().err)


def complaint(stderr: str) -> str:
    """The one line, and nothing else that looks like an accident."""
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr
    return lines[0]
