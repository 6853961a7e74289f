"""SOAP. Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson, Kakade, ICLR 2025,
arXiv:2409.11321.

Adam in the eigenbases of Shampoo's factors (Alg. 3), where ⊙ and / are by element:
    L <- β L + (1 - β) G Gᵀ,   R <- β R + (1 - β) Gᵀ G
    G' = Q_Lᵀ G Q_R,   M <- β1 M + (1 - β1) G,   V <- β2 V + (1 - β2) G' ⊙ G'
    update Q_L (M' / √V) Q_Rᵀ,   M' = Q_Lᵀ M Q_R
and every `frequency` steps a step of power iteration (Alg. 4), Q_L <- QR(L Q_L), Q_R <- QR(R Q_R).

As in the official code, the first gradient makes the bases and moves nothing, and columns of Q,
with what V has for them, are first put in the order of their estimated eigenvalues. This differs
from it in:
1. M is kept as in the paper, not rotated: the same number but for rounding.
2. Each matrix of a stack (axes before the last two) has factors of its own; no axes are merged.
3. Weight decay is optax's: of the parameters before the step, and in the first step too.
4. The first basis of a null space is made of unit vectors, not of what a solver rounds to.
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


class SOAPState(NamedTuple):
    """In float32, or the parameters' dtype where that is wider."""

    step: Int[Array, ""]  # gradients seen
    mu: Any  # M
    nu: Any  # V
    factors: Any  # (L, R) in the place of each parameter
    bases: Any  # (Q_L, Q_R)


def scale_by_soap(
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    factor_decay: float | None = None,
    eps: float = 1e-8,
    frequency: int = 10,
    max_size: int = 10_000,
    normalize: bool = False,
    correct_bias: bool = True,
) -> optax.GradientTransformation:
    """Adam in eigenbases.

    factor_decay: β of L and R, b2 if None. eps: added to √V. frequency: steps from basis to basis.
    max_size: wider sides are not rotated. normalize: each matrix's update has a mean square of 1.
    correct_bias: Adam's, of M and √V. Raises ValueError for parameters that are no matrices.
    """
    decay = b2 if factor_decay is None else factor_decay
    eigenbases.validate(
        frequency=frequency, max_size=max_size, eps=eps, b1=b1, b2=b2, factor_decay=decay
    )

    def init(params: Any) -> SOAPState:
        require_matrices(params, "soap")
        mu, nu = jax.tree.map(wide_zeros, params), jax.tree.map(wide_zeros, params)
        bases = jax.tree.map(lambda p: eigenbases.identities(p, max_size), params)
        factors = jax.tree.map(jnp.zeros_like, bases)
        return SOAPState(jnp.zeros([], jnp.int32), mu, nu, factors, bases)

    def update(grads: Any, state: SOAPState, params: Any = None) -> tuple[Any, SOAPState]:
        del params
        count = state.step
        moved = jnp.maximum(count, 1)  # the first gradient moves nothing
        scale = jnp.sqrt(1 - b2**moved) / (1 - b1**moved) if correct_bias else 1.0

        def one(gradient: Any, mu: Any, nu: Any, factors: Sides, bases: Sides) -> tuple:
            g = gradient.astype(mu.dtype)
            seen = jnp.where(count == 0, 0, g)
            mu = b1 * mu + (1 - b1) * seen
            nu = b2 * nu + (1 - b2) * rotate(seen, bases) ** 2
            move = rotate_back(rotate(mu, bases) / (jnp.sqrt(nu) + eps), bases)
            move = scale * (eigenbases.unit_rms(move) if normalize else move)
            factors = averaged(factors, g, decay)
            bases, nu = eigenbases.refreshed(count, frequency, iterate, factors, bases, nu)
            return move.astype(gradient.dtype), mu, nu, factors, bases

        moves, *rest = map_leaves(one, grads, state.mu, state.nu, state.factors, state.bases)
        return moves, SOAPState(optax.safe_increment(count), *rest)

    return optax.GradientTransformation(init, update)


def averaged(factors: Sides, g: Float[Array, "*batch m n"], decay: float) -> Sides:
    """L and R with G's part in them."""

    def mean(factor: jax.Array | None, g: jax.Array) -> jax.Array | None:
        return None if factor is None else decay * factor + (1 - decay) * g @ g.mT

    return Sides(mean(factors.left, g), mean(factors.right, g.mT))


def iterate(
    factors: Sides, bases: Sides, nu: Float[Array, "*batch m n"]
) -> tuple[Sides, Float[Array, "*batch m n"]]:
    """Q after a step of power iteration, and V in the order of its columns."""
    left, right = bases
    if left is not None:
        left, order = _iterate(factors.left, left)
        nu = jnp.take_along_axis(nu, order[..., :, None], axis=-2)
    if right is not None:
        right, order = _iterate(factors.right, right)
        nu = jnp.take_along_axis(nu, order[..., None, :], axis=-1)
    return Sides(left, right), nu


def _iterate(
    factor: Float[Array, "*batch d d"], q: Float[Array, "*batch d d"]
) -> tuple[Float[Array, "*batch d d"], Int[Array, "*batch d"]]:
    """QR(L Q), columns by their falling qᵀ L q; and their order."""
    product = factor @ q
    order = jnp.argsort(jnp.sum(q * product, axis=-2), axis=-1, descending=True)
    product = jnp.take_along_axis(product, order[..., None, :], axis=-1)
    return jnp.linalg.qr(product)[0], order


def soap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    factor_decay: float | None = None,
    eps: float = 1e-8,
    frequency: int = 10,
    max_size: int = 10_000,
    normalize: bool = False,
    correct_bias: bool = True,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """SOAP with the settings of `scale_by_soap` and decoupled weight decay."""
    return optax.chain(
        scale_by_soap(
            b1=b1, b2=b2, factor_decay=factor_decay, eps=eps, frequency=frequency,
            max_size=max_size, normalize=normalize, correct_bias=correct_bias,
        ),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )  # fmt: skip
