"""Formats against the published definitions, in NumPy, and what composing them promises."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from algorithms import formats
from algorithms.elements import Integer, NormalFloat, SmallFloat
from algorithms.formats import Format
from algorithms.minifloat import MINIFLOATS
from algorithms.tensors import QuantizedTensor

ALL = {
    "int4": formats.integer(),
    "int2 symmetric": formats.integer(bits=2, symmetric=True),
    "int3, real zero points": formats.integer(bits=3, zero_dtype="float16"),
    "int4 searched": formats.integer(search="weights"),
    "int8 per channel": formats.integer(bits=8, group_size=None),
    "fp8 per channel": formats.fp8(),
    "fp8 per tensor": formats.fp8(rows=None),
    "fp8 e5m2": formats.fp8(element="e5m2"),
    "fp8 by block": formats.fp8(rows=16, columns=48),
    "mxfp8": formats.microscaling(element="e4m3"),
    "mxfp6": formats.microscaling(element="e3m2"),
    "mxfp6 e2m3": formats.microscaling(element="e2m3"),
    "mxfp4": formats.microscaling(),
    "nvfp4": formats.nvfp4(),
    "nf4": formats.nf4(),
}


def weights(o=40, i=128, seed=0):
    w = np.random.default_rng(seed).standard_t(4, size=(o, i)).astype(np.float32)
    w[3] = 0
    w[5, :64] = 0
    return w


@pytest.fixture(params=ALL)
def format(request):
    return ALL[request.param]


@pytest.mark.some(5)
def test_a_tensor_stands_for_the_nearest_points(format):
    """No code of the grid lies nearer to a weight than its own."""
    w = jnp.asarray(weights())
    grid = format.fit(w)
    scale, zero = format.columns_of(grid, w)
    tensor = format.round(w, grid)
    tensor.validate()
    dense = tensor.dequantize()
    np.testing.assert_array_equal(dense, format.nearest(w, grid))
    assert not np.asarray(dense)[3].any()
    codes = jnp.arange(2**format.bits, dtype=jnp.uint8)
    points = format.decode(codes[:, None, None], scale[None], zero[None])
    distances = jnp.where(jnp.isfinite(points), jnp.abs(points - w[None]), jnp.inf)
    nearest = distances.min(0)
    assert (jnp.abs(dense - w) <= nearest * (1 + 1e-5) + 1e-7 * scale).all()


@pytest.mark.some(5)
def test_every_code_survives_packing(format):
    codes = jnp.tile(jnp.arange(2**format.bits, dtype=jnp.uint8), 512 // 2**format.bits + 1)[:384]
    codes = codes.reshape(2, 192)
    tensor = format.tensor(codes, format.fit(jnp.ones((2, 192))))
    np.testing.assert_array_equal(tensor.codes(), codes)


@pytest.mark.some(4)
def test_jit_equals_eager_and_split_equals_rows(format):
    w = jnp.asarray(weights(o=48))
    eager, jitted = format.quantize(w), jax.jit(format.quantize)(w)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted)
    same = np.isclose(eager.dequantize(), jitted.dequantize(), rtol=1e-5, atol=0)
    assert same.mean() > 0.98  # a compiler may move what lies on a tie
    pieces = eager.split([16, 32])
    joined = jnp.concatenate([piece.dequantize() for piece in pieces])
    np.testing.assert_array_equal(joined, eager.dequantize())


def test_the_product_is_that_of_the_dense_weight(format):
    w, x = jnp.asarray(weights()), jnp.asarray(weights(o=7, seed=1))
    tensor = format.quantize(w)
    np.testing.assert_allclose(tensor.matmul(x), x @ tensor.dequantize().T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int4", 4 + 24 / 64),
        ("int2 symmetric", 2 + 16 / 64),
        ("int3, real zero points", 3 + 32 / 64),
        ("fp8 per channel", 8 + 32 / 128),
        ("fp8 per tensor", 8 + 32 / (40 * 128)),
        ("mxfp6", 6 + 8 / 32),
        ("mxfp4", 4 + 8 / 32),
        ("nvfp4", 4 + 8 / 16 + 32 / (40 * 128)),
        ("nf4", 4 + 16 / 64),
    ],
)
def test_every_stored_bit_counts(name, bits):
    tensor = ALL[name].quantize(jnp.asarray(weights()))
    assert tensor.storage_bits() == pytest.approx(bits * 40 * 128)


def cast(x, dtype, peak):
    return np.clip(x, -peak, peak).astype(dtype).astype(np.float32)


def test_nvfp4_is_the_published_two_level_format():
    """One float32 brings the largest block's scale to E4M3's largest; then 16 E2M1 to an E4M3."""
    w = weights()
    divisor = np.float32(448 * 6) / np.abs(w).max()
    blocks = w.reshape(40, -1, 16)
    scale = cast(np.abs(blocks).max(-1) / 6 * divisor, ml_dtypes.float8_e4m3fn, 448)
    step = np.maximum(scale, 2.0**-9) / divisor
    expected = cast(blocks / step[..., None], ml_dtypes.float4_e2m1fn, 6) * step[..., None]
    tensor = formats.nvfp4().quantize(jnp.asarray(w))
    assert tensor.scale.dtype == jnp.float8_e4m3fn and tensor.divisor.shape == ()
    np.testing.assert_allclose(tensor.divisor, divisor, rtol=1e-6)
    same = np.isclose(tensor.dequantize(), expected.reshape(w.shape), rtol=1e-5, atol=0)
    assert same.mean() > 0.999  # the last bit of the divisor may move a scale on a tie


@pytest.mark.parametrize(
    ("element", "dtype"),
    [
        ("e2m1", ml_dtypes.float4_e2m1fn),
        ("e3m2", ml_dtypes.float6_e3m2fn),
        ("e2m3", ml_dtypes.float6_e2m3fn),
        ("e4m3", ml_dtypes.float8_e4m3fn),
        ("e5m2", ml_dtypes.float8_e5m2),
    ],
)
@pytest.mark.some(2)
def test_microscaling_is_ocps(element, dtype):
    """The scale is 2^(floor(log2(absmax)) - emax) of each 32; elements saturate."""
    w, form = weights(), MINIFLOATS[element]
    blocks = w.reshape(40, -1, 32)
    absmax = np.abs(blocks).max(-1)
    exponent = np.floor(np.log2(np.where(absmax == 0, 1, absmax))) - form.peak_exponent
    scale = (2.0**exponent).astype(np.float32)[..., None]
    expected = cast(blocks / scale, dtype, form.peak) * scale
    tensor = formats.microscaling(element=element).quantize(jnp.asarray(w))
    assert tensor.scale.dtype == jnp.float8_e8m0fnu
    np.testing.assert_array_equal(tensor.dequantize(), expected.reshape(w.shape))


@pytest.mark.parametrize(("rows", "columns"), [(1, None), (None, None), (16, 48), (128, 128)])
def test_fp8_blocks_may_be_cut_off_at_the_edges(rows, columns):
    w = weights()
    r, c = rows or 40, columns or 128
    expected = np.empty_like(w)
    for a in range(0, 40, r):
        for b in range(0, 128, c):
            block = w[a : a + r, b : b + c]
            step = np.abs(block).max() / np.float32(448) if block.any() else np.float32(1)
            expected[a : a + r, b : b + c] = cast(block / step, ml_dtypes.float8_e4m3fn, 448) * step
    tensor = formats.fp8(rows=rows, columns=columns).quantize(jnp.asarray(w))
    np.testing.assert_allclose(tensor.dequantize(), expected, rtol=1e-5)


@pytest.mark.parametrize("search", ["weights", "diagonal", "groups"])
@pytest.mark.parametrize("base", ["int", "nvfp4", "mxfp4", "nf4"])
def test_a_search_lowers_what_it_searches_on(search, base):
    make = dict(int=formats.integer, nvfp4=formats.nvfp4, mxfp4=formats.microscaling,
                nf4=formats.nf4)[base]  # fmt: skip
    w = jnp.asarray(weights())
    x = np.random.default_rng(2).normal(size=(200, 16)) @ np.random.default_rng(3).normal(
        size=(16, 128)
    )
    gram = jnp.asarray(x.T @ x, jnp.float32)

    def errors(search):
        format = make(search=search)
        d = np.asarray(format.quantize(w, gram if format.needs_data else None).dequantize() - w)
        c = format.columns
        groups = d.reshape(40, -1, c)
        if searched == "weights":
            return (np.abs(groups) ** 2.4).sum(-1)
        if searched == "diagonal":
            return (groups**2 * np.diag(gram).reshape(-1, c)).sum(-1)
        blocks = np.stack([gram[a : a + c, a : a + c] for a in range(0, 128, c)])
        return np.einsum("ogc,gcd,ogd->og", groups, blocks, groups)

    searched = search
    whole, found = errors(None), errors(search)
    assert (found <= whole * (1 + 1e-3) + 1e-4).all()
    if base != "mxfp4":  # whose scale only doubles
        assert found.sum() < whole.sum()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(element=Integer(), columns=0), "group_size=0 must be positive"),
        (dict(element=Integer(), rows=0), "rows=0 must be positive"),
        (dict(element=Integer(), scale_dtype="int8"), "scale_dtype='int8' must be float16"),
        (dict(element=Integer(), scale_dtype="float8_e8m0fnu"), "is for small floats"),
        (dict(element=Integer(), search="best"), "search='best' must be weights"),
        (dict(element=Integer(), search="groups", rows=None), "needs scales of one row"),
    ],
)
def test_what_does_not_compose_is_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Format(**settings)


def test_elements_refuse_what_they_do_not_have():
    with pytest.raises(ValueError, match="bits=9 must be from 2 to 8"):
        Integer(bits=9)
    with pytest.raises(ValueError, match="name='e9m9' is no small float: choose from e4m3"):
        SmallFloat(name="e9m9")
    with pytest.raises(ValueError, match="bits=3 must be 4"):
        NormalFloat(bits=3)
    with pytest.raises(ValueError, match="zero_dtype='int4' must be uint8 or float16"):
        Integer(zero_dtype="int4")


def test_a_search_without_data_says_so():
    with pytest.raises(ValueError, match="search=groups needs calibration activations"):
        formats.integer(search="groups").quantize(jnp.ones((2, 64)))


def test_rows_of_one_block_stay_together():
    tensor = formats.fp8(rows=16, columns=128).quantize(jnp.asarray(weights(o=48)))
    assert isinstance(tensor, QuantizedTensor)
    with pytest.raises(ValueError, match="does not let rows be parted at 24"):
        tensor.split([24, 24])
