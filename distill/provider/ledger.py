"""What an attacker may spend and has spent."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from distill.errors import BudgetExceeded, DistillError
from distill.language import Completions
from distill.records import Budget, Cost


class Ledger:
    """Counts answers and money against a budget. Money is the count times the price, in the decimals as typed.

    Args:
        budget: The bounds.
        usd_per_query: The price of an answer.

    Raises:
        DistillError: The price is negative, or it is 0 and the budget is bounded in money alone.
    """

    def __init__(self, budget: Budget, usd_per_query: float) -> None:
        if not (usd_per_query >= 0 and math.isfinite(usd_per_query)):
            raise DistillError(f"must be at least 0, not {usd_per_query}", "access.usd_per_query")
        if budget.tokens is not None:
            raise DistillError(
                "the answers of a classifier have no tokens; set budget.queries or budget.usd", "budget.tokens"
            )
        if budget.queries is None and usd_per_query == 0:
            raise DistillError(
                "answers are free, so it bounds nothing; set budget.queries or access.usd_per_query", "budget.usd"
            )
        self._budget = budget
        # 0.3 / 0.1 is less than 3 in binary; what the user typed is exact in decimals.
        self._price = Fraction(str(usd_per_query))
        by_queries = sys.maxsize if budget.queries is None else budget.queries
        by_usd = sys.maxsize
        if budget.usd is not None and self._price:
            by_usd = Fraction(str(budget.usd)) // self._price
        self._limit = min(by_queries, by_usd)
        self._why = f"budget.queries={budget.queries}"
        if by_usd < by_queries:
            self._why = f"budget.usd={budget.usd} at {usd_per_query} a query"
        self.queries = 0
        self.teacher_forwards = 0
        self.seconds = 0.0

    def affordable(self) -> int:
        """How many more answers the budget pays for."""
        return self._limit - self.queries

    def require(self, queries: int) -> None:
        """Raises `BudgetExceeded` unless that many more answers are affordable."""
        if queries > self.affordable():
            raise BudgetExceeded(queries, self.affordable(), self._why)

    def bill(self, queries: int) -> None:
        """Count answers that were given. Raises `BudgetExceeded` rather than pass the budget."""
        self.require(queries)
        self.queries += queries

    def cost(self) -> Cost:
        return Cost(self.queries, float(self._price * self.queries), self.teacher_forwards, self.seconds)


@dataclass(frozen=True)
class Prices:
    """What an attacker is billed. Raises `DistillError` for a negative price."""

    usd_per_query: float = 0.0
    usd_per_mtok_in: float = 0.0
    usd_per_mtok_out: float = 0.0

    def __post_init__(self) -> None:
        for name, price in vars(self).items():
            if not (price >= 0 and math.isfinite(price)):
                raise DistillError(f"must be at least 0, not {price}", f"access.{name}")

    def of(self, tokens_in: np.ndarray, tokens_out: np.ndarray) -> list[Fraction]:
        """The price of each answer, in the decimals as typed."""
        query, per_in, per_out = (Fraction(str(price)) for price in vars(self).values())
        per_in, per_out = per_in / 1_000_000, per_out / 1_000_000
        return [query + a * per_in + b * per_out for a, b in zip(tokens_in.tolist(), tokens_out.tolist(), strict=True)]


class LanguageLedger:
    """Counts answers, tokens and money against a budget. How long an answer will be is not known before it is made, so
    a request counts as affordable where its longest answer is.

    Args:
        budget: The bounds.
        prices: What the attacker is billed.

    Raises:
        DistillError: Everything is free, and the budget is bounded in money alone.
    """

    def __init__(self, budget: Budget, prices: Prices) -> None:
        if budget.queries is None and budget.tokens is None and not any(vars(prices).values()):
            raise DistillError(
                "answers are free, so it bounds nothing; set budget.queries, budget.tokens or a price under access",
                "budget.usd",
            )
        self._budget, self.prices = budget, prices
        self._usd_bound = None if budget.usd is None else Fraction(str(budget.usd))
        self._usd = Fraction(0)
        self.queries = self.tokens_in = self.tokens_out = 0
        self.teacher_requests = self.teacher_tokens = 0
        self.defense_tokens = 0
        self.spent = Fraction(0)
        self.seconds = 0.0

    def affordable(self) -> int:
        """How many more answers the bound on queries pays for (a large number where there is none)."""
        return sys.maxsize if self._budget.queries is None else self._budget.queries - self.queries

    def fitting(self, tokens_in: np.ndarray, max_tokens: int) -> int:
        """How many of these requests, the first ones, are affordable even if each answer is as long as it may be."""
        fits = np.arange(1, len(tokens_in) + 1) <= self.affordable()
        if self._budget.tokens is not None:
            fits &= np.cumsum(tokens_in + max_tokens) <= self._budget.tokens - self.tokens_in - self.tokens_out
        if self._usd_bound is not None:
            left, longest = self._usd_bound - self._usd, np.full(len(tokens_in), max_tokens)
            for i, price in enumerate(self.prices.of(tokens_in, longest)):
                left -= price
                fits[i] &= left >= 0
        return int(fits.sum()) if fits.all() else int(fits.argmin())

    def require(self, tokens_in: np.ndarray, max_tokens: int) -> None:
        """Raises `BudgetExceeded` unless all of these requests are affordable at their longest."""
        if (fits := self.fitting(tokens_in, max_tokens)) < len(tokens_in):
            bounds = {name: bound for name, bound in vars(self._budget).items() if bound is not None}
            why = ", ".join(f"budget.{name}={bound}" for name, bound in bounds.items())
            raise BudgetExceeded(len(tokens_in), fits, f"{why}; answers of up to {max_tokens} tokens")

    def bill(self, completions: Completions) -> np.ndarray:
        """Count answers that were given. Returns (n,) float64 usd."""
        prices = self.prices.of(completions.prompt_tokens, completions.completion_tokens)
        self.queries += len(completions)
        self.tokens_in += int(completions.prompt_tokens.sum())
        self.tokens_out += int(completions.completion_tokens.sum())
        self._usd += sum(prices, Fraction(0))
        return np.array([float(price) for price in prices], dtype=np.float64)

    def worked(self, completions: Completions, prices: Prices) -> None:
        """Count answers that the teacher really made, at the prices that whoever calls it pays."""
        self.teacher_requests += len(completions)
        self.teacher_tokens += int(completions.completion_tokens.sum())
        self.spent += sum(prices.of(completions.prompt_tokens, completions.completion_tokens), Fraction(0))

    def cost(self) -> Cost:
        return Cost(
            queries=self.queries,
            usd=float(self._usd),
            teacher_forwards=self.teacher_requests,
            seconds=self.seconds,
            tokens_in=self.tokens_in,
            tokens_out=self.tokens_out,
            teacher_tokens=self.teacher_tokens,
            spent_usd=float(self.spent),
            defense_tokens=self.defense_tokens,
        )
