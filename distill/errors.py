"""The errors that a user can cause or meet. Each is one line that says what, where and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DistillError(Exception):
    """A problem that the user can mend. The entry points print it as one line and exit with code 2.

    Args:
        message: What is wrong and what would be right, in one sentence.
        key: The config key that the user would change, such as ``budget.queries``.
    """

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(f"{key}: {message}" if key else message)
        self.key = key


class Incompatible(DistillError):
    """Two choices that are right by themselves do not fit together. A benchmark marks such a cell as not applicable."""


class BudgetExceeded(DistillError):
    """An attack asked for more answers than its budget affords. Nothing of that request was answered or charged.

    Attributes:
        affordable: How many of the queries the budget would still have paid for.
    """

    def __init__(self, asked: int, affordable: int, why: str) -> None:
        super().__init__(
            f"{asked} more answers were asked for, but the budget affords only {affordable} ({why})", "budget"
        )
        self.asked, self.affordable, self.why = asked, affordable, why

    def __reduce__(self) -> tuple[type, tuple[int, int, str]]:
        return type(self), (self.asked, self.affordable, self.why)


class BadAnswer(DistillError):
    """A teacher or a defense returned something that is not a distribution over the classes."""


class DamagedTransferSet(DistillError):
    """A transfer set is missing, incomplete or not what was written. It can be made again from the provider's log."""


class MissingAsset(DistillError):
    """A data set or model could not be found in any of the places where it may lie."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: ``" Did you mean 'rounding'?"`` or, if nothing is near, the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(known)}."
