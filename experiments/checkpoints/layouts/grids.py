"""What the layouts of integers on a grid ask of a tensor, and how codes lie in int32 words."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from algorithms.elements import Integer
from algorithms.tensors import CompressedTensor, QuantizedTensor
from kernels import packing

SCALES = ("float16", "bfloat16", "float32")  # that are read; float16 is what is written


def unfit(tensor: CompressedTensor, bits: Sequence[int]) -> str | None:
    """Why a tensor is not integers of so many bits with float16 scales in each row, or None.

    It asks for the form alone: the leaves may be shapes.
    """
    if not isinstance(tensor, QuantizedTensor):
        return f"a {type(tensor).__name__}"
    if not isinstance(tensor.element, Integer):
        return f"elements that are no integers, {tensor.element}"
    if tensor.bits not in bits:
        return f"codes of {tensor.bits} bits"
    if tensor.block[0] != 1:
        return f"scales that {tensor.block[0]} rows share"
    if tensor.divisor is not None or tensor.scale.dtype != np.float16:
        return f"scales of {'two levels' if tensor.divisor is not None else tensor.scale.dtype}"
    if tensor.zero is not None and tensor.zero.dtype != np.uint8:
        return f"zero points of {tensor.zero.dtype}, which are no whole numbers"
    return None


def require(tensor: CompressedTensor, layout: str, bits: Sequence[int]) -> QuantizedTensor:
    """The tensor as it is; raises ValueError with the reason if the layout cannot hold it."""
    reason = unfit(tensor, bits)
    if reason is not None:
        *most, last = map(str, bits)
        widths = f"{', '.join(most)} or {last}" if most else last
        raise ValueError(
            f"The {layout} layout cannot hold {reason}: it holds integers of {widths} bits with "
            "whole zero points and a float16 scale for each group of a row; compress to such a "
            "format, or export another layout."
        )
    assert isinstance(tensor, QuantizedTensor)
    return tensor


def require_fit(fits: bool | np.bool, layout: str, sentence: str) -> None:
    """For arrays of a file."""
    if not fits:
        raise ValueError(f"The arrays of a {layout} layer do not fit together: {sentence}.")


def words(packed: np.ndarray, codes: int, bits: int) -> np.ndarray:
    """int32 [r, codes · bits / 32] from rows that `packing` made, whose codes fill whole words."""
    return np.ascontiguousarray(packed[:, : codes * bits // 8]).view("<i4")


def packed(words: np.ndarray, codes: int, bits: int) -> np.ndarray:
    """The rows again, padded as `packing` does."""
    stream = np.ascontiguousarray(words).view(np.uint8)
    return np.pad(stream, [(0, 0), (0, packing.packed_width(codes, bits) - stream.shape[1])])


def quantized(
    packed: np.ndarray, columns: int, bits: int, scale: np.ndarray, zero: np.ndarray, group: int
) -> QuantizedTensor:
    """A tensor of packed codes; tables [o, G]. Zero points in the middle make it symmetric."""
    symmetric = bool((zero == 2 ** (bits - 1)).all())
    tensor = QuantizedTensor(
        packed=jnp.asarray(packed),
        scale=jnp.asarray(scale),
        zero=None if symmetric else jnp.asarray(zero),
        divisor=None,
        element=Integer(bits=bits, symmetric=symmetric),
        columns=columns,
        block=(1, group),
    )
    tensor.validate()
    return tensor
