"""KL-Shampoo and KL-SOAP. Lin, Lowe, Dangel, Eschenhagen, Xu, Grosse, ICLR 2026, arXiv:2509.03378.

Shampoo's L and R are not the best Kronecker factors of gradients' covariance. Those that minimise
KL(N(0, E[vec G vec Gᵀ]) || N(0, L ⊗ R)) satisfy L = E[G R⁻¹ Gᵀ] / n and R = E[Gᵀ L⁻¹ G] / m, so
    L <- β L + (1 - β) G R⁻¹ Gᵀ / n,   R <- β R + (1 - β) Gᵀ L⁻¹ G / m
where inverses are those of Q diag(λ) Qᵀ. Q follows by QR(L Q) every `frequency` steps, and λ by
    λ_L <- β λ_L + (1 - β) diag(Q_Lᵀ G R⁻¹ Gᵀ Q_L) / n
in every step. With G' = Q_Lᵀ G Q_R and M the mean gradient, M' = Q_Lᵀ M Q_R, the update is
    KL-Shampoo: Q_L (M' / √(λ_L λ_Rᵀ)) Q_Rᵀ,     KL-SOAP: Q_L (M' / √V) Q_Rᵀ, V the mean of G' ⊙ G'.

As in the official code, the first gradient makes the bases, by L = G Gᵀ / n, and moves nothing, and
neither M nor V is corrected for its bias. This differs from it in:
1. It computes in float32, not bfloat16.
2. Each matrix of a stack has factors of its own; the third axis of a tensor has none.
3. Sides above max_size are not rotated: their covariance is taken for I.
4. KL-SOAP's M is not kept rotated, weight decay is optax's, and the first basis of a null space is
   made of unit vectors (as in soap.py).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from algorithms.optimizers import eigenbases
from algorithms.optimizers.eigenbases import Sides, rotate, rotate_back
from algorithms.optimizers.leaves import map_leaves, wide_zeros
from algorithms.optimizers.matrices import require_matrices


class KLState(NamedTuple):
    """In float32, or the parameters' dtype where that is wider."""

    step: Int[Array, ""]  # gradients seen
    mu: Any  # M
    nu: Any  # V of KL-SOAP; None in the place of each parameter for KL-Shampoo
    factors: Any  # (L, R) in the place of each parameter
    spectra: Any  # (λ_L, λ_R)
    bases: Any  # (Q_L, Q_R)


def scale_by_kl_shampoo(
    *,
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-8,
    frequency: int = 10,
    max_size: int = 10_000,
    initial: float = 0.1,
    max_inverse_root: int = 4000,
    normalize: bool = False,
    augmented: bool = False,
) -> optax.GradientTransformation:
    """The mean gradient, whitened by the factors.

    b2: β, and of V. eps: added to the root. frequency: steps from basis to basis. max_size: wider
    sides are not rotated. initial: all λ after the first gradient. max_inverse_root: λ^-½ is at
    most this, and at most max(10, the side's size). normalize: each matrix's update has a mean
    square of 1. augmented: by V in the place of λ, which is KL-SOAP. Raises ValueError for
    parameters that are no matrices.
    """
    eigenbases.validate(frequency=frequency, max_size=max_size, eps=eps, b1=b1, b2=b2)
    if initial <= 0:
        raise ValueError(f"initial={initial} must be above 0: factors are divided by.")

    def init(params: Any) -> KLState:
        require_matrices(params, "kl_soap" if augmented else "kl_shampoo")
        mu = jax.tree.map(wide_zeros, params)
        nu = jax.tree.map(lambda p: wide_zeros(p) if augmented else None, params)
        bases = jax.tree.map(lambda p: eigenbases.identities(p, max_size), params)
        factors = jax.tree.map(jnp.zeros_like, bases)
        spectra = jax.tree.map(lambda q: jnp.ones(q.shape[:-1], q.dtype), bases)
        return KLState(jnp.zeros([], jnp.int32), mu, nu, factors, spectra, bases)

    def floor(values: jax.Array) -> float:
        return max(10, min(values.shape[-1], max_inverse_root)) ** -2

    def update(grads: Any, state: KLState, params: Any = None) -> tuple[Any, KLState]:
        del params
        count = state.step

        def one(
            gradient: Any, mu: Any, nu: Any, factors: Sides, spectra: Sides, bases: Sides
        ) -> tuple:
            g = gradient.astype(mu.dtype)
            seen = jnp.where(count == 0, 0, g)
            mu = b1 * mu + (1 - b1) * seen
            if nu is not None:
                nu = b2 * nu + (1 - b2) * rotate(seen, bases) ** 2
            root = jnp.sqrt(outer(spectra, g) if nu is None else nu)
            move = rotate_back(rotate(mu, bases) / (root + eps), bases)
            move = eigenbases.unit_rms(move) if normalize else move
            factors, spectra = estimated(g, factors, spectra, bases, b2)
            spectra = jax.tree.map(
                lambda v: jnp.where(count == 0, initial, jnp.maximum(v, floor(v))), spectra
            )
            bases, nu = eigenbases.refreshed(count, frequency, iterate, factors, bases, nu)
            return move.astype(gradient.dtype), mu, nu, factors, spectra, bases

        moves, *rest = map_leaves(one, grads, *state[1:])
        return moves, KLState(optax.safe_increment(count), *rest)

    return optax.GradientTransformation(init, update)


def outer(spectra: Sides, g: Float[Array, "*batch m n"]) -> Float[Array, "*batch m n"]:
    """λ_L λ_Rᵀ, 1 for a side without."""
    left, right = spectra
    product = jnp.ones_like(g) if left is None else jnp.broadcast_to(left[..., None], g.shape)
    return product if right is None else product * right[..., None, :]


def estimated(
    g: Float[Array, "*batch m n"], factors: Sides, spectra: Sides, bases: Sides, decay: float
) -> tuple[Sides, Sides]:
    """Factors and their λ with G's part in them, each side's by the other's last ones."""
    left, right = zip(factors, spectra, bases, strict=True)
    new_left, new_right = _side(g, left, right, decay), _side(g.mT, right, left, decay)
    return Sides(new_left[0], new_right[0]), Sides(new_left[1], new_right[1])


def _side(g: jax.Array, own: tuple, other: tuple, decay: float) -> tuple:
    """The left side's (L, λ_L) from G, own (L, λ_L, Q_L) and the other's (R, λ_R, Q_R)."""
    (factor, values, q), (_, other_values, other_q) = own, other
    if factor is None:
        return None, None
    half = g if other_q is None else g @ other_q / jnp.sqrt(other_values)[..., None, :]
    values = decay * values + (1 - decay) * jnp.mean((q.mT @ half) ** 2, axis=-1)
    return decay * factor + (1 - decay) * half @ half.mT / g.shape[-1], values


def iterate(factors: Sides, bases: Sides, nu: Any) -> tuple[Sides, Any]:
    """Q after a step of power iteration, its columns in their old order."""
    return jax.tree.map(lambda f, q: jnp.linalg.qr(f @ q)[0], factors, bases), nu


def kl_shampoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-8,
    frequency: int = 10,
    max_size: int = 10_000,
    initial: float = 0.1,
    max_inverse_root: int = 4000,
    normalize: bool = False,
    augmented: bool = False,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """KL-Shampoo (augmented: KL-SOAP) with the settings of `scale_by_kl_shampoo` and decoupled
    weight decay."""
    return optax.chain(
        scale_by_kl_shampoo(
            b1=b1, b2=b2, eps=eps, frequency=frequency, max_size=max_size, initial=initial,
            max_inverse_root=max_inverse_root, normalize=normalize, augmented=augmented,
        ),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )  # fmt: skip
