"""FP8 layers against a port of TransformerEngine's, their memory, and FP8 without scales."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from algorithms.low_precision import fp8
from algorithms.low_precision.fp8 import LARGEST, FP8Linear, Recipe, fp8_product, quantize
from algorithms.minifloat import E4M3, E5M2
from algorithms.training import BackwardBuffer, Buffer
from kernels import dispatch
from tests.algorithms.low_precision import fp8_official as official


def layer(**settings):
    return FP8Linear(nnx.Linear(24, 20, use_bias=False, rngs=nnx.Rngs(0)), Recipe(**settings))


def one_pass(model, x, g):
    """y, ∂x, ∂w; the model keeps what it remembers."""
    graph, params, told, rest = nnx.split(model, nnx.Param, BackwardBuffer, ...)
    (dw, told, dx), (y, buffers) = passed(params, told, x, rest, g, graph=graph)
    nnx.update(model, buffers)
    nnx.update(model, told)
    return y, dx, dw["kernel"][...]


@functools.partial(jax.jit, static_argnames="graph")
def passed(params, told, x, rest, g, *, graph):
    def total(params, told, x):
        made = nnx.merge(graph, params, told, rest, copy=True)
        y = made(x)
        return jnp.sum(y * g), (y, nnx.state(made, Buffer))

    return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(params, told, x)


def near(found, expected):
    """Up to the order of float32 sums."""
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6 * np.abs(expected).max())


SETTINGS = [
    dict(scaling="current"),
    dict(scaling="current", gradients="e4m3"),
    dict(scaling="delayed", window=3),
    dict(scaling="delayed", window=1),
    dict(scaling="delayed", window=4, amax="most_recent", margin=1),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_is_transformer_engine(settings):
    """Ten steps of gradient descent, with inputs and gradients that grow and shrink."""
    rng = np.random.default_rng(0)
    model = layer(**settings)
    dtypes = [official.DTYPES[k] for k in ("e4m3", "e4m3", settings.get("gradients", "e5m2"))]
    if settings["scaling"] == "current":
        theirs = [official.Current(dtype) for dtype in dtypes]
    else:
        kept = settings["window"], settings.get("margin", 0), settings.get("amax", "max")
        theirs = [official.Delayed(dtype, *kept) for dtype in dtypes]
    for n in range(10):
        size = 10.0 ** rng.integers(-3, 3)
        x = np.float32(size * rng.normal(size=(32, 24)))
        g = np.float32(rng.normal(size=(32, 20)) / size**2)
        if n == 5:
            g[:] = 0  # leaves its scale as it was
        w = np.asarray(model.kernel[...])
        found = one_pass(model, jnp.asarray(x), jnp.asarray(g))
        for ours, port in zip(found, official.linear(theirs, x, w, g), strict=True):
            near(ours, port)
        if settings["scaling"] == "delayed":
            memories = (model.inputs, model.weights, model.gradients)
            for (scale, history), port in zip(memories, theirs, strict=True):
                np.testing.assert_array_equal(scale[...], port.scale)
                newest = port.history[:0:-1]  # there the last one is last, and a zero first
                np.testing.assert_array_equal(history[...][: len(newest)], newest)
        model.kernel.set_value(model.kernel[...] - 0.01 * np.sign(found[2]))


@pytest.mark.parametrize("form, dtype", [(E4M3, "e4m3"), (E5M2, "e5m2")])
def test_codes_are_those_of_ml_dtypes(form, dtype):
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(64, 64)) * 10.0 ** rng.integers(-9, 9, size=(64, 64)))
    scale = np.float32(rng.uniform(0.1, 10))
    theirs = official.quantize(x, scale, official.DTYPES[dtype])
    ours = np.asarray(quantize(jnp.asarray(x), jnp.asarray(scale), form))
    np.testing.assert_array_equal(ours.view(np.uint8), theirs.view(np.uint8))


@pytest.mark.parametrize("scaling", ["current", "delayed"])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-30, 1e18, 3e38])
def test_scaling_never_overflows(scaling, size):
    """Operands of any size give finite scales and FP8 numbers."""
    x = jnp.asarray(size * np.linspace(-1, 1, 8 * 24).reshape(8, 24), jnp.float32)
    for form in (E4M3, E5M2):
        scale = fp8.scale_of(fp8.amax(x), jnp.ones(()), form, 0)
        assert 0 < scale <= LARGEST
        q = np.asarray(quantize(x, scale, form), np.float32)
        assert np.abs(q).max() <= form.peak
        if 1e-30 <= size:
            assert np.abs(q).max() == form.peak  # the whole range is used
    model = layer(scaling=scaling, window=2)
    for _ in range(3):
        y, dx, dw = one_pass(model, x, jnp.full((8, 20), 1e-20))
        assert all(bool(jnp.isfinite(t).all()) for t in (y, dx, dw) if size < 1e30)
        memory = jax.tree.leaves(nnx.state(model, Buffer))
        assert all(bool(jnp.isfinite(t).all()) for t in memory)


def test_delayed_is_current_once_it_has_seen_the_same():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(16, 24)), jnp.float32)
    g = jnp.asarray(rng.normal(size=(16, 20)), jnp.float32)
    delayed, current = layer(scaling="delayed", window=2), layer()
    one_pass(delayed, x, g)
    for ours, theirs in zip(one_pass(delayed, x, g), one_pass(current, x, g), strict=True):
        near(ours, theirs)


def test_loses_less_than_fp8_without_scales():
    rng = np.random.default_rng(0)
    x = jnp.asarray(1e-3 * rng.normal(size=(64, 24)), jnp.float32)
    w = jnp.asarray(1e-2 * rng.normal(size=(24, 20)), jnp.float32)
    one = jnp.ones(())

    def lost(*scales):
        y = fp8_product(Recipe(), x, w, *scales, None)
        return float(jnp.linalg.norm(y - x @ w) / jnp.linalg.norm(x @ w))

    scaled = [fp8.scale_of(fp8.amax(t), one, E4M3, 0) for t in (x, w)]
    assert lost(*scaled) < 0.06 < 0.2 * lost(one, one)


def test_its_gradient_is_that_of_a_linear_layer_of_fp8_numbers():
    """Where every number is FP8 already, nothing is lost."""
    rng = np.random.default_rng(0)
    x, w, g = (
        jnp.asarray(rng.integers(-7, 8, size=shape) * 64.0, jnp.float32).at[0, 0].set(448.0)
        for shape in ((16, 24), (24, 20), (16, 20))
    )
    recipe, one = Recipe(gradients="e4m3"), jnp.ones(())
    y, pull = jax.vjp(lambda x, w: fp8_product(recipe, x, w, one, one, None), x, w)
    np.testing.assert_array_equal(y, x @ w)
    for found, expected in zip(pull(g), (g @ w.T, x.T @ g), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_which_products_ran_is_told():
    x = jnp.ones((16, 32))

    assert fp8.products() == "emulated"
    assert dispatch.choices()["fp8_product"]["implementation"] == "emulated"
    hopper = types.SimpleNamespace(platform="gpu", device_kind="H", compute_capability="9.0")
    old = types.SimpleNamespace(platform="gpu", device_kind="A", compute_capability="8.0")
    with dispatch.compiling_for(old):
        assert fp8.products() == "emulated"
    with dispatch.compiling_for(hopper):
        assert fp8.products() == "real"
        real = jax.make_jaxpr(lambda x: fp8._dot(*[quantize(x, jnp.ones(()), E4M3)] * 2, 1, 1))(x)
        (dot,) = [e for e in real.eqns if e.primitive.name == "dot_general"]
        assert [v.aval.dtype for v in dot.invars] == [jnp.float8_e4m3fn] * 2
    fp8.products()  # of this machine again


def test_numbers_of_two_kinds_multiply():
    """As gradients with weights do, on a GPU."""
    a, b = jnp.ones((4, 8), jnp.float8_e5m2), jnp.ones((6, 8), jnp.float8_e4m3fn)
    hopper = types.SimpleNamespace(platform="gpu", device_kind="H", compute_capability="9.0")
    with dispatch.compiling_for(hopper):
        found = jax.eval_shape(lambda a, b: fp8._dot(a, b, 1, 1), a, b)
    assert (found.shape, found.dtype) == ((4, 6), jnp.float32)
    fp8.products()


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(scaling="block"), "scaling='block' must be current or delayed"),
        (dict(gradients="e3m4"), "gradients='e3m4' must be e5m2 or e4m3"),
        (dict(amax="mean"), "amax='mean' must be max or most_recent"),
        (dict(window=0), "window=0 must be at least 1"),
    ],
)
def test_bad_settings_are_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        fp8.fp8(**settings)
