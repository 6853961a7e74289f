import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from algorithms import kv_cache
from algorithms.walk import NotFiniteError
from models.block import Flow
from models.decoder import DecoderConfig, build_block
from models.layers import rounded

CONFIG = DecoderConfig(
    vocabulary=32, hidden=24, layers=1, heads=4, kv_heads=2, head_size=6, feed_forward=32,
    context=64, cache="fp8",
)  # fmt: skip


def keys(seed=0, spread=2.0):
    return spread * jax.random.normal(jax.random.key(seed), (2, 9, 2, 6))


def flow(seed=0):
    x = jax.random.normal(jax.random.key(seed), (2, 9, 24))
    return Flow(x, x, jnp.broadcast_to(jnp.arange(9), (2, 9)))


def test_every_element_of_e4m3_is_its_own_nearest():
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    codes = codes[np.isfinite(codes)]
    x = jnp.asarray(np.resize(codes, 256)).reshape(1, 8, 4, 8) * 0.25
    np.testing.assert_array_equal(rounded(x, jnp.array([0.25]), "fp8"), x)


def test_between_elements_it_is_what_ml_dtypes_rounds_to():
    x = keys(spread=100.0)
    expected = np.clip(np.asarray(x) / np.float32(0.5), -448, 448)
    expected = expected.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * 0.5
    np.testing.assert_array_equal(rounded(x, jnp.array([0.5]), "fp8"), expected)


def test_integers_reach_from_minus_128_to_127():
    x = jnp.array([-300.0, -128.4, -0.5, 0.5, 1.5, 126.6, 300.0]).reshape(1, 7, 1, 1)
    expected = np.array([-128, -128, 0, 0, 2, 127, 127])
    np.testing.assert_array_equal(rounded(x, jnp.array([1.0]), "int8").ravel(), expected)


def test_a_scale_of_zero_rounds_nothing():
    np.testing.assert_array_equal(rounded(keys(), jnp.zeros(1), "int8"), keys())


@pytest.mark.parametrize("element", ["fp8", "int8"])
def test_fitted_scales_clip_nothing_and_err_by_half_a_step_at_most(element):
    config = CONFIG.__class__(**{**CONFIG.__dict__, "cache": element})
    block = build_block(config, 0, rngs=nnx.Rngs(0))
    chunks = [flow(seed) for seed in range(3)]
    kv_cache.fit(block, chunks)
    largest = 448.0 if element == "fp8" else 127.0
    for n, name in enumerate(kv_cache.SCALES):
        scale = getattr(block.attention, name)[...]
        found = [block.attention.projected(f.activation, f.positions)[1 + n] for f in chunks]
        x = jnp.concatenate(found)
        np.testing.assert_allclose(float(jnp.abs(x).max()), float(scale[0]) * largest, rtol=1e-6)
        error = jnp.abs(rounded(x, scale, element) - x)
        half = jnp.abs(x) / 16 if element == "fp8" else 0.5 * scale  # three bits behind the first
        assert bool((error <= 1.001 * jnp.maximum(half, scale * 2.0**-10)).all())
        assert float(error.max()) > 0


def test_a_block_computes_on_what_the_cache_holds():
    block = build_block(CONFIG, 0, rngs=nnx.Rngs(0))
    plain, _ = block(flow().residual, flow().positions)
    kv_cache.fit(block, [flow()])
    cached, _ = block(flow().residual, flow().positions)
    assert 1e-4 < float(jnp.abs(cached - plain).max() / jnp.abs(plain).max()) < 0.1
    exact, _ = kv_cache.exact(block)(flow().residual, flow().positions)
    np.testing.assert_array_equal(exact, plain)


def test_what_is_not_finite_is_named():
    block = build_block(CONFIG, 0, rngs=nnx.Rngs(0))
    bad = flow()._replace(activation=flow().activation.at[0, 0, 0].set(jnp.nan))
    with pytest.raises(NotFiniteError, match="attention.input"):
        kv_cache.fit(block, [bad])
