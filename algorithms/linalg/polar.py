"""The polar factor of a matrix, by Newton-Schulz iteration.

Of X = U S Vᵀ it is U Vᵀ: the nearest matrix whose rows (columns, where they are fewer) are
orthonormal. From X / ‖X‖_F on, a step
    X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X
keeps U and V and takes each singular value s to a s + b s³ + c s⁵. The sequences known by name:
    jordan         one quintic five times, steep at 0. It does not converge: from [0.002, 1] it goes
                   to [0.68, 1.21]. Jordan et al., 2024, https://kellerjordan.github.io/posts/muon
    polar_express  each quintic the best for the interval where the steps before it leave s, at
                   first [0.001, 1], which the fifth leaves in [0.84, 1.13], the eighth at 1.
                   Amsel, Persson, Musco, Gower, arXiv:2505.16932
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers

# Not among optax.contrib's public names, but what its Muon computes with: one iteration for all.
from optax.contrib._muon import orthogonalize_via_newton_schulz

from algorithms.numerics import widened

Quintic = tuple[float, float, float]
EPSILON = 1e-7  # added to norms, as all official codes do

_JORDAN = (3.4445, -4.7750, 2.0315)
# The paper's list: the official code's `optimal_composition(1e-3, 8, cushion=0.02407327424182761)`.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115952949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_SAFETY = 1.01  # room for the rounding of bfloat16, which must not take s out of the interval


def polar_express(steps: int = 5) -> tuple[Quintic, ...]:
    """Its first steps; beyond the eighth the last repeats, which converges quadratically."""
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1.")
    limit = _POLAR_EXPRESS[-1]
    safe = [_of_a_fraction(quintic, _SAFETY) for quintic in _POLAR_EXPRESS[:-1]]
    safe[0] = _of_a_fraction(safe[0], _SAFETY)  # the official code divides by 1.01 ‖X‖_F
    return tuple(safe + [limit] * max(0, steps - len(safe)))[:steps]


def _of_a_fraction(quintic: Quintic, divisor: float) -> Quintic:
    """The coefficients of s -> p(s / divisor)."""
    a, b, c = quintic
    return a / divisor, b / divisor**3, c / divisor**5


def quintics(coefficients: str | Sequence[Sequence[float]]) -> tuple[Quintic, ...]:
    """The steps of a name, or the steps themselves. Raises ValueError for what is neither."""
    if isinstance(coefficients, str):
        named = {"jordan": (_JORDAN,) * 5, "polar_express": polar_express()}
        if coefficients in named:
            return named[coefficients]
    elif len(coefficients) and all(len(row) == 3 for row in coefficients):
        return tuple((float(a), float(b), float(c)) for a, b, c in coefficients)
    raise ValueError(
        f"coefficients={coefficients!r} must be 'jordan', 'polar_express' or three numbers for "
        "each step."
    )


def polar_factor(
    x: Float[Array, "*batch m n"],
    coefficients: str | Sequence[Sequence[float]] = "polar_express",
    dtype: DTypeLike | None = None,
) -> Float[Array, "*batch m n"]:
    """U Vᵀ of each matrix of a batch, nearly; of zeros, zeros.

    dtype: what is multiplied, by default x's own; sums of products are float32. The official codes
    take bfloat16, which changes the result by 5 to 8 % (of 24 x 40). What comes back has x's dtype.
    """
    steps = jnp.asarray(quintics(coefficients))
    u = orthogonalize_via_newton_schulz(
        x if dtype is None else x.astype(dtype),
        steps,
        eps=EPSILON,
        dimension_numbers=MuonDimensionNumbers(reduction_axis=-2, output_axis=-1),
    )
    return u.astype(x.dtype)


def frobenius_norm(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch 1 1"]:
    """Of each matrix, in float32 at least."""
    return jnp.sqrt(jnp.sum(widened(x) ** 2, axis=(-2, -1), keepdims=True))
