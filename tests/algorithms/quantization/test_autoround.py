"""AutoRound against a port of the official code, its theory, and other roundings.

The deviations are those of papers/autoround.md.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import blockwise, formats
from algorithms.blockwise import learn_block
from algorithms.formats import integer
from algorithms.quantization.autoround import Parameters, autoround, quantize_weight
from tests.algorithms.integers import gptq, rtn
from tests.algorithms.learning import (
    PATHS,
    block,
    flows,
    layerwise_error,
    output_error,
    through,
    weight,
)
from tests.algorithms.quantization import autoround_official as official


def layer(seed=0, o=5, i=24, n=40):
    """W [o, i], correlated inputs X [n, i] and targets Y [n, o] near X Wᵀ."""
    rng = np.random.default_rng(seed)
    w, x = rng.normal(size=(o, i)), rng.normal(size=(n, i)) @ rng.normal(size=(i, i))
    return w, x, x @ w.T


def drawn(w, seed=1, c=8):
    """Parameters away from where they begin, in the official shape: groups are rows."""
    rng = np.random.default_rng(seed)
    groups = w.size // c
    return official.Parameters(
        rng.uniform(-0.5, 0.5, (groups, c)),
        rng.uniform(0.5, 1, groups),
        rng.uniform(0.5, 1, groups),
    )


def ours(parameters, w):
    """The official parameters in our shapes: V [o, i], and a table [o, g] of each factor."""
    tables = [jnp.asarray(table.reshape(len(w), -1)) for table in parameters[1:]]
    return Parameters(jnp.asarray(parameters.value.reshape(w.shape)), *tables)


def exact(bits, symmetric):
    return integer(bits=bits, group_size=8, symmetric=symmetric, scale_dtype=None)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.some(3)
def test_rounds_as_the_official_code(x64, bits, symmetric):
    w, *_ = layer(bits)
    p = drawn(w)
    expected = official.forward(w.reshape(-1, 8), p, bits, symmetric)
    found = quantize_weight(jnp.asarray(w), ours(p, w), exact(bits, symmetric))
    np.testing.assert_array_equal(found.codes.reshape(-1, 8), expected.codes)
    np.testing.assert_allclose(found.grid.scale.ravel(), expected.scale, rtol=1e-12)
    np.testing.assert_allclose(found.dense.reshape(-1, 8), expected.dense, atol=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
def test_rounds_as_the_official_code_on_scales_of_float16(x64, symmetric):
    w, *_ = layer(9)
    p = drawn(w)
    expected = official.forward(w.reshape(-1, 8), p, 4, symmetric, half=True)
    format = integer(bits=4, group_size=8, symmetric=symmetric)
    found = quantize_weight(jnp.asarray(w), ours(p, w), format)
    assert found.grid.scale.dtype == jnp.float16
    np.testing.assert_array_equal(found.codes.reshape(-1, 8), expected.codes)
    np.testing.assert_allclose(found.dense.reshape(-1, 8), expected.dense, atol=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_port_moves_as_its_forward_pass_does(symmetric):
    """Of the oracle: with roundings and clips held fixed, its gradient is that of its dense weight,
    by finite differences of ŵ = s (q - z), where q - z follows w / s + V inside and z outside.
    """
    w, x, y = layer(2)
    groups, p, rng = w.reshape(-1, 8), drawn(w), np.random.default_rng(3)
    f = official.forward(groups, p, 3, symmetric)
    upstream = rng.normal(size=groups.shape)
    gradient = official.backward(groups, p, f, upstream, 3, symmetric)
    unclamped = np.round(groups / f.scale[:, None] + p.value) + f.zero[:, None]
    inside = (unclamped >= 0) & (unclamped <= 7)

    def smooth(q):
        g = official.forward(groups, q, 3, symmetric)
        real = f.zero if symmetric else -g.low / g.scale  # z before it is rounded
        before = groups / g.scale[:, None] + q.value
        moved = before - (groups / f.scale[:, None] + p.value)
        shift = (real - (f.zero if symmetric else -f.low / f.scale))[:, None]
        steps = f.codes - f.zero[:, None] + np.where(inside, moved, -shift)
        return np.sum(upstream * g.scale[:, None] * steps)

    for name in official.Parameters._fields:
        direction = rng.normal(size=getattr(p, name).shape)
        ends = [p._replace(**{name: getattr(p, name) + h * direction}) for h in (1e-6, -1e-6)]
        slope = (smooth(ends[0]) - smooth(ends[1])) / 2e-6
        np.testing.assert_allclose(np.sum(getattr(gradient, name) * direction), slope, rtol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.some(2)
def test_takes_the_official_steps(x64, bits, symmetric):
    """Every parameter, loss and gradient of eight steps. V stays clear of its box (deviation 2),
    and ranges begin below one, where the largest weight of a symmetric group is on no tie.
    """
    w, x, y = layer(bits)
    p = drawn(w)
    p = p._replace(value=p.value / 10, max_scale=0.95 * p.max_scale)
    rates = dict(lr=0.09, minmax_lr=0.05)
    expected = official.tune(w, x, y, p, bits=bits, sym=symmetric, iters=8, **rates)
    method = autoround(
        format=exact(bits, symmetric), steps=8, learning_rate=0.09, range_learning_rate=0.05
    )
    p = ours(p, w)
    w, x, y = map(jnp.asarray, (w, x, y))

    def loss(p):
        return jnp.mean((x @ method.approximate(w, p).T - y) ** 2)

    state = method.optimizer.init(p)
    step = jax.jit(lambda g, state, p: blockwise._update(method, g, state, p))
    for one in expected:  # optax keeps schedules in float32: 1e-7
        for mine, theirs in zip(p, ours(one.parameters, w), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-8)
        value, gradient = jax.value_and_grad(loss)(p)
        np.testing.assert_allclose(value, one.loss, rtol=1e-6)
        for mine, theirs in zip(gradient, ours(one.gradient, w), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-6 * np.abs(theirs).max())
        p, state = step(gradient, state, p)


def test_deviation_1_the_symmetric_grid_is_the_formats_own():
    """The official default gives the larger end 2^(bits-1) steps, of a sign of its own."""
    w = np.array([[-0.2, 0.1, 0.3, 1.0, -0.4, 0.5, 0.0, 0.7]])
    theirs = official.full_range(w, official.start(w), 2)
    assert theirs.max() == 1 and set(np.unique(theirs)) <= {-0.5, 0, 0.5, 1}
    tensor = autoround(format=integer(bits=2, group_size=8, symmetric=True)).compress(
        jnp.asarray(w, jnp.float32)
    )
    np.testing.assert_allclose(tensor.scale, [[2 / 3]], rtol=1e-3)


def test_deviation_2_offsets_stay_within_half_a_step():
    """Where few steps are summed, the official V gets past a half: (1 + 0.5) / 2 after two."""
    method = autoround(format=exact(4, False), steps=2)
    w = jnp.ones((1, 8))
    p, gradient = method.init(w), Parameters(-jnp.ones((1, 8)), jnp.ones((1, 1)), jnp.ones((1, 1)))
    state = method.optimizer.init(p)
    for expected in (Parameters(0.5, 0.5, 0.5), Parameters(0.5, 0.25, 0.25)):
        p, state = blockwise._update(method, gradient, state, p)
        for found, value in zip(p, expected, strict=True):
            np.testing.assert_allclose(found, value)


def test_offsets_reach_a_neighbour_and_no_farther():
    w = jnp.asarray(layer(4)[0], jnp.float32)
    method = autoround(format=integer(bits=8, group_size=8))
    p, plain = method.init(w), integer(bits=8, group_size=8).quantize(w).codes().astype(int)
    moves = set()
    for half in (-0.5, 0.5):
        codes = method.finish(w, p._replace(offset=jnp.full_like(w, half))).codes().astype(int)
        moves |= set(np.unique(codes - plain).tolist())
    assert moves == {-1, 0, 1}


def learned(method, paths=PATHS, seed=0):
    inputs = flows(seed)
    tensors, _ = learn_block(
        block(seed), inputs, through(block(seed), inputs), dict.fromkeys(paths, method),
        jax.random.key(0),
    )  # fmt: skip
    return tensors


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.some(1)
def test_leaves_less_error_in_the_blocks_output_than_rounding_and_gptq(bits):
    grid = dict(bits=bits, group_size=8)
    method = autoround(format=integer(**grid), steps=100, batch=6, range_learning_rate=0.002)
    error = output_error(learned(method))
    assert error < 0.6 * layerwise_error(rtn(**grid))
    assert error < layerwise_error(gptq(**grid))


def test_learns_small_floats_too():
    format = formats.nvfp4(group_size=8)
    method = autoround(format=format, steps=50, batch=3)
    tensors = learned(method, ["mlp.up"])  # whose inputs are correlated
    assert tensors["mlp.up"].element == format.element
    plain = {"mlp.up": method.compress(weight("mlp.up"))}
    assert output_error(tensors) < 0.85 * output_error(plain)


def test_without_learning_it_is_plain_rounding():
    w = jnp.asarray(layer(5)[0], jnp.float32)
    found = autoround(format=integer(bits=3, group_size=8)).compress(w)
    expected = rtn(bits=3, group_size=8).compress(w, None)
    np.testing.assert_array_equal(found.packed, expected.packed)
    np.testing.assert_array_equal(found.scale, expected.scale)


def test_dead_inputs_and_zero_rows_stay_as_rounding_leaves_them():
    """No gradient reaches them, and the sign of none is none."""
    format = integer(bits=3, group_size=8)
    w, x, _ = (jnp.asarray(a, jnp.float32) for a in layer(6))
    w, x = w.at[3].set(0), x.at[:, 8:16].set(0)
    method = autoround(format=format, steps=10)
    p = method.init(w)
    gradient = jax.grad(lambda p: jnp.sum((x @ (method.approximate(w, p) - w).T) ** 2))(p)
    p, _ = blockwise._update(method, gradient, method.optimizer.init(p), p)
    dense, plain = method.approximate(w, p), format.quantize(w).dequantize()
    np.testing.assert_array_equal(dense[:, 8:16], plain[:, 8:16])
    assert not dense[3].any() and (dense != plain).any()


def equations(jaxpr):
    """The number of equations of a traced graph, those inside its loops and calls included."""
    inner = (
        p for e in jaxpr.eqns for p in jax.tree.leaves(list(e.params.values()), is_leaf=_graph)
    )
    return len(jaxpr.eqns) + sum(equations(getattr(p, "jaxpr", p)) for p in inner if _graph(p))


def _graph(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def test_the_graph_does_not_grow_with_width():
    method = autoround(format=integer(bits=3, group_size=8))

    def size(i):
        w = jax.ShapeDtypeStruct((8, i), jnp.float32)

        def total(w):
            return jax.grad(lambda p: jnp.sum(method.approximate(w, p)))(method.init(w))

        return equations(jax.make_jaxpr(total)(w).jaxpr)

    assert size(480) == size(48) < 300


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(format=formats.nf4()), "rounds to integers or small floats"),
        (dict(format=formats.fp8(rows=None)), "rows=None"),
        (dict(format=integer(search="weights")), "search='weights'"),
        (dict(steps=0), "steps=0 must be positive"),
        (dict(batch=0), "batch=0 must be positive"),
        (dict(learning_rate=-0.1), "learning_rate=-0.1"),
    ],
)
def test_refuses_what_it_cannot_do(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        autoround(**settings)


def test_refuses_groups_that_do_not_divide_a_row():
    with pytest.raises(ValueError, match="group_size=7 must divide"):
        autoround(format=integer(group_size=7)).init(jnp.ones((2, 24)))
