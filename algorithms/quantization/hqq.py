"""HQQ. Badri, Shaji, Mobius Labs 2023, mobiusml.github.io/hqq_blog. Notes: papers/hqq.md.

Move each group's zero point z so that Σ|W - Ŵ|^p is small, p < 1, which forgives single large
errors; the scale s stays. No data is looked at. With a variable E in place of the error
("half-quadratic splitting", β the growing weight of their difference), both steps are closed forms:
    E <- sign(Δ) max(|Δ| - |Δ|^(p-1) / β, 0),   Δ = W - Ŵ
    z <- mean over the group of (Q - (W - E) / s),   Q the codes of W
    β <- κ β
A group stops when its mean |Δ| no longer falls, and keeps the zero point that had the lowest.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from algorithms.elements import Integer
from algorithms.formats import Format, integer
from algorithms.layerwise import LayerwiseMethod
from algorithms.tensors import QuantizedTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class HQQConfig:
    """The format, and the solver's constants as in the official code."""

    format: Format = integer(zero_dtype="float16")
    p: float = 0.7
    beta: float = 10.0  # β, in units of the weights to the power p - 2
    kappa: float = 1.01  # κ
    iterations: int = 20

    def __post_init__(self) -> None:
        element = self.format.element
        if not isinstance(element, Integer) or element.symmetric or self.format.rows != 1:
            raise ValueError(
                f"format={self.format} has no zero point for each group of a row, which is what "
                "HQQ optimizes: choose integers with symmetric=false and rows=1."
            )
        if self.format.needs_data:
            raise ValueError(
                f"search={self.format.search} needs activations, and HQQ looks at weights alone: "
                "choose search=weights or null."
            )
        if not 0 < self.p <= 1:
            raise ValueError(f"p={self.p} must lie above 0 and at most at 1.")
        if self.beta <= 0:
            raise ValueError(f"beta={self.beta} must be positive.")
        if self.kappa < 1:
            raise ValueError(f"kappa={self.kappa} must be at least 1: beta grows.")
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations} must be positive.")


def hqq(
    *,
    format: Format | None = None,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
) -> LayerwiseMethod:
    """HQQ on asymmetric integers, by default of 4 bits with real zero points; data-free."""
    format = integer(zero_dtype="float16") if format is None else format
    config = HQQConfig(format=format, p=p, beta=beta, kappa=kappa, iterations=iterations)

    def compress(w: Float[Array, "o i"], stats: None = None) -> QuantizedTensor:
        return quantize_weight(w, config)

    return LayerwiseMethod(None, None, compress)


def quantize_weight(w: Float[Array, "o i"], config: HQQConfig) -> QuantizedTensor:
    """Quantize W; raises ValueError if groups do not divide i."""
    format, o = config.format, w.shape[0]
    grid = format.fit(w)
    scale, zero = (table[..., None] for table in format.spread(grid, w))
    groups = w.reshape(o, -1, format.block(w.shape)[1])
    # A real zero point may leave zero off the grid: not for a group that holds nothing else.
    zero = jnp.where((groups == 0).all(-1, keepdims=True), jnp.round(zero), zero)
    zero = optimize_zero(groups, scale, zero, config, stored=_as_stored(format))
    codes = format.encode(groups, scale, zero).reshape(w.shape)
    return format.tensor(codes, grid._replace(zero=zero[..., 0]))


def optimize_zero(
    groups: Float[Array, "o g c"],
    scale: Float[Array, "o g 1"],
    zero: Float[Array, "o g 1"],
    config: HQQConfig,
    stored: Callable[[Array], Array] = lambda zero: zero,
) -> Float[Array, "o g 1"]:
    """The zero point of each group with the lowest mean |Δ| before it first fails to fall.

    stored: what becomes of an updated zero point when it is kept; it is judged as it is kept.
    """

    def step(state, beta):
        zero, best_zero, best_error, going = state
        codes = config.format.encode(groups, scale, zero)
        delta = groups - config.format.decode(codes, scale, zero)
        error = jnp.abs(delta).mean(-1, keepdims=True)
        going = going & (error < best_error)
        best_zero = jnp.where(going, zero, best_zero)
        best_error = jnp.where(going, error, best_error)
        target = groups - shrink(delta, beta, config.p)
        zero = (codes.astype(scale.dtype) - target / scale).mean(-1, keepdims=True)
        return (stored(zero), best_zero, best_error, going), None

    # One step more than updates: the last one is judged too.
    betas = config.beta * config.kappa ** jnp.arange(config.iterations + 1, dtype=scale.dtype)
    start = (zero, zero, jnp.full_like(zero, jnp.inf), jnp.ones_like(zero, bool))
    (_, best_zero, _, _), _ = lax.scan(step, start, betas)
    return best_zero


def shrink(x: Float[Array, "*n"], beta: Float[Array, ""] | float, p: float) -> Float[Array, "*n"]:
    """Generalized soft thresholding: sign(x) max(|x| - |x|^(p-1) / β, 0); zero at zero."""
    size = jnp.abs(x)
    return jnp.sign(x) * jnp.maximum(size - size ** (p - 1) / beta, 0)


def _as_stored(format: Format) -> Callable[[Array], Array]:
    element = format.element
    assert isinstance(element, Integer)
    if element.zero_dtype == "uint8":
        return lambda zero: jnp.clip(jnp.round(zero), 0, element.top)
    return lambda zero: zero.astype(element.zero_dtype).astype(zero.dtype)
