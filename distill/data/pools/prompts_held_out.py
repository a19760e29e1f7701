from __future__ import annotations

from distill.errors import DistillError
from distill.language import Prompts, Task


class PromptsHeldOut:
    """In-distribution prompts: those of the task that its teacher was not trained on.

    Threat model: the attacker holds prompts of the task, but no answers. References are for controls; an attack asks.
    """

    def load_prompts(self, task: Task) -> Prompts:
        """Raises `DistillError` when the task holds none out."""
        if len(task.held_out) == 0:
            raise DistillError(f"{task.name} holds no prompts out; choose another pool", "pool")
        return task.held_out
