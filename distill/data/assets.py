"""The one place that says where a data set comes from.

The order is always: the path that the user states, the Hugging Face cache, the hub, an installed package. Whichever
has it first is logged; when none has it, one `MissingAsset` names the ways to get it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import DistillError, MissingAsset, nearest

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

PROBE_S = 3.0  # `load_dataset` itself retries an unreachable hub for 23 s; one short question comes first


def package_file(package: str, path: str) -> Path | None:
    """A file inside an installed top-level package, found without importing the package; None where it is absent."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / path).exists():
            return Path(folder) / path
    return None


def find(
    title: str,
    *,
    root: str | None = None,
    hub_id: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    packaged: Path | None = None,
    install: str | None = None,
    key: str = "data.root",
) -> Path | datasets.DatasetDict:
    """Where a data set lies: a path on this machine, or its splits from the Hugging Face cache or hub.

    Args:
        title: What is looked for, in words.
        root: The user's own copy; it is used or refused, never passed over.
        hub_id: A Hugging Face dataset id, with its `config` and `revision` (branch, tag or commit).
        packaged: Where an installed package keeps it.
        install: The command that installs that package.
        key: The config key of `root`, for messages.

    Raises:
        MissingAsset: None of them has it.
    """
    if root is not None:
        path = Path(root).expanduser()
        if not path.exists():
            raise MissingAsset(f"there is nothing at {path}; name the place of {title}", key)
        log.info("%s: read from %s", title, path)
        return path
    ways, why = [f"set {key}=…"], ""
    if hub_id is not None:
        try:
            return _from_hub(title, hub_id, config, revision)
        except _NotOnHub as error:
            why = str(error)
            ways.append(f"let the Hugging Face hub be reached ({hub_id}: {why})")
    if packaged is not None and packaged.exists():
        log.info("%s: read from the installed package at %s%s", title, packaged, f" ({why})" if why else "")
        return packaged
    if install is not None:
        ways.append(f"install it: {install}")
    raise MissingAsset(f"{title} was not found; {', or '.join(ways)}", key)


class _NotOnHub(Exception):
    """Neither the cache nor the hub gave the data set, and why."""


def _from_hub(title: str, hub_id: str, config: str | None, revision: str | None) -> datasets.DatasetDict:
    cached = _cached(hub_id, config, revision)
    if cached is not None:
        log.info("%s: read from the Hugging Face cache (%s)", title, hub_id)
        return cached
    commit = _commit(hub_id, revision)
    import datasets

    try:
        found = datasets.load_dataset(hub_id, config, revision=commit)
    except Exception as error:  # whatever goes wrong on the way, another place may still have it
        raise _NotOnHub(_one_line(error)) from error
    log.info("%s: read from the Hugging Face hub (%s at %s)", title, hub_id, commit)
    return found


def _cached(hub_id: str, config: str | None, revision: str | None) -> datasets.DatasetDict | None:
    """What an earlier `load_dataset` of this id prepared, asked of the disk alone; the newest where there are several.

    With several configurations and none named, the hub has to say which one is its default.
    """
    owner, _, name = hub_id.rpartition("/")
    if "datasets" not in sys.modules and not any(_default_cache().glob(f"{owner}*")):
        return None  # told without its import, which takes half a second

    from datasets import config as settings
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    folder = Path(settings.HF_DATASETS_CACHE) / "___".join(filter(None, (owner, camelcase_to_snakecase(name))))
    found = [file.parent for file in folder.glob(f"{config or '*'}/*/{revision or '*'}/dataset_info.json")]
    found = [path for path in found if not path.name.endswith(".incomplete")]
    if len({path.parts[-3] for path in found}) != 1:
        return None
    newest = max(found, key=lambda path: path.stat().st_mtime)
    config_name, version, commit = newest.parts[-3:]
    return Cache(dataset_name=name, repo_id=hub_id, config_name=config_name, version=version, hash=commit).as_dataset()


def _default_cache() -> Path:
    """Where `datasets` keeps what it has prepared, as the environment says."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_DATASETS_CACHE", Path(HF_HOME, "datasets")))


def _commit(hub_id: str, revision: str | None) -> str:
    """The commit that a revision stands for on the hub, or `_NotOnHub` within about `PROBE_S` seconds.

    Asked in a thread, because looking up a host name has no time limit of its own.
    """
    from huggingface_hub import HfApi

    answer: list[str | Exception] = []

    def ask() -> None:
        try:
            answer.append(str(HfApi().dataset_info(hub_id, revision=revision, timeout=PROBE_S).sha))
        except Exception as error:  # offline, unknown, gated, misspelt: each is a reason to look elsewhere
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_S + 1.0)
    if not answer:
        raise _NotOnHub(f"no answer within {PROBE_S:g} s")
    if isinstance(answer[0], Exception):
        raise _NotOnHub(_one_line(answer[0])) from answer[0]
    return answer[0]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def open_path(path: Path, key: str = "data.root") -> datasets.DatasetDict:
    """A file or folder of CSV, JSONL, Parquet or pictures as Hugging Face `datasets` reads it, split by split.

    Raises:
        DistillError: It holds nothing that can be read.
    """
    import datasets

    formats = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".jsonl": "json", ".json": "json"}
    stem = path.with_suffix("") if path.suffix in (".gz", ".bz2", ".xz", ".zst") else path
    try:
        if path.is_dir():
            return datasets.load_dataset(str(path))
        if stem.suffix not in formats:
            raise DistillError(f"{path} is not one of {', '.join(formats)} or a folder", key)
        options = {"sep": "\t"} if stem.suffix == ".tsv" else {}
        return datasets.load_dataset(formats[stem.suffix], data_files=str(path), **options)
    except (
        OSError,
        ValueError,
        datasets.exceptions.DatasetsError,
        datasets.exceptions.DatasetGenerationError,
    ) as error:
        cause = error.__cause__ or error
        raise DistillError(f"{path} can't be read ({_one_line(cause)})", key) from error


def part(splits: datasets.DatasetDict, name: str, key: str) -> datasets.Dataset:
    """One split. Raises `DistillError` naming the ones there are."""
    if name not in splits:
        raise DistillError(f"no split '{name}'.{nearest(name, map(str, splits))}", key)
    return splits[name]
