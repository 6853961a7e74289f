"""The public function: checks shapes, chooses an implementation."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float, Float8e4m3fn

from kernels import dispatch
from kernels.fp8_block_matmul import mosaic, reference, xla
from kernels.fp8_block_matmul.blocks import BLOCK

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "reference": reference.fp8_block_matmul,
    "xla": xla.fp8_block_matmul,
    "mosaic": mosaic.fp8_block_matmul,
}
RESULTS = ("bfloat16", "float32")


def fp8_block_matmul(
    x: Float8e4m3fn[Array, "m k"],
    w: Float8e4m3fn[Array, "n j"],
    x_scale: Float[Array, "..."],
    w_scale: Float[Array, "..."],
    *,
    out_dtype: str = "bfloat16",
    implementation: str = "auto",
) -> Float[Array, "m n"]:
    """x wᵀ, with x[m, k] x_scale[m, k // 128] for x and w[n, k] w_scale[n // 128, k // 128] for w.

    The recipe of DeepSeek-V3 (arXiv:2412.19437, section 3.3) and DeepGEMM: products of 128 of K are
    scaled and added in float32. x_scale: (M, ⌈K/128⌉), w_scale: (⌈N/128⌉, ⌈K/128⌉), in float32; the
    kernel takes whole blocks. The result is in out_dtype, bfloat16 or float32. Not to be
    differentiated: quantize gradients for products of their own, or differentiate what x and w were
    quantized from. implementation: see `kernels.dispatch`. Raises ValueError.
    """
    (m, k), (n, _) = x.shape, w.shape
    groups = -(-k // BLOCK)
    if w.shape[1] != k:
        raise ValueError(f"{w.shape=} must be (N, K) with the K of x, {x.shape=} (M, K).")
    if x_scale.shape != (m, groups):
        raise ValueError(f"{x_scale.shape=} must be (M, ⌈K/128⌉) = {(m, groups)}, {x.shape=}.")
    if w_scale.shape != (-(-n // BLOCK), groups):
        raise ValueError(
            f"{w_scale.shape=} must be (⌈N/128⌉, ⌈K/128⌉) = {(-(-n // BLOCK), groups)}, {w.shape=}."
        )
    if out_dtype not in RESULTS:
        raise ValueError(f"out_dtype={out_dtype!r} is not one of {', '.join(RESULTS)}.")
    return dispatch.run(
        "fp8_block_matmul",
        IMPLEMENTATIONS,
        implementation,
        x,
        w,
        x_scale,
        w_scale,
        lacks=mosaic.lacks(x, w, x_scale, w_scale),
        bucket=bucket(m),
        out_dtype=out_dtype,
    )


def bucket(m: int) -> str:
    """The class of shapes whose speed is alike: M decides what bounds it."""
    return "M<=64" if m <= 64 else "M<=512" if m <= 512 else "M>512"
