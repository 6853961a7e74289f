"""The public function: checks shapes, chooses an implementation."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Shaped

from kernels import dispatch
from kernels.quantize_rows import mosaic, reference, tiles, xla
from kernels.quantize_rows.rounding import LARGEST as LARGEST

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "reference": reference.quantize_rows,
    "xla": xla.quantize_rows,
    "mosaic": mosaic.quantize_rows,
}
BLOCKS = (0, 64, 128, 256)


class QuantizedRows(NamedTuple):
    """x ≈ codes · scale, row by row."""

    codes: Shaped[Array, "m k"]  # int8, or float8_e4m3fn
    scale: Float[Array, "m 1"]  # float32, or x's wider type
    sum: Float[Array, "m k"] | None  # x + residual in x's type; None without residual


def quantize_rows(
    x: Float[Array, "m k"],
    residual: Float[Array, "..."] | None = None,
    rms_weight: Float[Array, " n"] | None = None,
    *,
    rms_epsilon: float = 1e-6,
    hadamard: int = 0,
    dtype: str = "int8",
    implementation: str = "auto",
) -> QuantizedRows:
    """Codes and a scale for each row of x, or of what x becomes on the way to a quantized product.

    In this order, each step only where its argument is given: x + residual, rounded to x's type;
    y / sqrt(mean(y²) + rms_epsilon) · rms_weight over a row; y H / √n over blocks of n = `hadamard`
    columns, H = `kernels.hadamard.hadamard_matrix(n)`; rounding, ties to even, with scale =
    max|y| / 127, 448 (fp8) or 7 (int4), at least 2^-126. int4 codes are int8 numbers of [-7, 7]:
    Hopper's tensor cores have no 4-bit integers and read such bytes as they are.

    A row with infinity or NaN has that as its scale, and codes of 0. Not to be differentiated:
    rounding has no gradient but 0. implementation: see `kernels.dispatch`. Raises ValueError.
    """
    k = x.shape[1]
    if dtype not in LARGEST:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(LARGEST)}.")
    if hadamard not in BLOCKS:
        raise ValueError(f"hadamard={hadamard} must be 0 (no rotation), 64, 128 or 256.")
    if hadamard and k % hadamard:
        raise ValueError(f"hadamard={hadamard} must divide the columns of x, {x.shape=}.")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"residual must be {x.dtype} of shape {x.shape} as x is, and is {residual.dtype} of "
            f"{residual.shape}."
        )
    if rms_weight is not None and rms_weight.shape != (k,):
        raise ValueError(f"{rms_weight.shape=} must be (K,) with x.shape={x.shape} (M, K).")
    found = dispatch.run(
        "quantize_rows",
        IMPLEMENTATIONS,
        implementation,
        x,
        residual,
        rms_weight,
        lacks=tiles.lacks(x, residual, rms_weight, hadamard),
        bucket=bucket(x, residual, rms_weight, hadamard),
        rms_epsilon=rms_epsilon,
        hadamard=hadamard,
        dtype=dtype,
    )
    return QuantizedRows(*found)


def bucket(x, residual, rms_weight, hadamard: int) -> str:
    """The class of shapes whose speed is alike: what bytes go through, and how many rows."""
    m = x.shape[0]
    size = "M<=16" if m <= 16 else "M<=1024" if m <= 1024 else "M>1024"
    steps = {"sum": residual, "norm": rms_weight, f"hadamard {hadamard}": hadamard or None}
    return ", ".join([size, *(name for name, step in steps.items() if step is not None)])
