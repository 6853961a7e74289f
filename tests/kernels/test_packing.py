import jax.numpy as jnp
import numpy as np
import pytest

from kernels import packing


def naive_pack(codes, bits):
    """The definition, bit by bit: code c fills bits c·b … c·b + b - 1 of its row's stream."""
    width = packing.packed_width(codes.shape[-1], bits)
    packed = np.zeros((len(codes), width), np.uint8)
    for row, values in enumerate(codes):
        for c, value in enumerate(values):
            for bit in range(bits):
                byte, shift = divmod(c * bits + bit, 8)
                packed[row, byte] |= ((int(value) >> bit) & 1) << shift
    return packed


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 24, 131])
@pytest.mark.some(12)
def test_pack_is_the_little_endian_stream_and_unpack_its_inverse(bits, columns):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, columns), np.uint8)
    packed = packing.pack(jnp.asarray(codes), bits)
    np.testing.assert_array_equal(packed, naive_pack(codes, bits))
    np.testing.assert_array_equal(packing.unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_survives(bits):
    codes = jnp.arange(2**bits, dtype=jnp.uint8)[None]
    np.testing.assert_array_equal(packing.unpack(packing.pack(codes, bits), bits, 2**bits), codes)


def test_leading_axes_are_kept():
    codes = np.random.default_rng(0).integers(0, 8, (2, 3, 5), np.uint8)
    packed = packing.pack(jnp.asarray(codes), 3)
    assert packed.shape == (2, 3, 3)
    np.testing.assert_array_equal(packing.unpack(packed, 3, 5), codes)


def test_a_width_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="9 codes of bits=4 do not fill"):
        packing.unpack(jnp.zeros((2, 4), jnp.uint8), 4, 9)
