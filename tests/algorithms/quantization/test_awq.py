"""AWQ against a port of the official code, its theory, and rounding.

The deviations are those of papers/awq.md.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from algorithms import formats, hessian, surgery, walk
from algorithms.quantization.awq import AWQStats, awq, channel_scale
from algorithms.quantization.rtn import rtn
from tests.algorithms.quantization import awq_official as official
from tests.algorithms.quantization import scaled_blocks

GROUP = 8


def layer(seed=0, o=6, i=24, n=60, salient=3):
    """W [o, i] and correlated inputs X [n, i], the first channels of each group far larger.

    Every group has weights of both signs: the official range need not hold zero (deviation 3).
    """
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(o, i))
    w[:, ::GROUP], w[:, 1::GROUP] = np.abs(w[:, ::GROUP]), -np.abs(w[:, 1::GROUP])
    x = rng.normal(size=(n, i)) + rng.normal(size=(n, 1))
    x[:, rng.permutation(i)[:salient]] *= 20
    return w, x


def exact(bits=3, **settings):
    return formats.integer(bits=bits, group_size=GROUP, scale_dtype=None, **settings)


@functools.cache
def method(bits=3, grid=20):
    """AWQ for exact integers, its scales compiled once for all tests."""
    made = awq(format=exact(bits), grid=grid)
    return made._replace(scale=jax.jit(made.scale))


def statistics(x):
    """What `observe` sums, in x's own precision."""
    x = jnp.asarray(x)
    return AWQStats(hessian.HessianStats(x.T @ x), jnp.abs(x).sum(0), jnp.asarray(len(x), x.dtype))


def output_error(w, rounded, x):
    return float(np.sum((x @ (w - np.asarray(rounded)).T) ** 2))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.some(3)
def test_scales_equal_the_official_search(x64, bits, seed):
    w, x = layer(seed)
    expected = official.search_scale(w, x, bits, GROUP)
    s = method(bits).scale(jnp.asarray(w), statistics(x))
    assert expected.ratio > 0  # the search has found something
    np.testing.assert_allclose(s, expected.scale, rtol=1e-12)
    rounded = exact(bits).nearest(jnp.asarray(w) * s) / s
    error = output_error(w, rounded, x) / x.shape[0] / w.shape[0]
    np.testing.assert_allclose(error, min(expected.losses), rtol=1e-9)


def test_any_grid_of_exponents_is_the_official_one(x64):
    w, x = layer(4)
    for grid in (1, 7):
        expected = official.search_scale(w, x, 3, GROUP, grid)
        s = method(3, grid).scale(jnp.asarray(w), statistics(x))
        np.testing.assert_allclose(s, expected.scale, rtol=1e-12)


def test_statistics_are_sums_over_whatever_chunks_come(x64):
    _, x = layer(5)
    stats = method().init(x.shape[1])
    for part in (x[:7], x[7:]):
        stats = method().observe(stats, jnp.asarray(part))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), stats, statistics(x))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_by_groups_is_the_official_clipping_on_the_same_ranges(x64, bits):
    """Deviation 4 is the ranges tried: here the official rule is given ours."""

    def ours(groups):
        low, high = groups.min(-1), groups.max(-1)
        return ((low * (1 - k / 100), high * (1 - k / 100)) for k in range(formats.RANGES))

    w, x = layer(6, o=16)
    expected = official.auto_clip(w, x, bits, GROUP, ours)
    plain = official.pseudo_quantize(w, bits, GROUP)
    assert (expected != plain).any()
    tensor = jax.jit(exact(bits, search="groups").quantize)(jnp.asarray(w), jnp.asarray(x.T @ x))
    np.testing.assert_allclose(tensor.dequantize(), expected, rtol=1e-9, atol=1e-12)


def test_deviation_4_finer_ranges_are_about_as_good(x64):
    """Neither set of ranges holds the other: over a layer ours come within a few percent."""
    w, x = layer(7, o=64)
    tensor = jax.jit(exact(search="groups").quantize)(jnp.asarray(w), jnp.asarray(x.T @ x))

    def own_error(rounded):  # each group's own output, which both minimize
        d = (w - np.asarray(rounded)).reshape(len(w), -1, GROUP)
        return np.sum(np.einsum("ngc,ogc->ngo", x.reshape(len(x), -1, GROUP), d) ** 2)

    mine = own_error(tensor.dequantize())
    theirs = own_error(official.auto_clip(w, x, 3, GROUP))
    assert mine < 1.05 * theirs < own_error(official.pseudo_quantize(w, 3, GROUP))


def test_a_scaled_channel_is_rounded_more_finely():
    """The paper's argument: with the group's range unmoved, s divides a channel's error by s."""
    rng = np.random.default_rng(8)
    w = rng.uniform(-0.2, 0.2, size=(4000, GROUP))
    w[:, 0], w[:, 1] = 1, -1  # the range, which the salient channel 5 stays inside
    s = np.ones(GROUP)
    s[5] = 4
    plain, scaled = (np.asarray(exact(4).nearest(jnp.asarray(w * t))) / t for t in (1, s))
    ratio = np.mean((scaled - w)[:, 5] ** 2) / np.mean((plain - w)[:, 5] ** 2)
    assert 0.8 / 16 < ratio < 1.2 / 16


def test_scales_do_not_depend_on_the_unit_of_the_activations():
    w, x = layer(9)
    first, again = (
        method().scale(jnp.asarray(w, jnp.float32), statistics(jnp.asarray(c * x, jnp.float32)))
        for c in (1, 8)
    )
    np.testing.assert_allclose(first, again, rtol=1e-5)


def test_equal_channels_stay_as_they_are():
    w, _ = layer(10)
    x = np.sign(np.random.default_rng(0).normal(size=(50, 24)))
    s = method().scale(jnp.asarray(w, jnp.float32), statistics(jnp.float32(x)))
    np.testing.assert_array_equal(s, 1)


def test_lowers_the_output_error_that_rounding_leaves():
    format = formats.integer(bits=3, group_size=GROUP)
    w, x = (jnp.asarray(t, jnp.float32) for t in layer(11, o=32, i=64, n=200, salient=4))
    s = jax.jit(awq(format=format).scale)(w, statistics(x))
    compress = jax.jit(rtn(format=format).compress)
    scaled, plain = compress(w * s, None).dequantize() / s, compress(w, None).dequantize()
    assert output_error(w, scaled, x) < 0.5 * output_error(w, plain, x)


FORMATS = {
    "groups": formats.integer(bits=3, group_size=GROUP, search="groups"),
    "weights": formats.integer(bits=3, group_size=GROUP, search="weights"),
    "blocks": formats.fp8(rows=4, columns=16),
    "nvfp4": formats.nvfp4(group_size=8),
    "mxfp4": formats.microscaling(group_size=8),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_never_costs_more_than_plain_rounding(name):
    format = FORMATS[name]
    w, x = (jnp.asarray(t, jnp.float32) for t in layer(12))
    s = jax.jit(awq(format=format).scale)(w, statistics(x))
    whole = dataclasses.replace(format, search=None)
    nearest = jax.jit(whole.nearest)
    scaled, plain = nearest(w * s) / s, nearest(w)
    assert jnp.isfinite(s).all() and (s > 0).all()
    assert output_error(w, scaled, x) <= 1.0001 * output_error(w, plain, x)


def test_dead_inputs_and_dead_layers():
    w, x = (np.asarray(t, np.float32) for t in layer(13))
    without = method().scale(jnp.asarray(w), statistics(x))
    x[:, [2, 9]] = 0
    s = method().scale(jnp.asarray(w), statistics(x))
    np.testing.assert_array_equal(s[jnp.asarray([2, 9])], 1)
    alive = np.delete(np.asarray(s), [2, 9])
    np.testing.assert_allclose(alive.max() * alive.min(), 1, rtol=1e-5)
    assert (without != 1).all()
    for weight, inputs in ((w, 0 * x), (0 * w, x), (0 * w, 0 * x)):
        s = method().scale(jnp.asarray(weight), statistics(inputs))
        np.testing.assert_array_equal(s, 1)
    tiny = channel_scale(jnp.asarray([1e-30, 1.0]), jnp.float32(0.95))
    np.testing.assert_allclose(tiny, [1e-2, 1e2], rtol=1e-5)  # held at 1e-4, then centred


def test_what_is_not_finite_is_not_hidden():
    w, x = (np.asarray(t, np.float32) for t in layer(14))
    for bad in (np.nan, np.inf, 1e30):  # the last overflows when squared
        x[3, 5] = bad
        s = method().scale(jnp.asarray(w), statistics(x))
        assert not jnp.isfinite(s).all()


@pytest.mark.parametrize("grid", [0, -3])
def test_refuses_grids_of_nothing(grid):
    with pytest.raises(ValueError, match=f"grid={grid} must be at least 1"):
        awq(format=exact(), grid=grid)


def test_refuses_to_scale_for_no_format():
    with pytest.raises(ValueError, match="format=null .* give scaling.format one"):
        awq(format=None)


def test_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="group_size=7 must divide"):
        w, x = layer()
        awq(format=formats.integer(group_size=7)).scale(jnp.float32(w), statistics(jnp.float32(x)))


def equations(jaxpr):
    """The number of equations of a traced graph, those inside its loops and calls included."""
    inner = (
        p for e in jaxpr.eqns for p in jax.tree.leaves(list(e.params.values()), is_leaf=_graph)
    )
    return len(jaxpr.eqns) + sum(equations(getattr(p, "jaxpr", p)) for p in inner if _graph(p))


def _graph(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def test_the_graph_grows_neither_with_width_nor_with_the_grid():
    def size(i, grid):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, i), (i, i), (i,), ())]

        def scale(w, gram, magnitude, tokens):
            stats = AWQStats(hessian.HessianStats(gram), magnitude, tokens)
            return awq(format=exact(), grid=grid).scale(w, stats)

        return equations(jax.make_jaxpr(scale)(*shapes).jaxpr)

    assert size(480, 20) == size(48, 2) < 300


@pytest.fixture(scope="module")
def scaled():
    """A block after scaling."""
    block = scaled_blocks.block()
    walk.transform_block(block, scaled_blocks.chunks(2), method(3))
    return block


def test_a_scaled_block_computes_what_it_did(scaled):
    before = scaled_blocks.block()
    assert min(scaled_blocks.moved(before, scaled).values()) > 0.1
    np.testing.assert_allclose(
        scaled_blocks.output(scaled), scaled_blocks.output(before), rtol=1e-4, atol=1e-4
    )


def test_a_scaled_block_loses_less_to_rounding(scaled):
    expected = scaled_blocks.output(scaled_blocks.block())

    def error(block):
        for path, w in scaled_blocks.weights(block).items():
            surgery.set_weight(surgery.linear_at(block, path), exact(3).nearest(w))
        return np.sum((scaled_blocks.output(block) - expected) ** 2)

    assert error(nnx.clone(scaled)) < 0.8 * error(scaled_blocks.block())
