"""SmoothQuant against a port of the official code, its theory, and W8A8 without it.

The deviations are those of papers/smoothquant.md.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import formats, surgery, walk
from algorithms.activations import quantized_inputs
from algorithms.quantization.rtn import rtn
from algorithms.quantization.smoothquant import PeakStats, smoothquant
from tests.algorithms.quantization import scaled_blocks
from tests.algorithms.quantization import smoothquant_official as official

INT8 = formats.integer(bits=8, group_size=None, symmetric=True, scale_dtype=None)


def layer(seed=0, o=6, i=24, n=60):
    """Two readers' weights [o, i] and inputs X [n, i] with outlier channels."""
    rng = np.random.default_rng(seed)
    ws = [rng.normal(size=(o, i)) * np.exp(rng.normal(size=i) / 2) for _ in range(2)]
    x = rng.normal(size=(n, i))
    x[:, rng.permutation(i)[:2]] *= 60
    return ws, x


def scales(method, ws, *batches):
    stats = method.init(batches[0].shape[1])
    for x in batches:
        stats = method.observe(stats, jnp.asarray(x))
    return method.scale(jnp.concatenate([jnp.asarray(w) for w in ws]), stats)


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_scales_equal_the_official_code(x64, strength):
    ws, x = layer()
    ws[0][:, 3] = ws[1][:, 3] = 0  # a channel without weights: held at 1e-5
    batches = x[:20], x[20:25], x[25:]
    peak = official.activation_scales(batches)
    _, _, expected = official.smooth(np.ones(24), ws, peak, strength)
    found = scales(smoothquant(strength=strength), ws, *batches)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_half_strength_gives_both_sides_the_same_range(x64):
    ws, x = layer(1)
    s = np.asarray(scales(smoothquant(), ws, x))
    activations, weights = np.abs(x / s).max(0), np.abs(np.concatenate(ws) * s).max(0)
    np.testing.assert_allclose(activations, weights, rtol=1e-12)
    before = np.abs(x).max(0)
    assert activations.max() / activations.min() < 0.2 * before.max() / before.min()


@pytest.mark.parametrize("strength, flat", [(1.0, "activations"), (0.0, "weights")])
def test_the_ends_move_all_or_nothing(x64, strength, flat):
    ws, x = layer(2)
    s = np.asarray(scales(smoothquant(strength=strength), ws, x))
    peaks = {
        "activations": np.abs(x / s).max(0),
        "weights": np.abs(np.concatenate(ws) * s).max(0),
    }
    np.testing.assert_allclose(peaks[flat], 1, rtol=1e-12)


def w8a8(w, x, s):
    """The output of a layer whose channels were scaled by s, weights and tokens in 8 bits."""
    method = quantized_inputs(format=INT8)(rtn(format=INT8))
    return jax.jit(lambda w, x: method.compress(w, None).matmul(x))(w * s, x / s)


def test_lowers_the_error_of_w8a8_on_outlier_channels():
    ws, x = layer(3, o=16, i=64)
    s = scales(smoothquant(), ws, jnp.asarray(x, jnp.float32)).astype(jnp.float32)
    w, x = jnp.asarray(np.concatenate(ws), jnp.float32), jnp.asarray(x, jnp.float32)
    errors = [float(jnp.sum((w8a8(w, x, t) - x @ w.T) ** 2)) for t in (s[None], 1.0)]
    assert errors[0] < 0.2 * errors[1]


def test_deviation_2_the_official_8_bit_grids_are_as_good():
    """Theirs has 255 points and zero in the middle, ours 256: about the same error."""
    ws, x = layer(4, o=32, i=64, n=200)
    w = np.concatenate(ws)
    expected = official.absmax_rows(x) @ official.absmax_rows(w).T
    found = w8a8(jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32), 1.0)
    errors = [np.sum((np.asarray(y) - x @ w.T) ** 2) for y in (found, expected)]
    assert 0.9 < errors[0] / errors[1] < 1.1


def test_dead_inputs_and_dead_layers():
    ws, x = layer(5)
    x[:, [2, 9]] = 0
    for strength in (0.0, 0.5, 1.0):
        method = smoothquant(strength=strength)
        s = scales(method, ws, jnp.asarray(x, jnp.float32))
        np.testing.assert_array_equal(s[jnp.asarray([2, 9])], 1)
        np.testing.assert_array_equal(scales(method, ws, jnp.zeros_like(x)), 1)
        silent = scales(method, [np.zeros((4, 24))], jnp.asarray(x, jnp.float32))
        for found in (s, silent):
            assert jnp.isfinite(found).all() and (found > 0).all()


def test_what_is_not_finite_is_not_hidden():
    ws, x = layer(6)
    for bad in (np.nan, np.inf):
        x[3, 5] = bad
        assert not jnp.isfinite(scales(smoothquant(), ws, x)).all()


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_refuses_strengths_outside_0_and_1(strength):
    with pytest.raises(ValueError, match=f"strength={strength} must be from 0"):
        smoothquant(strength=strength)


def test_a_smoothed_block_computes_what_it_did():
    before, after = scaled_blocks.block(), scaled_blocks.block()
    walk.transform_block(after, scaled_blocks.chunks(2), smoothquant())
    assert min(scaled_blocks.moved(before, after).values()) > 0.1
    np.testing.assert_allclose(
        scaled_blocks.output(after), scaled_blocks.output(before), rtol=1e-4, atol=1e-4
    )


def test_deviation_1_value_heads_take_the_geometric_mean():
    """Query heads that share a value head share its scales; every site is scaled."""
    before, after = scaled_blocks.block(), scaled_blocks.block()
    flows = scaled_blocks.chunks(2)
    walk.transform_block(after, flows, smoothquant())
    old, new = (scaled_blocks.weights(b)["attention.o"] for b in (before, after))
    found = np.asarray(jnp.nanmedian(new / old, axis=0)).reshape(3, 8)
    moving = list(flows)
    for stage in range(2):
        walk.advance(before, moving, stage)
    seen = jnp.concatenate([flow.activation.reshape(-1, 24) for flow in moving])
    own = np.asarray(smoothquant().scale(old, PeakStats(jnp.abs(seen).max(0)))).reshape(3, 8)
    mean = np.exp(np.log(own).mean(0))
    np.testing.assert_allclose(found, np.broadcast_to(mean, (3, 8)), rtol=1e-4)
    assert all(site.absorbs_scale for site in after.sites)
    assert surgery.linear_at(after, "attention.v").bias is not None
