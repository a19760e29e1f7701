"""A shallower copy of a teacher whose weights are at hand: white-box."""

from __future__ import annotations

import copy
import re
from typing import Any, ClassVar

from torch import nn

from distill.errors import DistillError
from distill.records import Reveals


class TeacherLayers:
    """White-box: every n-th layer of the teacher, with its embeddings, norms and output matrix, to be trained further.

    Paper: Sanh, Debut, Chaumond and Wolf, "DistilBERT, a distilled version of BERT", EMC² at NeurIPS 2019, section 3:
    initialised "by taking one layer out of two".

    Nobody who only queries an API can do this. An experiment that grants white-box access to a local teacher hands its
    network over with `of_teacher`; without that the student refuses to be built.

    Args:
        every: Layers 0, every, 2·every, … are taken.
    """

    requires: ClassVar[Reveals] = Reveals.WEIGHTS

    def __init__(self, every: int = 2) -> None:
        if every < 1:
            raise ValueError(f"every is at least 1, not {every}")
        self.every = every
        self._teacher: Any = None

    def of_teacher(self, network: nn.Module) -> TeacherLayers:
        """The same student with a teacher's network (a Hugging Face causal language model) to copy from."""
        student = copy.copy(self)
        student._teacher = network
        return student

    def tokenizer(self, teachers: Any) -> Any:
        """The teacher's. Raises `DistillError` where it is not public."""
        if teachers is None:
            raise DistillError(
                "teacher_layers needs a local teacher with its tokenizer; else choose causal_lm", "student"
            )
        return teachers

    def build_language(self, tokenizer: Any) -> nn.Module:
        """A network of the teacher's class, with weights of its own in the teacher's type, on the CPU.

        Raises:
            DistillError: There is no teacher's network to copy from.
        """
        if self._teacher is None:
            raise DistillError(
                "teacher_layers copies the teacher's weights: it needs a local teacher and white-box access; choose "
                "llama for a student of one's own",
                "student",
            )
        config = copy.deepcopy(self._teacher.config)
        kept = range(0, config.num_hidden_layers, self.every)
        config.num_hidden_layers = len(kept)
        if config.to_dict().get("layer_types"):  # of models whose layers attend in different ways
            config.layer_types = [config.layer_types[layer] for layer in kept]
        network = type(self._teacher)(config).to(self._teacher.dtype)
        weights = self._teacher.state_dict()
        # A layer's number is the first one in the name of a weight.
        network.load_state_dict(
            {
                name: weights[re.sub(r"(?<=\.)\d+(?=\.)", lambda number: str(kept[int(number[0])]), name, count=1)]
                for name in network.state_dict()
            }
        )
        return network
