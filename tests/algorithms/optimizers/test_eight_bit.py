"""8-bit states against a port of bitsandbytes, bounds of their error, and evenly spaced codes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms.optimizers.eight_bit import (
    EightBit,
    adamw_8bit,
    dynamic_map,
    eight_bit,
    encode,
    nearest,
)
from experiments.checkpoints.state import StateKeeper
from tests.algorithms.optimizers import eight_bit_official as official
from tests.algorithms.optimizers.walks import draw, walk

SIGNED = pytest.mark.parametrize("signed", [True, False])


def moments(signed, n=5000, seed=0):
    """Of many magnitudes, as an optimizer's; zeros among them, and a whole block of them."""
    rng = np.random.default_rng(seed)
    x = 10 ** rng.uniform(-9, 0, n) * (rng.choice([-1, 1], n) if signed else 1)
    x[::97] = 0
    x[512:768] = 0
    return x.astype(np.float32)


@SIGNED
def test_the_map_is_bitsandbytes(signed):
    ours, theirs = dynamic_map(signed), official.create_dynamic_map(signed)
    assert len(ours) == 256 and ours[-1] == 1 and 0 in ours
    np.testing.assert_allclose(ours, theirs, rtol=2e-7)  # the last bit of float32


@SIGNED
def test_codes_are_bitsandbytes(signed):
    x = moments(signed)
    found = jax.jit(encode, static_argnames="signed")(
        jnp.asarray(x).reshape(50, 100), signed=signed
    )
    codes, absmax = official.quantize(x, official.create_dynamic_map(signed), signed)
    np.testing.assert_array_equal(found.codes.reshape(-1), codes)
    np.testing.assert_array_equal(found.absmax, absmax)
    decoded = official.dequantize(codes, absmax, official.create_dynamic_map(signed))
    np.testing.assert_allclose(found.decode().reshape(-1), decoded, rtol=5e-7)


@SIGNED
def test_the_error_is_within_a_gap_and_signs_stay(signed):
    """Half a gap, but for what is negative and nearest to zero."""
    x = moments(signed)
    decoded = np.asarray(encode(jnp.asarray(x), signed=signed).decode())
    values = dynamic_map(signed)
    top = np.repeat([np.abs(b).max() for b in np.split(np.pad(x, (0, 120)), 20)], 256)[:5000]
    unit = np.divide(x, top, out=np.zeros_like(x), where=top > 0)
    upper = np.clip(np.searchsorted(values, unit), 1, 255)
    gap = np.where(unit < values[0], values[0] + 1, values[upper] - values[upper - 1])
    assert (np.abs(decoded - x) <= gap * top * (1 if signed else 0.5) * 1.00001).all()
    assert (decoded[x < 0] < 0).all() and (decoded[x >= 0] >= 0).all()
    assert (decoded[x == 0] == 0).all()


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_finds_what_a_search_does(signed):
    """At every border, one float below it and above, at both zeros, at all sizes, and for nan."""
    values = dynamic_map(signed)
    borders = (values[:-1] + values[1:]) / 2
    around = [np.nextafter(borders, np.float32(to)) for to in (-2, 2)]
    sizes = np.float32(10) ** np.random.default_rng(0).uniform(-12, 0, 5000).astype(np.float32)
    x = np.concatenate([borders, *around, values, sizes, [0.0, -0.0, np.nan]]).astype(np.float32)
    x = np.concatenate([x, -x]) if signed else x
    found = jax.jit(nearest, static_argnums=1)(jnp.asarray(x), signed)
    np.testing.assert_array_equal(found, np.searchsorted(borders, x))


def test_evenly_spaced_codes_lose_small_moments():
    """Relative errors of what is 1000 times below its block's largest, and of all."""
    x = moments(True)
    top = np.repeat([np.abs(b).max() for b in np.split(np.pad(x, (0, 120)), 20)], 256)[:5000]
    even = np.round(x / np.maximum(top, 1e-30) * 127) / 127 * top
    ours = np.asarray(encode(jnp.asarray(x), signed=True).decode())
    small = (np.abs(x) > 1e-5 * top) & (np.abs(x) < 1e-3 * top)
    lost = [np.median(np.abs(v - x)[small] / np.abs(x)[small]) for v in (ours, even)]
    assert lost[0] < 0.25 and lost[1] == 1  # to zero, all of them


def test_adam_is_bitsandbytes():
    """20 steps in float32: codes may differ where a moment is at the middle of two entries."""
    params, gradients = draw({"p": (5000,)}, 20)
    ours, state = walk(
        adamw_8bit(1e-2, b1=0.9, b2=0.99, weight_decay=0.0), params, gradients, jnp.float32
    )
    theirs = official.Adam8bit(params["p"], lr=1e-2, b1=0.9, b2=0.99)
    for step, g in zip(ours, gradients, strict=True):
        expected = theirs.step(g["p"].astype(np.float32))
        far = np.abs(step["p"] - expected) > 1e-5
        assert far.mean() < 2e-3 and np.abs(step["p"] - expected).max() < 1e-2
    moments = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, EightBit))
    found = [m for m in moments if isinstance(m, EightBit)]
    for ours_, (codes, _) in zip(found, theirs.states, strict=True):
        assert np.mean(np.asarray(ours_.codes).reshape(-1) != codes) < 5e-3


def test_it_tracks_adamw_within_15_percent_of_the_way():
    """Of a noisy quadratic whose gradients span three decades within each block: 9.6 %."""
    rng = np.random.default_rng(0)
    scale = 10 ** rng.uniform(-3, 0, (80, 80))
    gradients = [
        lambda p, n=n: {"p": scale * (p["p"] + 0.3 * n)} for n in rng.normal(size=(60, 80, 80))
    ]
    start = {"p": np.ones((80, 80))}
    found = [
        walk(make(1e-2, b1=0.9, b2=0.99, weight_decay=0.0), start, gradients, jnp.float32)[0][-1][
            "p"
        ]
        for make in (adamw_8bit, optax.adamw)
    ]
    moved = jnp.linalg.norm(found[1] - 1)
    assert jnp.linalg.norm(found[0] - found[1]) < 0.15 * moved


def test_small_leaves_stay_floats_and_large_ones_take_a_quarter():
    params = {"large": jnp.zeros((64, 64)), "small": jnp.zeros(4095)}
    state = adamw_8bit(1e-3).init(params)
    size = {
        len(leaf): leaf
        for leaf in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, EightBit))
        if isinstance(leaf, jax.Array) and leaf.ndim
    }
    assert set(size) == {4095}
    adam = state.inner[0]
    assert [adam.mu["large"].signed, adam.nu["large"].signed] == [True, False]
    stored = sum(x.nbytes for x in jax.tree.leaves(adam.mu["large"]))
    assert stored == 64 * 64 + 4 * 16


def test_moments_are_float32_for_bfloat16_parameters():
    params, gradients = draw({"p": (64, 64)}, 4)
    optimizer = eight_bit(optax.adamw(1e-2), smallest=1)
    wide, _ = walk(optimizer, params, gradients, jnp.float32)
    narrow, state = walk(optimizer, params, gradients, jnp.bfloat16)
    assert narrow[-1]["p"].dtype == jnp.bfloat16
    before = jax.eval_shape(optimizer.init, narrow[-1])
    assert jax.tree.structure(before) == jax.tree.structure(state)
    assert [x.dtype for x in jax.tree.leaves(before)] == [x.dtype for x in jax.tree.leaves(state)]
    np.testing.assert_allclose(narrow[-1]["p"].astype(np.float32), wide[-1]["p"], atol=0.04)


def test_it_comes_back_from_a_checkpoint(tmp_path):
    params, gradients = draw({"p": (64, 64)}, 3)
    _, state = walk(adamw_8bit(1e-2), params, gradients, jnp.float32)
    with StateKeeper(tmp_path) as keeper:
        keeper.save(1, state)
        found = keeper.latest(jax.eval_shape(lambda: state)).state
    assert found.inner[0].mu["p"].signed and not found.inner[0].nu["p"].signed
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_parameter_of_any_name_has_signed_momentum():
    """An attention's `v` is no second moment, and those of Adafactor are."""
    params = {"attention": {"v": {"kernel": jnp.ones((4, 4))}}}
    state = adamw_8bit(1e-3, smallest=1).init(params)
    assert state.inner[0].mu["attention"]["v"]["kernel"].signed
    state = eight_bit(optax.scale_by_factored_rms(factored=False), smallest=4).init(params)
    assert not state.inner.v["attention"]["v"]["kernel"].signed
