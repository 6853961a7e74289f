"""The programme against every choice there is, and what it says of budgets that cannot be met."""

import itertools

import numpy as np
import pytest

from algorithms.search.programme import choose


def every(scores, costs, budgets):
    """The least score within all budgets, by trying all; None where there is none."""
    u, k = scores.shape
    best = None
    for options in itertools.product(range(k), repeat=u):
        at = np.arange(u), np.array(options)
        if all(costs[name][at].sum() <= budgets[name] for name in budgets):
            found = scores[at].sum()
            best = found if best is None else min(best, found)
    return best


@pytest.mark.parametrize("seed", range(12))
def test_the_optimum_is_that_of_exhaustive_search(seed):
    """Scores over ten orders of magnitude, as layers' are; whole costs, so that sums tie."""
    rng = np.random.default_rng(seed)
    u, k = int(rng.integers(1, 7)), int(rng.integers(2, 5))
    scores = 10.0 ** rng.uniform(-8, 2, (u, k))
    costs = {name: rng.integers(1, 10, (u, k)).astype(float) for name in ("a", "b")[: 1 + seed % 2]}
    budgets = {name: float(rng.integers(2 * u, 8 * u)) for name in costs}
    expected = every(scores, costs, budgets)
    if expected is None:
        with pytest.raises(ValueError, match="cannot be met"):
            choose(scores, costs, budgets)
        return
    found = choose(scores, costs, budgets)
    at = np.arange(u), found.options
    assert all(costs[name][at].sum() <= budgets[name] for name in budgets)
    assert found.score == pytest.approx(scores[at].sum())
    assert found.score == pytest.approx(expected, rel=1e-6)
    assert found.bound <= found.score


def test_a_budget_is_never_exceeded_by_what_the_solver_tolerates():
    """Costs that differ by less than the solver's tolerance of a large budget."""
    scores = np.array([[1.0, 0.0]] * 3)
    costs = {"bits": np.array([[1e9, 1e9 + 1]] * 3)}
    found = choose(scores, costs, {"bits": 3e9 + 2})
    assert costs["bits"][np.arange(3), found.options].sum() <= 3e9 + 2


def test_more_room_never_costs():
    rng = np.random.default_rng(0)
    costs = np.sort(rng.uniform(1, 4, (20, 3)), axis=1)
    scores = -np.sort(-rng.uniform(size=(20, 3)), axis=1)
    found = [choose(scores, {"c": costs}, {"c": room}).score for room in (40, 50, 60, 80)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(scores.min(1).sum())
    uniform = scores[:, 1].sum()  # the trivial choice, at its own cost
    assert choose(scores, {"c": costs}, {"c": costs[:, 1].sum()}).score <= uniform


def test_an_option_left_out_is_not_chosen():
    scores = np.array([[np.inf, 1.0], [0.0, 5.0]])
    assert choose(scores, {"c": np.ones((2, 2))}, {"c": 2.0}).options.tolist() == [1, 0]


@pytest.mark.parametrize(
    "scores, costs, budgets, sentence",
    [
        ([[1, 2], [3, 4]], {"bits": [[2, 3], [2, 4]]}, {"bits": 3}, r"come to 4, 1\.333 times"),
        (
            [[1, 2]],
            {"a": [[1, 3]], "b": [[3, 1]]},
            {"a": 2, "b": 2},
            r"options 2\.000 times",
        ),
        ([[np.inf, np.inf]], {}, {}, r"Units \[0\] have no option"),
        ([[np.nan, 1]], {}, {}, "scores hold NaN"),
        ([[1, 2]], {"a": [[1, 3]]}, {"b": 2}, "budgets has b, of which"),
        ([[1, 2]], {"a": [[1], [3]]}, {"a": 2}, "is not scores.shape"),
        ([[1, 2]], {"a": [[1, 3]]}, {"a": 0}, "a=0 must be a positive number"),
    ],
)
def test_what_cannot_be_solved_is_a_sentence(scores, costs, budgets, sentence):
    costs = {name: np.array(each, float) for name, each in costs.items()}
    with pytest.raises(ValueError, match=sentence):
        choose(np.array(scores, float), costs, budgets)
