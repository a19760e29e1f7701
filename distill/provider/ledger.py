"""What an attacker may spend and has spent."""

from __future__ import annotations

import math
import sys
from fractions import Fraction

from distill.errors import BudgetExceeded, DistillError
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
