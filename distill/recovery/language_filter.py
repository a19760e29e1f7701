from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from distill.errors import DistillError, MissingAsset, nearest
from distill.language import SyntheticSet


class LanguageFilter:
    """Answers in other languages are dropped.

    Paper: langid.py: An Off-the-shelf Language Identification Tool, Lui and Baldwin, ACL 2012 (here the package
    py3langid, which reads 142 languages). Short texts are guesses: they are kept below `min_characters`.

    Args:
        languages: The ones to keep, as ISO 639 codes.
        min_probability: An answer is kept where the model gives these languages together at least so much.
        min_characters: Shorter answers are not looked at.

    Raises:
        DistillError: There is no language, or a probability is out of range.
    """

    knows: ClassVar[str] = "nothing"

    def __init__(
        self, languages: Sequence[str] = ("en",), min_probability: float = 0.5, min_characters: int = 20
    ) -> None:
        if not languages:
            raise DistillError("languages needs at least one, such as [en]")
        if not 0 <= min_probability <= 1:
            raise DistillError(f"min_probability must be between 0 and 1, not {min_probability}")
        self.languages, self.min_probability, self.min_characters = list(languages), min_probability, min_characters

    def curate(self, synthetic: SyntheticSet, knowledge: Mapping[str, Any]) -> SyntheticSet:
        """What is left; the others count as `language_filter`.

        Raises `MissingAsset` without py3langid, `DistillError` for a language that it does not know.
        """
        identifier = self._identifier
        for language in self.languages:
            if language not in identifier.labels:
                raise DistillError(
                    f"no language '{language}'.{nearest(language, identifier.labels)}", "recovery.languages"
                )
        mask = np.ones(len(synthetic), dtype=bool)
        for row, answer in enumerate(synthetic.completions.column):
            if len(answer.strip()) >= self.min_characters:
                ranked = dict(identifier.rank(answer))
                mask[row] = sum(ranked[language] for language in set(self.languages)) >= self.min_probability
        return synthetic.keep(mask, "language_filter")

    @cached_property
    def _identifier(self) -> Any:
        if importlib.util.find_spec("py3langid") is None:
            raise MissingAsset("language_filter needs the package py3langid: pip install py3langid", "recovery")
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
