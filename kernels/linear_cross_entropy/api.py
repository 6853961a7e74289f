"""The public functions: check shapes, choose an implementation."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import dispatch
from kernels.linear_cross_entropy import mosaic, reference, xla

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "reference": reference.statistics,
    "xla": xla.statistics,
    "mosaic": mosaic.statistics,
}


def linear_cross_entropy(
    h: Float[Array, "t d"],
    w: Float[Array, "v _d"],
    y: Int[Array, " _t"],
    *,
    cap: float | None = None,
    ignore: int = -100,
    implementation: str = "auto",
) -> Float[Array, " t"]:
    """-log softmax(l)_y of each token in nats, l = h wᵀ or, with a cap, cap · tanh(h wᵀ / cap).

    Tokens with y = ignore have a loss of 0; any other y that is no row of w has NaN. float32, or
    h's and w's wider type. Differentiable in h and w. Neither pass holds all the logits: backward
    computes them anew. implementation: see `kernels.dispatch`; "reference" does hold them. Raises
    ValueError for shapes that do not fit, an empty vocabulary, a cap that is not positive, and an
    implementation that cannot run.
    """
    both = linear_cross_entropy_and_logsumexp(
        h, w, y, cap=cap, ignore=ignore, implementation=implementation
    )
    return both[0]


def linear_cross_entropy_and_logsumexp(
    h: Float[Array, "t d"],
    w: Float[Array, "v _d"],
    y: Int[Array, " _t"],
    *,
    cap: float | None = None,
    ignore: int = -100,
    implementation: str = "auto",
) -> tuple[Float[Array, " t"], Float[Array, " t"]]:
    """linear_cross_entropy, and log Σ_v exp(l_v) of each token, ignored or not, for a penalty on
    it (the z-loss). Differentiable in both.
    """
    if h.shape[1] != w.shape[1]:
        raise ValueError(f"h and w must have the same last dimension, {h.shape=}, {w.shape=}.")
    if y.shape[0] != h.shape[0]:
        raise ValueError(f"y must have a label for each token of h, {y.shape=}, {h.shape=}.")
    if w.shape[0] == 0:
        raise ValueError(f"w must have a row for each entry of the vocabulary, {w.shape=}.")
    if cap is not None and not cap > 0:
        raise ValueError(f"cap={cap} must be positive, or None.")
    inside = (y >= 0) & (y < w.shape[0])
    arrays = (h, w, jnp.where(inside, y, 0))
    lse, target = dispatch.run(
        "linear_cross_entropy", IMPLEMENTATIONS, implementation, *arrays,
        lacks=mosaic.lacks(h, w), bucket=bucket(h, w), cap=cap,
    )  # fmt: skip
    loss = jnp.where(inside, lse - target, jnp.nan)
    return jnp.where(y == ignore, 0, loss), lse


def bucket(h, w) -> str:
    """Shapes whose speed is alike: by the work of a tile (D), and by how many there are."""
    tokens = "T>=2048" if h.shape[0] >= 2048 else "T<2048"
    vocabulary = "V>=65536" if w.shape[0] >= 65536 else "V<65536"
    width = "D>=1024" if h.shape[1] >= 1024 else "D<1024"
    return f"{tokens}, {width}, {vocabulary}"
