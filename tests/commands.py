"""Running the entry points as a user does: a subprocess in some working directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill.train import main


def distill(
    module: str,
    *words: str,
    cwd: Path,
    check: bool = True,
    env: dict[str, str | None] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m distill.<module> <words>``; with `check`, a failure fails the test and shows what was printed."""
    done = subprocess.run(
        [sys.executable, "-m", f"distill.{module}", *words],
        cwd=cwd,
        env={name: value for name, value in (os.environ | (env or {})).items() if value is not None},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
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
