"""Averages of parameters: against optax's own and a port of LAWA, and what they are good for."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms.optimizers.ema import ema, tail_ema
from algorithms.optimizers.evaluation import eval_params
from algorithms.optimizers.lawa import lawa
from algorithms.optimizers.model_soups import greedy_soup, uniform_soup
from tests.algorithms.optimizers.walks import draw, same, walk

SHAPES = {"matrix": (6, 4), "vector": (5,)}


def followed(wrap, steps, seed=0):
    """What is trained and what is evaluated after each of the steps."""
    params, gradients = draw(SHAPES, steps, seed)
    found = [walk(wrap(optax.sgd(0.1)), params, gradients[: n + 1]) for n in range(steps)]
    return [seen[-1] for seen, _ in found], [eval_params(state, seen[-1]) for seen, state in found]


def test_ema_is_optaxs_corrected_average_of_the_parameters(x64):
    trained, evaluated = followed(lambda inner: ema(inner, decay=0.8), 12)
    average = optax.ema(0.8, debias=True)
    state, expected = average.init(trained[0]), []
    for params in trained:
        mean, state = average.update(params, state)
        expected.append(mean)
    same(evaluated, expected)


def test_a_slow_ema_is_the_mean_so_far(x64):
    trained, evaluated = followed(lambda inner: ema(inner, decay=1 - 1e-9), 6)
    mean = jax.tree.map(lambda *x: sum(x) / len(x), *trained)
    same(evaluated[-1:], [mean], rtol=1e-6)


def test_tail_ema_is_an_ema_that_starts_late(x64):
    trained, evaluated = followed(lambda inner: tail_ema(inner, steps=12, tail=0.5, decay=0.8), 12)
    same(evaluated[:7], trained[:7])  # 7 is the first in the average
    weights = 0.8 ** np.arange(5, -1, -1)
    mean = jax.tree.map(lambda *x: np.average(x, axis=0, weights=weights), *trained[6:])
    same(evaluated[-1:], [mean])


class OfficialLawa:
    """A port of `LAWAScheduler`, github.com/JeanKaddour/LAWA at commit 2168382, lawa.py."""

    def __init__(self, freq, k):
        self.freq, self.k, self.steps, self.store = freq, k, 0, collections.deque()
        self.average = None

    def step(self, params):
        self.steps += 1
        if self.steps % self.freq == 0:
            self.store.append(params)
            if len(self.store) > self.k:
                self.store.popleft()
            total = self.store[0]
            for other in list(self.store)[1:]:
                total = jax.tree.map(np.add, total, other)
            self.average = jax.tree.map(lambda x: x / len(self.store), total)
        return self.average


def test_lawa_is_the_official_code(x64):
    """After the first checkpoint; before it, the parameters."""
    trained, evaluated = followed(lambda inner: lawa(inner, every=3, checkpoints=2), 14)
    official = OfficialLawa(3, 2)
    expected = [official.step(params) for params in trained]
    same(evaluated[:2], trained[:2])
    same(evaluated[2:], expected[2:])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: ema(inner, decay=0.98),
        lambda inner: tail_ema(inner, steps=200, tail=0.5, decay=0.98),
        lambda inner: lawa(inner, every=5, checkpoints=10),
    ],
)
def test_an_average_is_nearer_to_the_minimum_than_its_last_member(wrap):
    """Of a quadratic with noise in its gradients, in each of 8 dimensions' mean over draws."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(200, 8, 50))
    gradients = [lambda p, n=n: {"x": p["x"] + n} for n in noise]
    seen, state = walk(wrap(optax.sgd(0.3)), {"x": np.ones((8, 50))}, gradients)
    last, mean = (float(jnp.mean(p["x"] ** 2)) for p in (seen[-1], eval_params(state, seen[-1])))
    assert mean < 0.3 * last


@pytest.mark.parametrize("wrap", [ema, lambda inner: lawa(inner, every=1, checkpoints=64)])
def test_averages_are_float32_where_parameters_are_not(wrap):
    """In bfloat16, steps of a 500th of the last bit's size would be lost."""
    params = {"x": np.ones(3)}
    flips = [{"x": np.full(3, s)} for s in (-1.0, 1.0) * 32]
    seen, state = walk(wrap(optax.sgd(2**-7)), params, flips, jnp.bfloat16)
    assert seen[-1]["x"].dtype == eval_params(state, seen[-1])["x"].dtype == jnp.bfloat16
    held = jax.tree.leaves(state[1])[0]
    assert held.dtype == jnp.float32
    mean = held if held.ndim == 1 else held.mean(0)
    assert float(mean[0]) == pytest.approx(1 + 2**-8, abs=1e-4)  # bfloat16 has no such number


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: ema(optax.sgd(1.0), decay=1.0), "decay=1.0 must be above 0 and below 1"),
        (lambda: tail_ema(optax.sgd(1.0), steps=0), "steps=0 must be at least 1"),
        (lambda: tail_ema(optax.sgd(1.0), steps=9, tail=0.0), "tail=0.0 must be above 0"),
        (lambda: lawa(optax.sgd(1.0), every=0), "every=0 must be at least 1 step"),
        (lambda: lawa(optax.sgd(1.0), checkpoints=0), "checkpoints=0 must be at least 1"),
        (lambda: uniform_soup([]), "must be at least one pytree"),
    ],
)
def test_bad_settings_are_named(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def official_greedy(members, score):
    """A port of step 4 of github.com/mlfoundations/model-soups at commit d5398f1, main.py."""
    ranked = [i for i, _ in sorted(enumerate(map(score, members)), key=lambda pair: -pair[1])]
    soup, kept = members[ranked[0]], [ranked[0]]
    best = score(soup)
    for i in ranked[1:]:
        n = len(kept)
        candidate = {k: soup[k] * (n / (n + 1.0)) + members[i][k] * (1.0 / (n + 1)) for k in soup}
        if score(candidate) > best:
            kept.append(i)
            best, soup = score(candidate), candidate
    return soup, kept


def members(seed):
    """Around the minimum at 0, some of them far off."""
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=12) + far} for far in (0, 0, 0.1, 3, 0, 4, 0.2)]


@pytest.mark.parametrize("seed", range(5))
def test_a_greedy_soup_is_the_official_one_and_no_worse_than_its_best_member(x64, seed):
    def score(p):
        return -float(np.sum(np.asarray(p["x"]) ** 2))

    ingredients = members(seed)
    soup, kept = greedy_soup(ingredients, score)
    expected, theirs = official_greedy(ingredients, score)
    assert list(kept) == theirs and len(kept) > 1
    np.testing.assert_allclose(soup["x"], expected["x"], rtol=1e-12)
    assert score(soup) > max(map(score, ingredients))
    assert score(soup) > score(uniform_soup(ingredients))


def test_a_uniform_soup_is_the_mean_in_the_members_dtype():
    soup = uniform_soup([{"x": jnp.full(3, v, jnp.bfloat16)} for v in (1.0, 1.0078125, 1.0)])
    assert soup["x"].dtype == jnp.bfloat16 and (soup["x"] == 1).all()
    alone = uniform_soup([{"x": jnp.arange(3.0)}])
    np.testing.assert_array_equal(alone["x"], jnp.arange(3.0))
