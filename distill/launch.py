"""Starting an entry point: `--help`, Hydra, one-line errors, the run's lock, and the table after a sweep.

Nothing here loads torch: `--help` and a finished run must not wait for it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from distill.config import CONFIG_DIR, Config
from distill.errors import DistillError, nearest

log = logging.getLogger(__name__)

SWEEP_FILE = "DISTILL_SWEEP"  # names the file in which the runs of one sweep note their folders
RANK = int(os.environ.get("RANK", "0"))
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


# --- errors ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What the user can mend becomes one line on stderr and exit code 2; `DISTILL_TRACEBACK=1` shows the traceback."""
    if os.environ.get("DISTILL_TRACEBACK") == "1":
        yield
        return
    try:
        yield
    except KeyboardInterrupt:
        _stop("interrupted; the same command goes on from here", 130)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        _stop(line, 2)


def explain(error: BaseException) -> str | None:
    """One line for an error that the user can mend, None for a defect of the program."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, DistillError):
        return str(error)
    if _disk_is_full(error):
        return f"no space left on the disk ({error}); free some and run the same command again"
    if isinstance(error, (PermissionError, NotADirectoryError, FileExistsError, IsADirectoryError)) or (
        isinstance(error, OSError) and error.errno == errno.EROFS
    ):
        return f"hydra.run.dir: cannot write to {error.filename} ({error.strerror}); choose another folder"
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _explain_config(error)
    if isinstance(error, RuntimeError) and '"srun"' in str(error):
        return "launch: there is no Slurm on this machine; +launch=slurm_local starts the same jobs without one"
    return None


def _disk_is_full(error: BaseException) -> bool:
    """Also as safetensors and torch word it, which raise errors of their own."""
    if isinstance(error, OSError) and error.errno in _FULL_DISK:
        return True
    told = str(error)
    return any(f"(os error {number})" in told for number in _FULL_DISK) or "PytorchStreamWriter failed" in told


def _explain_config(error: BaseException) -> str:
    """Hydra's and OmegaConf's several lines in one, with the nearest name where a key or an option is unknown."""
    texts: list[str] = []
    at: BaseException | None = error
    while at is not None:
        texts += [line.strip() for line in str(at).splitlines() if line.strip()]
        at = at.__cause__
    text = " ".join(dict.fromkeys(line for line in texts if not line.startswith("Error merging override")))
    words = text.replace("'", " ").replace("=", " ").split()
    if found := re.search(r"Could not find 'hydra/launcher/(\w+)'", text):
        extra = {"joblib": "launch", "ray": "ray"}.get(found[1], "slurm")
        return f"launch: its plugin is not installed; pip install 'distill-framework[{extra}]'"
    if "Could not find" in text and "/" in text:  # a group's option: 'defense/roundng'
        group, _, option = next(word for word in words if "/" in word).partition("/")
        return f"{group}: no option '{option}'.{nearest(option, options(group))}"
    if "Key" in words and ("is not in struct" in text or "not in" in text):
        key = words[words.index("Key") + 1]
        full = next((word for word in words if word.endswith(f".{key}") or word == key), key)
        known = list(Config.__dataclass_fields__)
        return f"{full}: no such key.{nearest(key, known) if full == key else ''}"
    if "full_key:" in text:
        key = text.split("full_key:")[1].split()[0]
        return f"{key}: {text.split(' full_key:')[0]}"
    return text


def _stop(line: str, code: int) -> None:
    if RANK == 0:
        sys.stderr.write(f"error: {line}\n")
    sys.exit(code)


# --- help -----------------------------------------------------------------------------------------------------------


def options(group: str, search: list[Path] | None = None) -> dict[str, str]:
    """The options of a config group with their one-line descriptions (the first comment of each yaml)."""
    found: dict[str, str] = {}
    for folder in search or [CONFIG_DIR]:
        for path in sorted((folder / group).glob("*.yaml")):
            comments = (line for line in path.read_text().splitlines() if not line.startswith("# @"))
            first = next(comments, "")
            found[path.stem] = first.lstrip("# ") if first.startswith("#") else ""
    return found


def help_text(title: str, module: str, argv: list[str]) -> str:
    """The `--help` of an entry point: usage, every group with every option, and the plain keys."""
    search = [CONFIG_DIR]
    for word in argv:
        if word.startswith("hydra.searchpath="):
            search += [Path(p.strip(" []").removeprefix("file://")) for p in word.split("=", 1)[1].split(",")]
    lines = [
        f"{title}\n",
        f"  python -m {module} +experiment=NAME [GROUP=OPTION …] [KEY=VALUE …]",
        f"  python -m {module} +experiment=quickstart defense=rounding budget.queries=500",
        f"  python -m {module} +experiment=quickstart -m defense=none,rounding seed=0,1,2     a sweep and its table\n",
        "Every option of a group has its own keys: --cfg job prints the composed config, GROUP.KEY=VALUE sets one.",
    ]
    groups = sorted({p.name for folder in search if folder.is_dir() for p in folder.iterdir() if p.is_dir()})
    for group in [g for g in groups if g not in ("launch", "experiment")] + ["launch", "experiment"]:
        known = options(group, search)
        if group in ("hydra", "accelerate", "benchmark") or not known:
            continue
        lines.append(f"\n{'+' if group in ('launch', 'experiment') else ''}{group}=")
        lines += [f"  {name:<24} {text}" for name, text in known.items()]
    lines += [
        "\nkeys",
        "  budget.queries=N         how many answers the attacker may ask for; budget.usd=X bounds the money,",
        "                           budget.tokens=N those of prompts and answers",
        "  access.usd_per_query=X   what each answer is billed",
        "  curve=[0.1,0.3]          also train a fresh student at these shares of the queries",
        "  precision=no|bf16|fp16   mixed precision of the training loop",
        "  seed=N                   every random stream is derived from it",
        "  run.device=auto|cpu|cuda run.workers=N run.threads=N run.progress=false",
        "  run.force=true           repeat a finished run          run.export=PATH  a self-contained transfer set",
        "  samples=N                language models: answers to a prompt    max_length=N  positions of a training row",
        "  run.push_to_hub=REPO     language models: the transfer set to the Hugging Face hub, private",
        "\nenvironment",
        "  DISTILL_CACHE            teachers and clean answers (default: the platform's cache folder)",
        "  DISTILL_TRACEBACK=1      full tracebacks                DISTILL_ALLOW_TARGETS=mypkg.  classes of your own",
    ]
    return "\n".join(lines) + "\n"


# --- the launch -----------------------------------------------------------------------------------------------------


def launch(
    task: Callable[[Any], None], config_name: str, title: str, schema: type = Config, help_of: Callable = help_text
) -> None:
    """Run a Hydra task: compose, check the root keys, run, and turn what goes wrong into one line.

    Args:
        task: What is done with the composed config.
        config_name: The primary config, and the name of the entry point.
        title: The beginning of its help.
        schema: The dataclass of the root keys.
        help_of: From title, module and arguments to the help.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        sys.stdout.write(help_of(title, f"distill.{config_name}", sys.argv[1:]))
        return
    import hydra

    sweep = [word for word in sys.argv[1:] if word in ("-m", "--multirun")]  # argparse wants it before the overrides
    sys.argv[1:] = sweep + [word for word in sys.argv[1:] if word not in sweep]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises what it would print; explain() words it
    if RANK > 0:  # every rank shares the folder of the run; only the first writes to it
        sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]

    known = [field.name for field in fields(schema)]

    def job(config: Any) -> None:
        for key in config:
            if key not in known:
                raise DistillError(f"no such key.{nearest(str(key), known)}", str(key))
        task(config)

    def checked(config: Any) -> None:
        if not sweep:
            with one_line_errors():  # before Hydra sees the error, which would add a line of its own
                job(config)
            return
        try:
            job(config)
        except Exception as error:
            if line := explain(error):
                log.error("%s", line)  # a sweep goes on with its other runs and raises the first error at its end
            raise

    checked.__module__ = task.__module__
    with one_line_errors(), compared() if sweep else contextlib.nullcontext():
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(checked)()


@contextlib.contextmanager
def claim(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder for this process. A second process says so and waits; other ranks of one job pass."""
    if RANK > 0:
        yield
        return
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        log.info("another process works on this %s; waiting for it (%s)", what, folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, whatever happens meanwhile."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


# --- a sweep --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def compared() -> Iterator[None]:
    """Around a sweep: one table at its end of all runs that finished, whichever process made them."""
    here = Path.cwd() if os.access(Path.cwd(), os.W_OK) else None  # a folder that jobs on other machines see as well
    handle, name = tempfile.mkstemp(prefix=".distill-sweep-", dir=here)
    os.close(handle)
    os.environ[SWEEP_FILE] = name
    sys.argv.append(f"++hydra.job.env_set.{SWEEP_FILE}='{name}'")  # to those that don't inherit the environment
    try:
        yield
    finally:
        del os.environ[SWEEP_FILE]
        folders = [Path(line) for line in dict.fromkeys(Path(name).read_text().splitlines())]
        Path(name).unlink()
        if folders:  # a sweep of queries leaves no results
            from distill.report import show_runs

            show_runs(folders)


def note_run(run_dir: Path) -> None:
    """Note a finished run for the table at the end of the sweep that it belongs to."""
    if (name := os.environ.get(SWEEP_FILE)) and RANK == 0:
        with open(name, "a", encoding="utf-8") as file:
            file.write(f"{run_dir}\n")
