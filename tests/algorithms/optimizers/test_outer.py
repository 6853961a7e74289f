"""Outer optimizers and EMA-Nesterov: against the authors' code, optax, and the inner one alone."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms.optimizers.ema_nesterov import ema_nesterov
from algorithms.optimizers.evaluation import eval_params
from algorithms.optimizers.outer import lookahead, snoo
from tests.algorithms.optimizers import outer_official as official
from tests.algorithms.optimizers.walks import draw, same, walk

SHAPES = {"matrix": (6, 4), "vector": (5,)}
CURVATURE = np.geomspace(0.02, 1, 12)


def slope(p):
    return {"x": CURVATURE * p["x"]}


def loss(p):
    return float(np.sum(CURVATURE * np.asarray(p["x"]) ** 2) / 2)


def test_snoo_is_the_authors_code_a_step_later(x64):
    """Theirs, begun at its step 1: after k inner steps comes the first outer one."""
    params, gradients = draw(SHAPES, 20)
    ours, state = walk(
        snoo(optax.sgd(0.1), step_size=0.7, momentum=0.5, every=4), params, gradients
    )
    theirs = official.Snoo(params, lr=0.7, momentum=0.5, k=4, current_step=1)
    expected, now = [], params
    for g in gradients:
        now = theirs.step({name: now[name] - 0.1 * g[name] for name in now})
        expected.append(now)
    same(ours, expected)
    same([eval_params(state, ours[-1])], [theirs.outer])  # step 20 is an outer one


def test_lookahead_is_optaxs_for_ordinary_parameters(x64):
    params, gradients = draw(SHAPES, 17)
    ours, state = walk(lookahead(optax.adam(0.1), step_size=0.3, every=5), params, gradients)
    theirs = optax.lookahead(optax.adam(0.1), sync_period=5, slow_step_size=0.3)
    pair = optax.LookaheadParams.init_synced({name: jnp.asarray(p) for name, p in params.items()})
    now, expected = theirs.init(pair), []
    for g in gradients:
        updates, now = theirs.update(g, now, pair)
        pair = optax.apply_updates(pair, updates)
        expected.append(pair.fast)
    same(ours, expected)
    same([eval_params(state, ours[-1])], [pair.slow])


def test_a_whole_step_without_momentum_is_the_inner_optimizer(x64):
    params, gradients = draw(SHAPES, 10)
    alone, _ = walk(optax.adam(0.1), params, gradients)
    same(
        walk(snoo(optax.adam(0.1), step_size=1.0, momentum=0.0, every=3), params, gradients)[0],
        alone,
    )
    same(walk(lookahead(optax.adam(0.1), step_size=1.0, every=3), params, gradients)[0], alone)


def test_snoo_is_farther_than_its_inner_optimizer():
    start = {"x": np.ones(12)}
    alone, _ = walk(optax.sgd(0.3), start, [slope] * 60)
    outer, _ = walk(snoo(optax.sgd(0.3), step_size=0.7, momentum=0.6, every=5), start, [slope] * 60)
    assert loss(outer[-1]) < 0.6 * loss(alone[-1])


def test_lookahead_is_steadier_than_its_inner_optimizer():
    """With noise in the gradients: the slow parameters' distance from the minimum."""
    noise = np.random.default_rng(0).normal(size=(200, 400))
    gradients = [lambda p, n=n: {"x": p["x"] + n} for n in noise]
    seen, state = walk(lookahead(optax.sgd(0.5)), {"x": np.ones(400)}, gradients)
    alone, _ = walk(optax.sgd(0.5), {"x": np.ones(400)}, gradients)
    slow = eval_params(state, seen[-1])["x"]
    assert jnp.mean(slow**2) < 0.7 * jnp.mean(alone[-1]["x"] ** 2)


SETTINGS = dict(steps=20, lookahead=0.6, decay=0.9, begin=0.25, end=0.75)


def test_ema_nesterov_is_the_official_code(x64):
    start = {"x": np.ones(12)}
    ours = ema_nesterov(optax.sgd(0.3), **SETTINGS)
    theirs = official.EmaNesterov(
        start["x"], lambda p, g: p - 0.3 * g,
        lookahead_stepsize=0.6, lookahead_ema=0.9, warmup_step=5, rest_step=15,
    )  # fmt: skip
    expected = []
    for _ in range(20):
        expected.append({"x": theirs.step(slope({"x": theirs.nesterov_step()})["x"])})
    found = []
    for n in range(20):
        seen, state = walk(ours, start, [slope] * (n + 1))
        found.append(eval_params(state, seen[-1]))
    same(found, expected)
    assert not np.allclose(seen[10]["x"], expected[10]["x"])  # training sees the point ahead
    same(seen[-1:], expected[-1:])  # and none at the end


def test_of_the_last_step_alone_it_is_nesterovs_method(x64):
    """γ = 0: y = x + β (x - x_before)."""
    ours = ema_nesterov(optax.sgd(0.3), steps=30, lookahead=0.8, decay=0.0, begin=0.0, end=1.0)
    seen, state = walk(ours, {"x": np.ones(12)}, [slope] * 29)
    x = before = np.ones(12)
    for _ in range(29):
        y = x + 0.8 * (x - before)
        x, before = y - 0.3 * CURVATURE * y, x
    np.testing.assert_allclose(eval_params(state, seen[-1])["x"], x, rtol=1e-9)


def test_without_lookahead_it_is_the_inner_optimizer(x64):
    params, gradients = draw(SHAPES, 10)
    wrapped = ema_nesterov(optax.adam(0.1), steps=10, lookahead=0.0)
    same(walk(wrapped, params, gradients)[0], walk(optax.adam(0.1), params, gradients)[0])


def test_ema_nesterov_is_farther_than_its_inner_optimizer():
    start = {"x": np.ones(12)}
    alone, _ = walk(optax.sgd(0.3), start, [slope] * 60)
    ours = ema_nesterov(optax.sgd(0.3), steps=60, lookahead=0.6, decay=0.9, begin=0.1, end=0.9)
    seen, state = walk(ours, start, [slope] * 60)
    assert loss(eval_params(state, seen[-1])) < 0.5 * loss(alone[-1])


def test_the_lookahead_may_be_a_schedule(x64):
    start = {"x": np.ones(12)}
    two = [
        ema_nesterov(optax.sgd(0.3), steps=20, lookahead=b, decay=0.9, begin=0.0, end=1.0)
        for b in (lambda count: 0.6 * (count >= 5) * (count < 15), 0.6)
    ]
    windowed = ema_nesterov(optax.sgd(0.3), **SETTINGS)
    found = [walk(o, start, [slope] * 19)[0] for o in (*two, windowed)]
    same(found[0], found[2])
    assert not np.allclose(found[1][-1]["x"], found[2][-1]["x"])


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: snoo(optax.sgd(1.0), momentum=1.0), "momentum=1.0 must be at least 0"),
        (lambda: snoo(optax.sgd(1.0), every=0), "every=0 must be at least 1 step"),
        (lambda: lookahead(optax.sgd(1.0), step_size=0.0), "step_size=0.0 must be above 0"),
        (lambda: ema_nesterov(optax.sgd(1.0), steps=9, decay=1.0), "decay=1.0 must be at least 0"),
        (
            lambda: ema_nesterov(optax.sgd(1.0), steps=9, begin=0.9),
            "begin=0.9 and end=0.76 must be",
        ),
    ],
)
def test_bad_settings_are_named(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("wrap", [snoo, lambda inner: ema_nesterov(inner, steps=9)])
def test_parameters_are_asked_for(wrap):
    optimizer, g = wrap(optax.sgd(1.0)), {"x": jnp.ones(3)}
    with pytest.raises(ValueError, match="params=None must be the parameters"):
        optimizer.update(g, optimizer.init(g))
