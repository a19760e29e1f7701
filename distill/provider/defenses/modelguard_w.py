from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from distill.errors import DistillError
from distill.provider.defenses._tensors import through
from distill.randomness import KeyedRandom
from distill.records import Answers, InterfaceProfile, Reveals

ROWS = 4096  # solved at once: what a processor's cache holds
HALVINGS = 36  # of an interval at most one long: kinks of the cost less than 2e-11 apart count as one
SLACK = 1e-12  # of a constraint, far above rounding and far below float32
FLAT = 1e-9  # slopes below this count as zero, so that rounding does not choose between optima


class ModelGuardW:
    """The answer that says least about the clean one, of all that keep its label within an L1 budget.

    Paper: ModelGuard: Information-Theoretic Defense Against Model Extraction Attacks (Tang et al., USENIX Security
    2024), section 3.3 (ModelGuard-W): ỹ minimises ``Σ_k ỹ_k log(y_k + floor)`` among the distributions with
    ``‖ỹ - y‖₁ <= l1_budget`` and ``ỹ_t - ỹ_j >= margin`` for the label t and every other class j.
    Threat model: a black-box attacker who trains on the posteriors and does not know of the defense. One who takes the
    top-1 label is not hindered; one who knows the code can simulate it.
    (n, classes) posteriors in and out; of optima that are equally good, the one that fills earlier classes.

    The linear program is solved exactly, all rows at once. With τ = ỹ_t given, the others fill up like water: mass goes
    from the most probable classes to the least probable ones, up to the cap τ - margin, until the budget is used or no
    move helps. The cost is convex and piecewise linear in τ; its minimum is found by halving, and its place from the
    two pieces that meet there. `transform` differentiates that solution.

    What the paper leaves open: where no answer within the budget has the margin (ties with a budget of the margin's
    size), the clean answer is returned. Rounding to float32 moves an answer by another 1e-7 in L1 at most.

    Args:
        l1_budget: The paper's ε: more than 0, at most 2.
        margin: By how much the label stays ahead: at least 0, less than 1.
        floor: What is added to a posterior under the logarithm; more than 0.
    """

    exposes = InterfaceProfile(Reveals.LOGITS)
    keeps_argmax = True
    deterministic = True
    l1_budget: float | None = 1.0

    def __init__(self, l1_budget: float = 1.0, margin: float = 1e-4, floor: float = 1e-6) -> None:
        if not 0 < l1_budget <= 2:
            raise DistillError(f"must be more than 0 and at most 2, not {l1_budget}", "defense.l1_budget")
        if not 0 <= margin < 1:
            raise DistillError(f"must be at least 0 and less than 1, not {margin}", "defense.margin")
        if not floor > 0:
            raise DistillError(f"must be more than 0, not {floor}", "defense.floor")
        self.l1_budget, self.margin, self.floor = l1_budget, margin, floor
        self._mass = l1_budget / 2  # what may move: each bit of it is taken from one class and given to another

    def query_info(self, inputs: np.ndarray) -> np.ndarray | None:
        return None

    def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
        return through(self.transform, answers, info, self.keeps_argmax)

    def transform(self, posteriors: torch.Tensor, info: torch.Tensor | None) -> torch.Tensor:
        return torch.cat([self._solve(part) for part in posteriors.split(ROWS)])

    def _solve(self, posteriors: torch.Tensor) -> torch.Tensor:
        label = posteriors.argmax(dim=1, keepdim=True)
        order = posteriors.detach().scatter(1, label, 2.0).argsort(dim=1, stable=True)  # ascending, the label last
        ranked = posteriors.gather(1, order).T.contiguous()  # classes first: all that follows is elementwise on rows
        program = _Program(ranked[:-1], ranked[-1], self._mass, self.margin)
        with torch.no_grad():
            costs = (ranked + self.floor).log()
            # The least that leaves room for the others, and a little less: no answer is feasible there.
            room = (1 + (len(ranked) - 1) * self.margin) / len(ranked)
            low = (ranked[-1] - self._mass).clamp(min=room) * (1 - 1e-6)
            high = torch.maximum(low, (ranked[-1] + self._mass).clamp(max=1.0))
            sums = sums_of(costs)
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                falls = program.slope(program.pattern(middle), costs, sums) < -FLAT
                low, high = torch.where(falls, middle, low), torch.where(falls, high, middle)
            left, right = program.pattern(low), program.pattern(high)
        # The minimum is where the pieces left and right of it are the same answer or, with nothing feasible on the
        # left, where its excess is gone. All are linear in τ.
        before, after, excess = program.answer(left, low), program.answer(right, low), program.excess(left, low)
        with torch.no_grad():
            rise = program.answer(right, low + 1) - after
            bend = rise - (program.answer(left, low + 1) - before)
            drop = excess - program.excess(left, low + 1)
        same = ((before - after) * bend).cumsum(dim=0)[-1] / bend.square().cumsum(dim=0)[-1].clamp(min=0.5)
        further = torch.where(left.excessive, excess / drop.clamp(min=0.5), same)
        solved = torch.where(right.excessive, ranked, (after + rise * further).clamp(min=0))
        return torch.zeros_like(posteriors).scatter(1, order, solved.T)


@dataclass(frozen=True)
class _Pattern:
    """Which class does what in the best answer for one τ. All (n,): numbers of classes or, from `unbound` on but for
    `filled`, truth values."""

    above: torch.Tensor  # 1.0 where τ is not below the clean posterior of the label, else 0.0
    free: torch.Tensor  # classes whose clean posterior is below the cap; those behind them are forced down to it
    full: torch.Tensor  # the least probable classes, filled up to the cap; the next one takes the rest
    drained: torch.Tensor  # the most probable classes, emptied; the next one gives the rest
    unbound: torch.Tensor  # the budget does not bind
    filled: torch.Tensor  # then the least probable classes, which have the cap; the next one has the rest
    excessive: torch.Tensor  # nothing is feasible: τ is too low
    crowded: torch.Tensor  # because the others don't find room below the cap (and not because of the budget)


class _Program:
    """The linear programs of n rows with τ given.

    Args:
        others: (classes - 1, n) clean posteriors that are not the label's, ascending.
        top: (n,) the label's.
        mass: How much may be taken, in all, from some classes and given to others.
        margin: The cap is τ less this.
    """

    def __init__(self, others: torch.Tensor, top: torch.Tensor, mass: float, margin: float) -> None:
        self.others, self.top, self.mass, self.margin = others, top, mass, margin
        self.sums = sums_of(others)
        self.classes = len(others)
        self.index = torch.arange(self.classes, device=others.device)[:, None]
        with torch.no_grad():
            self.searched = others.T.contiguous(), self.sums[:-1].T.contiguous()

    def pattern(self, tau: torch.Tensor) -> _Pattern:
        cap = tau - self.margin
        above = (tau >= self.top).to(tau)
        free = below(self.searched[0], cap)
        fill, drain = self._moved(above, free, tau)
        under = at(self.sums, free)
        full, most = torch.zeros_like(free), free
        for _ in range(self.classes.bit_length()):  # what fills the first j classes up to the cap grows with j
            middle = (full + most + 1) >> 1
            fits = middle * cap - at(self.sums, middle) <= fill
            full, most = torch.where(fits, middle, full), torch.where(fits, most, middle - 1)
        spare = drain - (self.classes - free) * cap  # once all that were forced to the cap are emptied
        emptied = self.classes - below(self.searched[1], under - spare)
        drained = torch.where(spare >= 0, emptied, (drain / cap).floor().clamp(min=0).long())
        filled = ((1 - tau) / cap).floor().long().clamp(max=self.classes - 1)
        whole = torch.minimum(filled, free)
        needed = whole * cap - at(self.sums, whole) + (1 - tau - filled * cap - at(self.others, filled)).clamp(min=0)
        crowded = (1 - tau - self.classes * cap) > SLACK
        return _Pattern(above, free, full, drained, needed <= fill, filled, crowded | (drain < -SLACK), crowded)

    def _moved(self, above: torch.Tensor, free: torch.Tensor, tau: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the budget gives to others than the label, and takes from them besides what the cap forces them to."""
        change = tau - self.top
        cut = self.sums[-1] - at(self.sums, free) - (self.classes - free) * (tau - self.margin)
        return self.mass - above * change, self.mass + (1 - above) * change - cut

    def slope(self, pattern: _Pattern, costs: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        """Of the best cost, in τ. `costs` (classes, n) with the label's last, and their `sums_of`."""
        rest = self.classes - pattern.drained
        taker = at(costs, pattern.full)
        giver = at(costs, (rest - 1).clamp(min=0))
        bound = at(sums, pattern.full) - pattern.full * taker - (giver + pattern.above * (taker - giver))
        kept = torch.maximum(rest, pattern.free)  # up to here from `free` on are those forced to the cap, not emptied
        bound += at(sums, kept) - at(sums, pattern.free) - (kept - pattern.free) * giver
        last = at(costs, pattern.filled)
        unbound = at(sums, pattern.filled) - (pattern.filled + 1) * last
        slope = costs[-1] + torch.where(pattern.unbound, unbound, bound)
        return torch.where(pattern.excessive, -torch.inf, slope)

    def answer(self, pattern: _Pattern, tau: torch.Tensor) -> torch.Tensor:
        """(classes, n), the label last: linear in τ and in the clean posteriors, also where the pattern doesn't fit."""
        cap, index = tau - self.margin, self.index
        fill, drain = self._moved(pattern.above, pattern.free, tau)
        rest = self.classes - pattern.drained
        fill = fill - pattern.full * cap + at(self.sums, pattern.full)
        drain = drain - at(self.sums, pattern.free) + at(self.sums, torch.minimum(rest, pattern.free))
        drain = drain - (self.classes - torch.maximum(rest, pattern.free)) * cap
        bound = torch.where((index < pattern.full) | (index >= pattern.free), cap, self.others)
        bound = bound + torch.where(index == pattern.full, fill, 0) - torch.where(index == rest - 1, drain, 0)
        bound = torch.where(index >= rest, 0, bound)
        unbound = torch.where(index == pattern.filled, 1 - tau - pattern.filled * cap, 0)
        unbound = torch.where(index < pattern.filled, cap, unbound)
        return torch.cat([torch.where(pattern.unbound, unbound, bound), tau[None]])

    def excess(self, pattern: _Pattern, tau: torch.Tensor) -> torch.Tensor:
        """By how much the constraint that is broken is broken; linear too."""
        _, drain = self._moved(pattern.above, pattern.free, tau)
        return torch.where(pattern.crowded, 1 - tau - self.classes * (tau - self.margin), -drain)


def sums_of(rows: torch.Tensor) -> torch.Tensor:
    """Index j: the sum of the first j."""
    return torch.cat([torch.zeros_like(rows[:1]), rows.cumsum(dim=0)])


def at(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """One entry of each column."""
    return table.gather(0, index[None])[0]


def below(ascending: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """How many entries of each row (not column) are below its bound."""
    return torch.searchsorted(ascending, bounds[:, None])[:, 0]
