from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

from distill.errors import DistillError
from distill.language import Evidence


class LMEval:
    """Benchmarks of EleutherAI's lm-evaluation-harness, on every model whose weights are at hand.

    Paper: Lessons from the Trenches on Reproducible Evaluation of Language Models, Biderman et al., 2024,
    arXiv:2405.14782. Prompts, few-shot examples, answer extraction and scores are the harness's own; log-likelihoods
    and answers are computed by the same code as everywhere here. Numbers are named ``lm_eval/<task>/<metric>``, with
    ``,<filter>`` where a task has several ways to read an answer, ``<metric>_stderr`` beside them and ``n``, the number
    of documents.

    The package is optional: ``pip install lm-eval``. Its extra `math` (MATH, Minerva) asks for antlr 4.11 and Hydra 1.3
    for antlr 4.9, so that one can't be installed beside this framework.

    Args:
        tasks: Names of the harness's tasks, groups or tags, whose data comes from the hub; or folders with task yamls
            of your own, of which every task is run. Loaded at once, so that what is missing is told before a query is
            spent.
        num_fewshot: Worked examples in each prompt; None for each task's own number.
        limit: So many documents of each task, the first ones; None for all.
        apply_chat_template: Put the prompts as chats.

    Raises:
        DistillError: The package is not installed, a task is unknown or its data is not to be had, or a number is too
            small; and in `judge`, a task's answers are longer than a model's context.
    """

    section: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[Mapping[str, bool]] = {}  # the names are those of the tasks

    def __init__(
        self,
        tasks: Sequence[str],
        num_fewshot: int | None = None,
        limit: int | None = None,
        apply_chat_template: bool = False,
    ) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise DistillError("needs lm-eval: pip install lm-eval", "metric.lm_eval") from None
        if isinstance(tasks, str) or not tasks:
            raise DistillError(
                f"is a list of tasks or folders, such as [arc_easy], not {tasks!r}", "metric.lm_eval.tasks"
            )
        if num_fewshot is not None and num_fewshot < 0:
            raise DistillError(f"must be at least 0, not {num_fewshot}", "metric.lm_eval.num_fewshot")
        if limit is not None and limit < 1:
            raise DistillError(f"must be at least 1, not {limit}", "metric.lm_eval.limit")
        self.num_fewshot, self.limit, self.apply_chat_template = num_fewshot, limit, apply_chat_template
        folders = [task for task in tasks if Path(task).is_dir()]
        self._names = [task for task in tasks if task not in folders]
        self._manager = TaskManager(include_path=folders, include_defaults=bool(self._names))
        known = self._manager.all_tasks
        for name in self._names:
            if name not in known:
                near = ", ".join(get_close_matches(name, known)) or "a folder with task yamls"
                raise DistillError(f"no task or folder is named {name}; near it: {near}", "metric.lm_eval.tasks")
        for folder in folders:
            own = TaskManager(include_path=folder, include_defaults=False).all_subtasks
            if not own:
                raise DistillError(f"{folder} holds no yaml of a task", "metric.lm_eval.tasks")
            self._names += own
        try:
            self._manager.load(self._names)
        except Exception as error:  # whatever a task's own code or a download raises
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise DistillError(f"the tasks can't be loaded ({problem})", "metric.lm_eval.tasks") from error

    def judge(self, evidence: Evidence, who: str) -> dict[str, float]:
        """Empty for a model that is not at hand."""
        if who not in evidence.speakers:
            return {}
        from lm_eval import simple_evaluate

        from distill.metrics._harness import Harness

        speaker: Any = evidence.speakers[who]
        if self.apply_chat_template and speaker.tokenizer.chat_template is None:
            raise DistillError("this model has no chat template", "metric.lm_eval.apply_chat_template")
        found = simple_evaluate(
            model=Harness(speaker),
            tasks=self._names,
            task_manager=self._manager,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            apply_chat_template=self.apply_chat_template,
            bootstrap_iters=1000,
            log_samples=False,
            random_seed=None,  # the generators of a run belong to the run
            numpy_random_seed=None,
            torch_random_seed=None,
        )
        return {
            f"lm_eval/{task}/{'n' if name == 'sample_len' else name.removesuffix(',none')}": float(value)
            for task, values in found["results"].items()
            for name, value in values.items()
            if isinstance(value, (int, float))
        }
