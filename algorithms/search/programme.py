"""The multiple-choice knapsack: of each unit one option, the least total score within all budgets.

    minimize   Σ_u Σ_k s_uk z_uk
    subject to Σ_k z_uk = 1,   Σ_u Σ_k c_uk z_uk <= B of every cost c,   z_uk in {0, 1}

Solved exactly by branch and bound over linear relaxations (HiGHS, in `scipy.optimize.milp`), which
proves its optimum: `Choice.bound`. Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, ch. 11.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize, sparse

TOLERANCE = 1e-6  # of HiGHS, in units of a budget: what a choice may be above it before it is cut

type Costs = Mapping[str, Float[np.ndarray, "_ _"]]  # of `scores`' shape


class Choice(NamedTuple):
    """One option of each unit."""

    options: Int[np.ndarray, " u"]
    score: float  # of all units together
    bound: float  # no choice within the budgets has less


def choose(
    scores: Float[np.ndarray, "u k"], costs: Costs, budgets: Mapping[str, float | int]
) -> Choice:
    """The choice with the least total score.

    scores: infinite where a unit cannot have an option. costs: of each option, by name; those of
    `budgets` count, which are for all units together. Raises ValueError if the budgets cannot be
    met, with the least that can be.
    """
    _check(scores, costs, budgets)
    allowed = np.isfinite(scores)
    extra, left = _beyond_cheapest(allowed, costs, budgets)
    for cost in [extra[name] for name in extra if left[name] == 0]:
        allowed &= cost == 0
    used = {name: extra[name] / left[name] for name in extra if left[name] > 0}
    least = np.where(allowed, scores, np.inf).min(1, keepdims=True)
    above = np.where(allowed, scores - least, 0.0)
    scale = above.sum() / max(np.count_nonzero(above), 1) or 1.0  # so that tolerances mean little
    room, bound = 1.0, None
    while True:
        found = _solve(above / scale, allowed, used, room)
        if found.x is None:
            raise ValueError(_infeasible(allowed, used, budgets))
        options = found.x.reshape(scores.shape).argmax(1)
        bound = found.mip_dual_bound if bound is None else bound
        most = max((_total(cost, options) for cost in used.values()), default=0.0)
        if most <= 1.0:
            score = _total(scores, options)
            return Choice(options, score, min(score, float(bound * scale + least.sum())))
        room -= most - 1.0 + TOLERANCE  # HiGHS lets a sum be above its bound by as much


def _check(scores, costs: Costs, budgets: Mapping[str, float | int]) -> None:
    if np.isnan(scores).any() or np.isneginf(scores).any():
        raise ValueError("scores hold NaN or -infinity: an option is left out by +infinity.")
    if stuck := np.flatnonzero(np.isposinf(scores).all(1)).tolist():
        raise ValueError(f"Units {stuck} have no option at all: every score is infinite.")
    for name, budget in budgets.items():
        if name not in costs:
            raise ValueError(f"budgets has {name}, of which there are no costs.")
        if np.shape(costs[name]) != scores.shape:
            raise ValueError(
                f"costs[{name!r}].shape={np.shape(costs[name])} is not {scores.shape=}."
            )
        if not 0 < budget < np.inf:
            raise ValueError(f"budgets: {name}={budget} must be a positive number.")


def _total(table: Float[np.ndarray, "u k"], options: Int[np.ndarray, " u"]) -> float:
    return float(table[np.arange(len(options)), options].sum())


def _solve(objective, allowed, used: Mapping[str, Float[np.ndarray, "u k"]], room: float):
    u, k = objective.shape
    one = sparse.kron(sparse.eye(u), np.ones((1, k)))
    constraints = [optimize.LinearConstraint(one, 1, 1)]
    constraints += [optimize.LinearConstraint(c.reshape(1, -1), -np.inf, room)
                    for c in used.values()]  # fmt: skip
    return optimize.milp(
        objective.ravel(), integrality=np.ones(u * k), constraints=constraints,
        bounds=optimize.Bounds(0, allowed.ravel().astype(float)), options={"mip_rel_gap": 0.0},
    )  # fmt: skip


def _beyond_cheapest(
    allowed, costs: Costs, budgets: Mapping[str, float | int]
) -> tuple[dict[str, Float[np.ndarray, "u k"]], dict[str, float]]:
    """What options cost beyond each unit's cheapest, and what a budget leaves for it: sums of which
    a tolerance is a small part, however large the budget.

    Raises ValueError for a budget that the cheapest options are above.
    """
    extra, left = {}, {}
    for name, budget in budgets.items():
        table = np.asarray(costs[name], float)
        cheapest = np.where(allowed, table, np.inf).min(1, keepdims=True)
        extra[name], left[name] = table - cheapest, budget - float(cheapest.sum())
        if left[name] < 0:
            total = cheapest.sum()
            raise ValueError(
                f"budgets: {name}={budget:g} cannot be met: the cheapest options come to "
                f"{total:.6g}, {total / budget:.3f} times as much."
            )
    return extra, left


def _infeasible(allowed, used, budgets: Mapping[str, float | int]) -> str:
    names = " and ".join(f"{name}={budget:g}" for name, budget in budgets.items())
    return (
        f"budgets: {names} cannot be met together, though each can: raise what they leave beyond "
        f"the cheapest options {_least_factor(allowed, used):.3f} times."
    )


def _least_factor(allowed, used) -> float:
    """The least t such that t times every budget can be met."""
    u, k = allowed.shape
    one = sparse.hstack([sparse.kron(sparse.eye(u), np.ones((1, k))), np.zeros((u, 1))])
    below = np.stack([np.append(cost.ravel(), -1.0) for cost in used.values()])
    found = optimize.milp(
        np.append(np.zeros(u * k), 1.0), integrality=np.append(np.ones(u * k), 0),
        constraints=[optimize.LinearConstraint(one, 1, 1),
                     optimize.LinearConstraint(below, -np.inf, 0)],
        bounds=optimize.Bounds(0, np.append(allowed.ravel().astype(float), np.inf)),
    )  # fmt: skip
    return float(found.x[-1])
