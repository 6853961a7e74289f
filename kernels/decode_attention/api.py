"""The public function: checks shapes, chooses an implementation."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from kernels import dispatch
from kernels.decode_attention import mosaic, reference, xla
from kernels.packing import packed_width

IMPLEMENTATIONS = {
    "reference": reference.decode_attention,
    "xla": xla.decode_attention,
    "mosaic": mosaic.decode_attention,
}
KINDS = ("int8", "int4", "fp8", "float")
STORED = {"int8": jnp.int8, "int4": jnp.uint8, "fp8": jnp.float8_e4m3fn}


def decode_attention(
    q: Float[Array, "B n h"],
    k: Shaped[Array, "B S k c"],
    v: Shaped[Array, "B S k c"],
    lengths: Int[Array, " B"],
    *,
    k_scale: Float[Array, "1"] | Float[Array, "B S k"] | None = None,
    v_scale: Float[Array, "1"] | Float[Array, "B S k"] | None = None,
    kind: str,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    implementation: str = "auto",
) -> Float[Array, "B n h"]:
    """softmax(scale · q kᵀ) v in q's dtype, for one query of each sequence over its cache.

    The first `lengths[b]` of S places of a sequence are filled, its query's own with them: the
    query stands at the last, and sees `window` places at most, or all. A sequence of length 0 gives
    zeros. n/k consecutive query heads share a key-value head.

    kind: of k and v. "int8" and "fp8" (E4M3) hold c = h codes, "int4" two signed codes to a byte,
    `kernels.packing.pack(codes & 15, 4)`, "float" the numbers themselves. A code times its scale is
    the number: one scale for all, or one for each place and head; None: 1. scale: of q kᵀ; None:
    1/√h. cap: scores are cap tanh(score / cap). For inference: the kernel has no derivative.
    implementation: see `kernels.dispatch`. Raises ValueError for shapes and types that do not fit
    and for an implementation that cannot run.
    """
    b, n, h = q.shape
    _check(q, k, v, kind, window, cap, k_scale=k_scale, v_scale=v_scale)
    arrays = (q, k, v, lengths.astype(jnp.int32), k_scale, v_scale)
    return dispatch.run(
        "decode_attention", IMPLEMENTATIONS, implementation, *arrays,
        lacks=mosaic.lacks(q, k, kind, k_scale, v_scale),
        bucket=bucket(b, k.shape[1], n, k.shape[2], h, kind),
        kind=kind, window=window, scale=h**-0.5 if scale is None else scale, cap=cap,
    )  # fmt: skip


def bucket(b: int, s: int, n: int, heads: int, h: int, kind: str) -> str:
    """The class of shapes, in `kernels.measured`: by how much cache there is to read, and by how
    many queries share it.
    """
    rows = b * s * heads
    most = next((most for most in (1 << 16, 1 << 19) if rows <= most), None)
    size = "B·S·heads>2^19" if most is None else f"B·S·heads<=2^{most.bit_length() - 1}"
    return f"{size}, {n // heads} queries to a head of {h}, {kind}"


def _check(q, k, v, kind, window, cap, **scales):
    (b, n, h), (_, s, heads, width) = q.shape, k.shape
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}.")
    if n % heads:
        raise ValueError(f"{heads} heads of k must divide those of q, q.shape={q.shape}.")
    if width != (expected := packed_width(h, 4) if kind == "int4" else h):
        raise ValueError(f"kind={kind!r} of q.shape={q.shape} needs k.shape[-1]={expected}, "
                         f"not {width}.")  # fmt: skip
    for name, x in (("k", k), ("v", v)):
        stored = STORED.get(kind)
        if x.dtype != stored if stored else not jnp.issubdtype(x.dtype, jnp.floating):
            names = jnp.dtype(stored).name if stored else "a floating type"
            raise ValueError(f"kind={kind!r} needs {name} in {names}, not {name}.dtype={x.dtype}.")
    for name, x in scales.items():  # without jaxtyping's checks, a wrong one would broadcast
        if x is not None and x.shape not in ((1,), (b, s, heads)):
            raise ValueError(f"{name}.shape={x.shape} must be (1,) or {(b, s, heads)}, or None.")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be positive, or None for all places.")
    if cap is not None and cap <= 0:
        raise ValueError(f"cap={cap} must be positive, or None.")
