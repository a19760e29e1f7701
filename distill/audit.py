"""What an interface leaks about the model behind it, and which policy stops that: policies × extraction attacks.

    python -m distill.audit
    python -m distill.audit teacher=openai teacher.url=http://127.0.0.1:8000/v1 teacher.model=… teacher.tokenizer=…

Each policy is an access and a defense. Each attack gets the oracle of each policy, with a budget of its own, and
nothing else.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from distill.config import BudgetConfig, RunConfig, build, cache_dir, digest, identity
from distill.errors import BudgetExceeded, DistillError, nearest
from distill.launch import claim, launch, options, write_atomically
from distill.records import EVERY_LOGPROB, InterfaceProfile

log = logging.getLogger(__name__)

AUDIT_SCHEMA = 1
GROUPS = ("leak", "teacher", "data", "pool", "defense")
IDENTITY = ("data", "pool", "teacher", "leak", "policies", "only", "prices", "budget", "precision", "seed")


@dataclass
class PolicyAccess:
    """What a policy reveals and lets ask."""

    profile: str = "text"
    top_k: int | None = None
    logit_bias: bool = False


@dataclass
class Policy:
    """One row of the table; `defense` is an option of that group."""

    access: PolicyAccess = field(default_factory=PolicyAccess)
    defense: Any = None


@dataclass
class PricesConfig:
    """What the attacker is billed."""

    usd_per_query: float = 0.0
    usd_per_mtok_in: float = 0.0
    usd_per_mtok_out: float = 0.0


@dataclass
class AuditConfig:
    """The root of `configs/audit.yaml`. `only` names some of the policies; empty for all."""

    data: Any = MISSING
    pool: Any = MISSING
    teacher: Any = MISSING
    leak: Any = MISSING
    policies: dict[str, Policy] = field(default_factory=dict)
    only: list[str] = field(default_factory=list)
    prices: PricesConfig = field(default_factory=PricesConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    precision: str = "no"
    seed: int = 0
    name: str = MISSING
    run: RunConfig = field(default_factory=RunConfig)


def audit_id(config: Any) -> str:
    """Identifies an audit: everything that its table depends on."""
    return digest({"schema": AUDIT_SCHEMA} | {key: identity(config[key]) for key in IDENTITY})


OmegaConf.register_new_resolver("audit_id", lambda *, _root_: audit_id(_root_), replace=True)
ConfigStore.instance().store(name="audit_schema", node=AuditConfig)


def run(config: Any) -> None:
    """The task of `python -m distill.audit`: a finished audit is shown, anything else is made or continued."""
    from hydra.core.hydra_config import HydraConfig

    run_dir = Path(HydraConfig.get().runtime.output_dir)
    choices = {name: str(option) for name, option in HydraConfig.get().runtime.choices.items()}
    with claim(run_dir, "audit"):
        if config.run.force:
            for name in ("audit.json", "cells.jsonl"):
                (run_dir / name).unlink(missing_ok=True)
        if (run_dir / "audit.json").exists():
            log.info("finished before: %s (run.force=true repeats it)", run_dir)
        else:
            audit(config, run_dir, choices)
    show(run_dir)


def audit(config: Any, run_dir: Path, choices: dict[str, str]) -> None:
    """Every attack on every policy. Each finished cell is a line of `cells.jsonl`, from which an interrupted audit goes
    on; `audit.csv` and then `audit.json` are written last."""
    from tqdm.auto import tqdm

    from distill.evaluate import environment
    from distill.experiment import make_trainer
    from distill.language import Task

    policies = chosen(config)
    trainer = make_trainer(config)
    for option in config.leak:  # an option that does not fit is told before a teacher is trained
        build(config.leak[option], f"leak.{option}")
    task = build(config.data, "data").load()
    if not isinstance(task, Task):
        raise DistillError(f"{choices['data']} holds classes; language models are audited", "data")
    pool = build(config.pool, "pool").load_prompts(task)
    teacher = build(config.teacher, "teacher")
    teacher.prepare(task, trainer, cache_dir())
    path, cells = run_dir / "cells.jsonl", []
    if path.exists():
        cells = [json.loads(line) for line in path.read_text().splitlines()]
    done = {(cell["policy"], cell["leak"]) for cell in cells}
    todo = [(policy, leak) for policy in policies for leak in config.leak if (policy, leak) not in done]
    for policy, leak in tqdm(todo, "audit", unit="cell", leave=False, disable=not config.run.progress):
        cell = Cell.open(config, policy, leak, teacher, task, trainer).play(pool, config.seed)
        cells.append(cell)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")
    order = [(policy, leak) for policy in policies for leak in config.leak]
    cells.sort(key=lambda cell: order.index((cell["policy"], cell["leak"])))
    write_atomically(run_dir / "audit.csv", as_csv(cells))
    whole = {
        "schema": AUDIT_SCHEMA,
        "choices": choices,
        "config": OmegaConf.to_container(config, resolve=True),
        "teacher": {
            "fingerprint": teacher.fingerprint,
            "parameters": teacher.parameters,
            "vocabulary": None if teacher.tokenizer is None else len(teacher.tokenizer),
        },
        "cells": cells,
        "environment": environment(trainer),
    }
    write_atomically(run_dir / "audit.json", json.dumps(whole, indent=1) + "\n")


def chosen(config: Any) -> list[str]:
    """The names of the policies that are audited."""
    known = [str(name) for name in config.policies]
    for name in config.only:
        if name not in known:
            raise DistillError(f"no policy '{name}'.{nearest(name, known)}", "only")
    return list(config.only) or known


@dataclass
class Cell:
    """One attack on one policy: the provider's side of it, and an attack that is handed the oracle alone."""

    policy: str
    option: str
    leak: Any
    provider: Any
    inside: Any

    @classmethod
    def open(cls, config: Any, policy: str, option: str, teacher: Any, task: Any, trainer: Any) -> Cell:
        """Raises `DistillError` where the policy does not fit the teacher."""
        from distill.contracts import LanguageDefense, LocalLanguageTeacher, PreparedLanguageDefense
        from distill.provider.language_provider import LanguageProvider
        from distill.provider.ledger import Prices

        node, key = config.policies[policy], f"policies.{policy}"
        defense, serving = None, teacher
        if node.defense is not None:
            defense = build(node.defense, f"{key}.defense")
            if not isinstance(defense, LanguageDefense):
                raise DistillError(f"{type(defense).__name__} defends classifiers", f"{key}.defense")
        if isinstance(defense, PreparedLanguageDefense):
            serving = defense.prepare(teacher, task, trainer, cache_dir(), 0)
        provider = LanguageProvider(
            teacher,
            access=profile_of(node.access, teacher),
            prices=Prices(**config.prices),
            budget=budget_of(config),
            sampling=first_token(),
            cache=cache_dir(),
            defense=defense,
            serving=serving,
            defense_id=digest([identity(node.defense), _fingerprint(defense)], length=16),
            seed=config.seed,
        )
        local = isinstance(serving, LocalLanguageTeacher)
        leak = build(config.leak[option], f"leak.{option}")  # fresh: it has seen no other policy, and no truth
        return cls(policy, option, leak, provider, inside_of(serving) if local else None)

    def play(self, pool: Any, seed: int) -> dict[str, Any]:
        """The cell of the table: what was recovered, how badly, and what it cost."""
        from distill.contracts import Verdict
        from distill.provider.oracle import serve_text

        started, found, stopped = time.monotonic(), None, ""
        with serve_text(self.provider) as oracle:
            if refused := self.leak.refusal(oracle):
                stopped = f"refused: {refused}"
            else:
                try:
                    found = self.leak.extract(oracle, pool, seed)
                except BudgetExceeded as error:
                    stopped = f"budget: {error.asked:,} more queries needed, {error.affordable:,} left"
                except DistillError as error:  # where the provider failed, the end of this block raises what went wrong
                    if error.key is not None:  # what the user can mend, such as a pool that is too small
                        raise
                    stopped = f"stopped: {error}"
        verdict = Verdict(False, None, stopped) if stopped else self.leak.judge(found, self.inside)
        cost = self.provider.cost()
        return {
            "policy": self.policy,
            "leak": self.option,
            "profile": str(self.provider.profile).replace("label", "text"),
            **asdict(verdict),
            "queries": cost.queries,
            "tokens": cost.tokens_in + cost.tokens_out,
            "usd": cost.usd,
            "seconds": time.monotonic() - started,
        }


def profile_of(access: Any, teacher: Any) -> InterfaceProfile:
    """What a policy lets through of what the teacher tells. Whole distributions come as the log-probabilities of all
    tokens: an audit is about what answers say."""
    asked = InterfaceProfile.parse(access.profile, access.top_k, access.logit_bias).meet(EVERY_LOGPROB)
    if asked.top_k is None:
        return asked
    most = [asked.top_k]
    most += [] if teacher.top_k is None else [teacher.top_k]
    most += [] if teacher.tokenizer is None else [len(teacher.tokenizer)]
    return InterfaceProfile.parse("top_k", min(most), asked.logit_bias)


def budget_of(config: Any) -> Any:
    """What each attack may spend on each policy."""
    from distill.records import Budget

    return Budget(config.budget.queries, config.budget.usd, config.budget.tokens)


def first_token() -> Any:
    """How answers are drawn where an attack does not say."""
    from distill.language import Sampling

    return Sampling(max_tokens=1, temperature=0)


def inside_of(teacher: Any) -> Any:
    """What the evaluation knows of a teacher whose weights are here."""
    import numpy as np
    import torch

    from distill.contracts import Inside

    def head(prompts: Any) -> Any:
        tokens = teacher.prompt_tokens(prompts, first_token())
        heads = teacher.heads([[*some, 0] for some in tokens], [len(some) for some in tokens])
        return replace(heads[0], hidden=torch.cat([one.hidden for one in heads]))

    def double(tensor: torch.Tensor) -> np.ndarray:
        return tensor.cpu().double().numpy()

    weight = teacher.network.get_output_embeddings().weight
    return Inside(double(weight.detach()), lambda p: double(head(p).hidden), lambda p: double(head(p).logits()))


def _fingerprint(defense: Any) -> str:
    from distill.contracts import PreparedLanguageDefense

    return defense.fingerprint if isinstance(defense, PreparedLanguageDefense) else ""


# --- the table ------------------------------------------------------------------------------------------------------

COLUMNS = ("policy", "leak", "profile", "recovered", "error", "queries", "formula", "tokens", "usd", "seconds", "note")


def as_csv(cells: list[dict[str, Any]]) -> str:
    """One line a cell."""
    written = io.StringIO()
    table = csv.DictWriter(written, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(cells)
    return written.getvalue()


def show(run_dir: Path) -> None:
    """The table of a finished audit."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    whole = json.loads((run_dir / "audit.json").read_text())
    teacher = whole["teacher"]
    title = f"audit of {whole['choices']['teacher']}, {teacher['vocabulary']} tokens"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in ("policy", "attack", "recovered"):
        table.add_column(column)
    for column in ("error", "queries", "formula", "usd"):
        table.add_column(column, justify="right")
    table.add_column("note")
    before = ""
    for cell in whole["cells"]:
        table.add_row(
            cell["policy"] if cell["policy"] != before else "",
            cell["leak"],
            {True: "yes", False: "no", None: "?"}[cell["recovered"]],
            "" if cell["error"] is None else f"{cell['error']:.3g}",
            f"{cell['queries']:,}",
            "" if cell["formula"] is None else f"{cell['formula']:,}",
            f"{cell['usd']:.4f}",
            cell["note"],
        )
        before = cell["policy"]
    terminal = sys.stdout.isatty()
    console = Console(highlight=False, force_terminal=terminal, no_color=not terminal, width=None if terminal else 160)
    console.print(table)
    console.print(f"n = {len(whole['cells'])} cells, seed {whole['config']['seed']}; run: {run_dir}")


def help_text(title: str, module: str, _: list[str]) -> str:
    """The `--help` of this entry point."""
    lines = [title, "Every option has its own keys: --cfg job prints the composed config, GROUP.KEY=VALUE sets one."]
    for group in GROUPS:
        known = options(group)
        if group == "defense":  # as defense@policies.NAME.defense=OPTION; those of classifiers do not serve
            known = {name: text for name, text in known.items() if text.startswith("generation:") or name == "none"}
        lines.append(f"\n{group}=" if group != "defense" else "\n+defense@policies.NAME.defense=")
        lines += [f"  {name:<24} {text}" for name, text in known.items()]
    lines += [
        "\nkeys",
        "  leak=[A,B]                  which attacks                  only=[A,B]  which policies",
        "  policies.NAME.access.profile=text|top_k|probs  .top_k=N  .logit_bias=true|false",
        "  budget.queries=N            of each attack on each policy; also budget.usd, budget.tokens",
        "  prices.usd_per_query=X      prices.usd_per_mtok_in=X       prices.usd_per_mtok_out=X",
        "  seed=N                      which prompts and tokens",
        "  run.device=auto|cpu|cuda    run.force=true repeats         run.progress=false",
    ]
    return "\n".join(lines) + f"\n\nusage: python -m {module} [GROUP=OPTION …] [KEY=VALUE …]\n"


def main() -> None:
    launch(run, "audit", __doc__ or "", AuditConfig, help_text)


if __name__ == "__main__":
    main()
