"""The public function: checks shapes, chooses an implementation."""

from jaxtyping import Array, Float, Float16, UInt8

from kernels import dispatch
from kernels.packing import packed_width
from kernels.wna16_matmul import reference, xla

IMPLEMENTATIONS = {"reference": reference.wna16_matmul, "xla": xla.wna16_matmul}


def wna16_matmul(
    x: Float[Array, "*m i"],
    packed: UInt8[Array, "o b"],
    scale: Float[Array, "o g"],
    zero: UInt8[Array, "o g"] | Float16[Array, "o g"] | None,
    *,
    bits: int,
    implementation: str = "auto",
) -> Float[Array, "*m o"]:
    """x Wᵀ in x's dtype, with W[o, i] = scale (code - zero) and i/g consecutive columns per group.

    `packed` is `kernels.packing.pack(codes, bits)`; `zero=None` stands for 2^(bits-1) everywhere.
    implementation: see `kernels.dispatch`. Raises ValueError for shapes that do not fit and for an
    implementation that cannot run.
    """
    i, groups = x.shape[-1], scale.shape[-1]
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} must be from 2 to 8.")
    if packed.shape[-1] != packed_width(i, bits):
        raise ValueError(f"x.shape={x.shape} needs {packed_width(i, bits)} bytes, {packed.shape=}.")
    if i % groups:
        raise ValueError(f"{groups} groups must divide the input dimension of x, {x.shape=}.")
    arrays = (x, packed, scale, zero)
    return dispatch.run("wna16_matmul", IMPLEMENTATIONS, implementation, *arrays, bits=bits)
