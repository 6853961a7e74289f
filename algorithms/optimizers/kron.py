"""PSGD-Kron. Li, IEEE TNNLS 2018, arXiv:1512.04202; Li, 2024, arXiv:2402.11858.

Whitens the gradient G [m, n] by P = Qᵀ Q, Q = Q_L ⊗ Q_R with triangular Q_L and Q_R: the update is
    Q_Lᵀ Q_L M Q_Rᵀ Q_R,   M the mean gradient.
Q minimises E[gᵀ P g + vᵀ P⁻¹ v], v ~ N(0, I), least where P E[g gᵀ] P = I, by steps on the group of
triangular matrices: with A = Q_L G Q_Rᵀ and B = Q_L⁻ᵀ V Q_R⁻¹,
    Q_L <- Q_L - μ triu(A Aᵀ - B Bᵀ) Q_L / ‖A Aᵀ + B Bᵀ‖
and alike Q_R with Aᵀ A and Bᵀ B. A wide side, or a vector, has a diagonal Q.

Follows the JAX version, github.com/evanatyourservice/psgd_jax. This differs from it in:
1. Axes before the last two are a batch of matrices, whose mean |G| and clipping are their own.
2. Q stays where all of G is zero: it would grow without end.
3. The state is float32 at least, M included; the seed is a setting.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from algorithms.optimizers.eigenbases import Sides
from algorithms.optimizers.leaves import wide_zeros
from algorithms.optimizers.whitening import fit, whitened

BALANCED = 0.01  # the fraction of fits before which Q_L and Q_R are made equally large


class KronState(NamedTuple):
    """In float32, or the parameters' dtype where that is wider."""

    step: Int[Array, ""]  # gradients seen
    since: Int[Array, ""]  # steps since the last fit
    key: Key[Array, ""]
    mu: Any  # M before its bias is corrected
    factors: Any  # (Q_L, Q_R) in the place of each parameter: matrices, or diagonals as vectors


def annealed_probability(
    *, maximum: float = 1.0, minimum: float = 0.03, decay: float = 1e-3, flat: int = 500
) -> optax.Schedule:
    """`maximum` for the first steps, then an exponential down to `minimum`."""
    return lambda count: jnp.clip(maximum * jnp.exp(-decay * (count - flat)), minimum, maximum)


def scale_by_kron(
    *,
    b1: float = 0.9,
    update_probability: optax.ScalarOrSchedule | None = None,
    factor_learning_rate: float = 0.1,
    initial_scale: float = 1.0,
    max_size_triangular: int = 8192,
    min_ndim_triangular: int = 2,
    fit_to_momentum: bool = True,
    seed: int = 0,
) -> optax.GradientTransformation:
    """The mean gradient, whitened.

    update_probability: Q is fitted in every 1/p-th step; `annealed_probability()` if None.
    factor_learning_rate: μ. initial_scale: of Q. max_size_triangular: wider sides get diagonals.
    min_ndim_triangular: so do parameters of fewer axes, of which a batch's do not count.
    fit_to_momentum: Q whitens M, not G. seed: of V.
    """
    _validate(b1, update_probability, factor_learning_rate, initial_scale)
    probability = annealed_probability() if update_probability is None else update_probability
    fit_all = functools.partial(fitted, rate=factor_learning_rate)

    def init(params: Any) -> KronState:
        def factors(p: jax.Array) -> Sides:
            triangular = max_size_triangular if min(p.ndim, 2) >= min_ndim_triangular else 1
            return initial_factors(p, initial_scale, triangular)

        zero, mu = jnp.zeros([], jnp.int32), jax.tree.map(wide_zeros, params)
        return KronState(zero, zero.copy(), jax.random.key(seed), mu, jax.tree.map(factors, params))

    def update(grads: Any, state: KronState, params: Any = None) -> tuple[Any, KronState]:
        del params
        count = optax.safe_increment(state.step)
        wide = jax.tree.map(lambda g, m: g.astype(m.dtype), grads, state.mu)
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, wide, state.mu)
        mean = jax.tree.map(lambda m: as_matrix(m) / (1 - b1**count).astype(m.dtype), mu)
        seen = mean if fit_to_momentum else jax.tree.map(as_matrix, wide)

        p = probability(count) if callable(probability) else probability
        due = state.since + 1 >= 1 / p
        key = jax.random.fold_in(state.key, state.step)
        factors = jax.lax.cond(due, fit_all, _stay, key, seen, state.factors)
        moves = jax.tree.map(
            lambda g, x, q: batched(whitened, x)(x, q).reshape(g.shape).astype(g.dtype),
            grads, mean, factors,
        )  # fmt: skip
        since = jnp.where(due, 0, state.since + 1)
        return moves, KronState(count, since, state.key, mu, factors)

    return optax.GradientTransformation(init, update)


def _validate(b1: float, p: Any, rate: float, scale: float) -> None:
    if not 0 <= b1 < 1:
        raise ValueError(f"b1={b1} must be at least 0 and below 1.")
    if not (p is None or callable(p) or 0 < p <= 1):
        raise ValueError(f"update_probability={p} must be above 0 and at most 1, or a schedule.")
    if not 0 < rate < 1:
        raise ValueError(f"factor_learning_rate={rate} must be above 0 and below 1: of the norm.")
    if scale <= 0:
        raise ValueError(f"initial_scale={scale} must be above 0.")


def as_matrix(x: Float[Array, "..."]) -> Float[Array, "*batch m n"]:
    """A vector or a number is a row."""
    return x.reshape(1, -1) if x.ndim < 2 else x


def batched(function: Callable, x: Float[Array, "*batch m n"]) -> Callable:
    """A function of matrices over x's batch."""
    for _ in range(x.ndim - 2):
        function = jax.vmap(function)
    return function


def initial_factors(p: Float[Array, "..."], scale: float, triangular: int) -> Sides:
    """Identities whose product is `scale`; diagonals above size `triangular`; a row has no Q_L."""
    x = as_matrix(wide_zeros(p))
    scale = scale ** (1 / min(max(p.ndim, 1), 2))

    def factor(d: int) -> jax.Array:
        q = jnp.ones(d, x.dtype) if d == 1 or d > triangular else jnp.eye(d, dtype=x.dtype)
        return jnp.tile(scale * q, (*x.shape[:-2], *(1,) * q.ndim))

    return Sides(None if p.ndim < 2 else factor(x.shape[-2]), factor(x.shape[-1]))


def _stay(key: Key[Array, ""], seen: Any, factors: Any) -> Any:
    return factors


def fitted(key: Key[Array, ""], seen: Any, factors: Any, *, rate: float) -> Any:
    """All factors after a step by what is to be whitened."""
    balance, noise = jax.random.split(key)
    balanced = jax.random.uniform(balance) < BALANCED
    step = functools.partial(fit, balanced=balanced, rate=rate)
    noises = optax.tree.random_like(noise, seen)
    return jax.tree.map(lambda g, v, q: batched(step, g)(g, v, q), seen, noises, factors)


def kron(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    update_probability: optax.ScalarOrSchedule | None = None,
    factor_learning_rate: float = 0.1,
    initial_scale: float = 1.0,
    max_size_triangular: int = 8192,
    min_ndim_triangular: int = 2,
    fit_to_momentum: bool = True,
    seed: int = 0,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """PSGD-Kron with the settings of `scale_by_kron` and decoupled weight decay."""
    return optax.chain(
        scale_by_kron(
            b1=b1, update_probability=update_probability, initial_scale=initial_scale,
            factor_learning_rate=factor_learning_rate, max_size_triangular=max_size_triangular,
            min_ndim_triangular=min_ndim_triangular, fit_to_momentum=fit_to_momentum, seed=seed,
        ),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )  # fmt: skip
