"""ggml's blocks: our grids against the `gguf` package's own dequantizer, bit for bit."""

import dataclasses

import gguf
import gguf.quants
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import formats
from algorithms.formats import Format
from algorithms.tensors import DenseTensor, QuantizedInput
from experiments.checkpoints.layouts.gguf_blocks import INTEGERS, Type, decode, encode, kind_of
from tests.experiments.checkpoints.layouts.grid_cases import random_grid

CASES = [  # what holds a grid at the least bits: bits, columns, group size, symmetric
    ("Q2_K", 2, 512, 256, False),
    ("Q2_K", 2, 512, 512, True),
    ("Q3_K", 3, 512, 256, True),
    ("Q4_0", 2, 96, 96, True),
    ("Q4_0", 3, 64, 32, False),
    ("Q4_0", 4, 64, 32, True),
    ("Q4_0", 4, 512, 256, True),
    ("Q4_K", 4, 512, 256, False),
    ("Q5_0", 4, 128, 64, False),
    ("Q5_0", 5, 64, 32, True),
    ("Q5_K", 5, 256, 256, False),
    ("Q6_K", 6, 512, 512, True),
    ("Q8_0", 5, 128, 64, False),
    ("Q8_0", 6, 64, 32, True),
    ("Q8_0", 7, 64, 32, False),
    ("Q8_0", 8, 96, 96, True),
]


def assert_exact(stored, kind, tensor):
    """The package's dequantizer and our way back both give the tensor's own numbers."""
    ours = np.asarray(tensor.dequantize())
    theirs = gguf.quants.dequantize(stored, kind)
    np.testing.assert_array_equal(theirs.view(np.uint32), ours.view(np.uint32))
    again = np.asarray(decode(stored, kind).dequantize())
    np.testing.assert_array_equal(again.view(np.uint32), ours.view(np.uint32))


@pytest.mark.parametrize(("name", "bits", "i", "group", "symmetric"), CASES)
def test_every_grid_finds_its_block(name, bits, i, group, symmetric):
    tensor = random_grid(6, i, bits=bits, group=group, symmetric=symmetric)
    kind = kind_of(tensor)
    assert kind == Type[name]
    stored = encode(tensor, kind)
    size, width = gguf.GGML_QUANT_SIZES[kind]
    assert stored.shape == (6, i // size * width) and stored.dtype == np.uint8
    assert_exact(stored, kind, tensor)


@pytest.mark.parametrize("kind", [k for k in INTEGERS if k not in (Type.Q4_1, Type.Q5_1)])
@pytest.mark.some(4)
def test_every_block_holds_what_it_can(kind):
    for bits in (2, 3, 4, 5, 6, 8):
        for symmetric in (True, False):
            tensor = random_grid(2, 512, bits=bits, group=256, symmetric=symmetric)
            try:
                stored = encode(tensor, kind)
            except ValueError as error:
                assert "cannot hold" in str(error)
                continue
            assert_exact(stored, kind, tensor)


@pytest.mark.parametrize(("kind", "bits"), [(Type.Q4_1, 4), (Type.Q4_1, 3), (Type.Q5_1, 5)])
def test_minima_that_are_exact(kind, bits):
    """-s zero is a float16 for scales that are powers of two, as for zero points that are."""
    tensor = random_grid(6, 128, bits=bits, group=64, symmetric=False)
    powers = jnp.exp2(jnp.round(jnp.log2(tensor.scale.astype(jnp.float32)))).astype(jnp.float16)
    exact = dataclasses.replace(tensor, scale=powers)
    stored = encode(exact, kind)
    assert_exact(stored, kind, exact)
    np.testing.assert_array_equal(
        decode(stored, kind).zero, np.repeat(np.asarray(tensor.zero), 2, 1)
    )
    with pytest.raises(ValueError, match=f"{kind.name} cannot hold the minima .* choose Q5_0 for"):
        encode(tensor, kind)


def test_a_block_comes_back_as_it_was():
    tensor = random_grid(4, 64, bits=4, group=32, symmetric=True)
    found = decode(encode(tensor, Type.Q4_0), Type.Q4_0)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(tensor), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jax.tree.structure(found) == jax.tree.structure(tensor)


@pytest.mark.parametrize("group", [32, 64])
def test_mxfp4(group):
    w = np.random.default_rng(0).normal(size=(6, 128)).astype(np.float32)
    w[0, :group] = 0
    tensor = formats.microscaling(group_size=group).quantize(jnp.asarray(w))
    assert kind_of(tensor) == Type.MXFP4
    stored = encode(tensor, Type.MXFP4)
    ours = np.asarray(tensor.dequantize())
    np.testing.assert_array_equal(gguf.quants.dequantize(stored, Type.MXFP4), ours)
    found = decode(stored, Type.MXFP4)
    np.testing.assert_array_equal(
        np.asarray(found.dequantize()).view(np.uint32), ours.view(np.uint32)
    )
    assert found.block == (1, 32) and found.element == tensor.element


def test_mxfp4_scales_that_ggml_reads_otherwise():
    tensor = formats.microscaling().quantize(jnp.ones((2, 64)))
    for code in (1, 255):
        scale = jnp.full(tensor.scale.shape, code, jnp.uint8)
        bad = dataclasses.replace(
            tensor, scale=jax.lax.bitcast_convert_type(scale, tensor.scale.dtype)
        )
        with pytest.raises(ValueError, match="MXFP4 cannot hold scales below 2.-125 or NaN"):
            encode(bad, Type.MXFP4)


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0, Type.Q5_0, Type.MXFP4])
def test_what_others_quantized_is_read_as_a_grid(kind):
    w = np.random.default_rng(0).normal(size=(6, 128)).astype(np.float32)
    stored = gguf.quants.quantize(w, kind)
    expected = gguf.quants.dequantize(stored, kind)
    np.testing.assert_array_equal(decode(stored, kind).dequantize(), expected)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (Type.Q4_1, "Q4_1 blocks have scales or minima of their own inside: .* as a dense one"),
        (Type.Q4_K, "Q4_K blocks have scales or minima of their own"),
        (Type.Q6_K, "Q6_K blocks have"),
        (Type.Q3_K, "Q3_K blocks have"),
        (Type.IQ4_NL, "IQ4_NL holds no grid of planish's"),
    ],
)
def test_others_blocks_that_are_no_grid(kind, sentence):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=sentence):
        decode(rng.integers(0, 100, (2, 2 * gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)


def test_the_form_alone_decides():
    shapes = jax.eval_shape(formats.integer(group_size=64).quantize, jnp.zeros((32, 64)))
    assert kind_of(shapes) == Type.Q5_0


def other_forms():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 96)), jnp.float32)
    four = formats.integer(group_size=32, symmetric=True)
    return {
        "a DenseTensor": DenseTensor(w),
        "asymmetric grids of 8 bits in groups of 32": formats.integer(
            bits=8, group_size=32
        ).quantize(w),
        "groups of 48 of 96 columns": formats.integer(group_size=48).quantize(w),
        "elements that are no integers, NormalFloat": formats.nf4(group_size=32).quantize(w),
        "elements that are no integers, SmallFloat.name='e4m3'": formats.fp8().quantize(w),
        "elements that are no integers, SmallFloat.name='e2m1'": formats.nvfp4().quantize(w),
        "scales of float32": formats.integer(group_size=32, scale_dtype="float32").quantize(w),
        "zero points of float16": formats.integer(group_size=32, zero_dtype="float16").quantize(w),
        "scales that 2 rows share": Format(element=four.element, rows=2, columns=32).quantize(w),
    }


def test_forms_that_have_no_block():
    for reason, tensor in other_forms().items():
        with pytest.raises(ValueError, match=f"GGUF's blocks cannot hold {reason}.* fallback=f16"):
            kind_of(tensor)
        assert kind_of(tensor, "f16") == Type.F16 and kind_of(tensor, "f32") == Type.F32


def test_a_fallback_is_not_for_what_has_a_block():
    assert kind_of(random_grid(4, 64, bits=4, group=32, symmetric=True), "f16") == Type.Q4_0


def test_layers_that_change_their_input():
    weight = random_grid(4, 64, bits=4, group=32, symmetric=True)
    online = QuantizedInput(weight, None, None, None, formats.integer(bits=8, group_size=None))
    for fallback in (None, "f16"):
        with pytest.raises(ValueError, match="a QuantizedInput, whose layer changes its input"):
            kind_of(online, fallback)


def test_a_type_that_is_too_narrow():
    tensor = random_grid(4, 64, bits=5, group=32, symmetric=True)
    with pytest.raises(ValueError, match="Q4_0 cannot hold symmetric grids of 5 bits in groups of "
                       "32: Q5_0, Q8_0, Q5_1 can"):  # fmt: skip
        encode(tensor, Type.Q4_0)
