"""The public function: checks shapes, chooses an implementation."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array, Float, Shaped, UInt8

from kernels import dispatch
from kernels.packing import packed_width
from kernels.wna16_matmul import mosaic, plan, reference, xla
from kernels.wna16_matmul.codes import KINDS

IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
    "reference": reference.wna16_matmul,
    "xla": xla.wna16_matmul,
    "mosaic": mosaic.wna16_matmul,
}


def wna16_matmul(
    x: Float[Array, "*m i"],
    packed: UInt8[Array, "o b"],
    scale: Shaped[Array, "o g"],  # floats; jaxtyping does not count E8M0 among them
    zero: UInt8[Array, "o g"] | Float[Array, "o g"] | None,
    divisor: Float[Array, ""] | None = None,
    *,
    bits: int,
    kind: str = "int",
    implementation: str = "auto",
) -> Float[Array, "*m o"]:
    """x Wᵀ in x's dtype, with i/g consecutive columns of W per group, and
    W[o, i] = scale / divisor · (code - zero), or of the number that the code stands for.

    kind: "int", or "fp4" (E2M1) or "nf4", of 4 bits, which have no zero point. With scales in
    float8_e4m3fn and a divisor FP4 is NVFP4; with scales in float8_e8m0fnu it is MXFP4.

    `packed` is `kernels.packing.pack(codes, bits)`; `zero=None` stands for 2^(bits-1) everywhere;
    `divisor=None` for 1. Differentiable but by `packed`. implementation: see `kernels.dispatch`.
    Raises ValueError for shapes that do not fit and for an implementation that cannot run.
    """
    (*m, i), (o, groups) = x.shape, scale.shape
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}.")
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} must be from 2 to 8.")
    if kind != "int" and bits != 4:
        raise ValueError(f"kind={kind!r} has bits=4, not bits={bits}.")
    if kind != "int" and zero is not None:
        raise ValueError(f"kind={kind!r} has no zero point: zero must be None, {zero.shape=}.")
    if packed.shape[-1] != packed_width(i, bits):
        raise ValueError(f"x.shape={x.shape} needs {packed_width(i, bits)} bytes, {packed.shape=}.")
    if i % groups:
        raise ValueError(f"{groups} groups must divide the input dimension of x, {x.shape=}.")
    x = x.reshape(math.prod(m), i)
    y = dispatch.run(
        "wna16_matmul", IMPLEMENTATIONS, implementation, x, packed, scale, zero, divisor,
        lacks=plan.lacks(x, scale, bits, kind),
        bucket=bucket(len(x), i, o, i // groups, bits, kind),
        bits=bits, kind=kind,
    )  # fmt: skip
    return y.reshape(*m, -1)


def bucket(m: int, i: int, o: int, group: int, bits: int, kind: str) -> str:
    """The class of shapes whose speed is alike: what XLA's form does with so many rows, and whether
    W is large enough that reading it is what takes the time.
    """
    most = next((most for most in (4, 16, 128) if m <= most), None)
    rows = "M>128" if most is None else f"M<={most}"
    size = "K·N<=2^25" if i * o <= 1 << 25 else "K·N>2^25"
    return f"{rows}, {size}, {f'int{bits}' if kind == 'int' else kind}, groups of {group}"
