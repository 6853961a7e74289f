"""ADMM pruning. Boža, 2024, arXiv:2401.02938. Notes: papers/admm.md.

What is left after pruning is found by least squares, ‖W X - (M ⊙ Ŵ) X‖² at its least, in which
every step of the alternating direction method of multipliers uses the one inverse (Alg. 1). With
n_j = ‖X_j‖₂, in whose units all weights and X Xᵀ are, H = X Xᵀ + λ I there, and Ŵ = W, U = 0:
    Z <- M ⊙ (Ŵ + U),   U <- U + Ŵ - Z,   Ŵ <- (W H + ρ (Z - U)) (H + ρ I)⁻¹
and M ⊙ (Ŵ + U) at last. In these units |Ŵ + U| is Wanda's score. By it the mask is chosen, once, or
in each of the first k_s steps anew, of more and more weights (Alg. 2):
    s_t = s_f - s_f (1 - t / k_s)³
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from algorithms import hessian
from algorithms.hessian import HessianStats
from algorithms.layerwise import LayerwiseMethod
from algorithms.pruning.patterns import Pattern, of_blocks, top
from algorithms.tensors import CompressedTensor

type Choose = Callable[[Int[Array, ""], Float[Array, "o i"], Bool[Array, "o i"]], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ADMMConfig:
    """What goes, and how what stays is found."""

    pattern: Pattern = Pattern()
    steps: int = 20
    gradual_steps: int = 15  # k_s, in which the mask is chosen; 0: once, before the first
    damping: float = 0.1  # λ as a fraction of mean(diag(X Xᵀ)), in units of n
    penalty: float = 1.0  # ρ
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.steps < 0 or not 0 <= self.gradual_steps <= self.steps:
            raise ValueError(
                f"gradual_steps={self.gradual_steps} must be from 0 to steps={self.steps}."
            )
        if self.damping < 0:
            raise ValueError(f"damping={self.damping} must not be negative.")
        if self.penalty <= 0:
            raise ValueError(f"penalty={self.penalty} must be positive.")

    def kept(self, n: int) -> np.ndarray:
        """Of n weights, how many stay in each of the steps in which the mask is chosen."""
        gone, k = self.pattern.gone, self.gradual_steps
        grown = [n - int(n * (gone - gone * (1 - t / k) ** 3)) for t in range(1, k)]
        return np.array([*grown, self.pattern.kept(n)], np.int32)


def admm(
    *,
    sparsity: float = 0.5,
    keep: int | None = None,
    block: int | None = None,
    steps: int = 20,
    gradual_steps: int = 15,
    damping: float = 0.1,
    penalty: float = 1.0,
    dtype: str = "float16",
) -> LayerwiseMethod:
    """Remove the fraction `sparsity` of a layer, or all but `keep` of each `block`, and find what
    stays by least squares.

    dtype: what is stored of that. Raises ValueError for settings outside their ranges.
    """
    config = ADMMConfig(
        pattern=Pattern(sparsity=sparsity, keep=keep, block=block), steps=steps,
        gradual_steps=gradual_steps, damping=damping, penalty=penalty, dtype=dtype,
    )  # fmt: skip

    def compress(w: Float[Array, "o i"], stats: HessianStats) -> CompressedTensor:
        return prune_weight(w, stats.gram, config)

    # The mask that grows is chosen of a whole layer, also where it ends in blocks.
    return hessian.method(compress, stacked=block is not None and not gradual_steps)


def prune_weight(
    w: Float[Array, "o i"], h: Float[Array, "i i"], config: ADMMConfig
) -> CompressedTensor:
    """Prune W given X Xᵀ, summed or averaged. Raises ValueError if blocks do not divide i."""
    pattern, kept = config.pattern, jnp.asarray(config.kept(w.size))
    pattern.require(w.shape[1])

    def choose(step, size, mask):
        if not config.gradual_steps:
            return mask
        grown = _largest(size, kept[jnp.minimum(step, len(kept) - 1)], pattern)
        return jnp.where(step < config.gradual_steps, grown, mask)

    once = pattern.of_all(jnp.abs(w) * _norms(h))
    found, mask = _alternated(w, h, once, choose, config)
    return pattern.tensor(found, mask, dtype=config.dtype)


def reconstructed(
    w: Float[Array, "o i"], h: Float[Array, "i i"], mask: Bool[Array, "o i"], config: ADMMConfig
) -> Float[Array, "o i"]:
    """What stays of W under a mask, whoever chose it."""
    return _alternated(w, h, mask, lambda step, size, mask: mask, config)[0]


def _alternated(
    w: Float[Array, "o i"],
    h: Float[Array, "i i"],
    mask: Bool[Array, "o i"],
    choose: Choose,
    config: ADMMConfig,
) -> tuple[Float[Array, "o i"], Bool[Array, "o i"]]:
    """The steps: what stays, and the mask.

    choose(step, |Ŵ + U|, mask) is the mask of a step.
    """
    n, rho = _norms(h), config.penalty
    w = jnp.where(jnp.diag(h) == 0, 0, w) * n  # inputs that are always zero: their weights are free
    gram = h / n / n[:, None]
    eye = jnp.eye(len(h), dtype=h.dtype)
    gram = gram + config.damping * jnp.mean(jnp.diag(gram)) * eye
    r = hessian.inverse_factor(gram + rho * eye, 0.0)
    inverse, aim = r.T @ r, w @ gram

    def step(t, state):
        found, u, mask = state
        mask = choose(t, jnp.abs(found + u), mask)
        z = jnp.where(mask, found + u, 0)
        u = u + found - z
        return (aim + rho * (z - u)) @ inverse, u, mask

    found, u, mask = lax.fori_loop(0, config.steps, step, (w, jnp.zeros_like(w), mask))
    return jnp.where(mask, found + u, 0) / n, mask


def _norms(h: Float[Array, "i i"]) -> Float[Array, " i"]:
    """n, 1 for inputs that are always zero."""
    n = jnp.sqrt(jnp.diag(h))
    return jnp.where(n == 0, 1, n)


def _largest(size: Float[Array, "o i"], kept: Int[Array, ""], pattern: Pattern) -> Array:
    """So many of a matrix; those that blocks keep in the end are among them."""
    if pattern.keep is not None and pattern.block is not None:
        size = jnp.where(of_blocks(size, pattern.keep, pattern.block), jnp.inf, size)
    return top(size.reshape(-1), kept).reshape(size.shape)
