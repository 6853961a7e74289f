"""Puzzle. Bercovich, Ronen, Abramovich, Ailon, Assaf, Dabbah, Galil, Geifman, Geifman, Golan,
Haber, Karpas, Koren, Levy, Molchanov, Mor, Moshe, Nabwani, Puny, Rubin, Schen, Shahaf, Tropp,
Ullman Argov, Zilberstein, El-Yaniv, "Puzzle: Distillation-Based NAS for Inference-Optimized LLMs",
ICML 2025, PMLR 267, arXiv:2411.19146. Notes: papers/puzzle.md.

Every block has a library of cheaper alternatives to its attention and to its feed-forward layer. Of
activations x that enter the last projection W [o, i] of the latter, the channels stay that give
most (their contribution), and of key-value heads j that become one, the mean:
    C_i = E_t |x_ti| ‖W_:,i‖₂,   W'_g = mean of W_j over the heads j of group g
Each alternative is then trained by itself, in the place of the parent's, on what enters the block
in the parent (block-wise local distillation): with o_p and o_c what the parent's block and the
changed one give,
    L = ‖o_p - o_c‖² / ‖o_p‖²
Its score is what the model loses with this alternative alone in place, KL(p ‖ p') of predictions
(`search.kl`), and a programme takes one of each (`search.programme`): the least sum of scores
within budgets.
"""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from algorithms.blockwise import BlockwiseMethod
from algorithms.tensors import CompressedTensor, DenseTensor


def channel_contribution(
    activity: Float[Array, " i"], w: Float[Array, "o i"]
) -> Float[Array, " i"]:
    """C, from the mean |x| of each channel."""
    return activity * jnp.linalg.norm(w, axis=0)


def pooled_heads(x: Float[Array, "i *m"], heads: int, fewer: int) -> Float[Array, "j *m"]:
    """Rows of `heads` key-value heads, one head behind the other, as `fewer` of them: each the mean
    of those that follow one another. Raises ValueError where that leaves a rest.
    """
    if fewer < 1 or heads % fewer:
        raise ValueError(
            f"fewer={fewer} must divide heads={heads}: a head that is left is the mean of as many "
            "as any other."
        )
    size = x.shape[0] // heads
    grouped = x.reshape(fewer, heads // fewer, size, *x.shape[1:])
    return grouped.mean(1).reshape(fewer * size, *x.shape[1:])


def local_distillation(
    *, steps: int = 32, batch: int = 4, learning_rate: float = 3e-4
) -> BlockwiseMethod:
    """Weights that are their own parameters, by Adam whose rate falls to 0 along a cosine. What the
    block gives is normalized by `blockwise`, over all windows.
    """
    if steps < 1 or batch < 1:
        raise ValueError(f"{steps=} and {batch=} must be at least 1.")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate={learning_rate} must be above 0.")
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    return BlockwiseMethod(_own, _approximate, _finish, optimizer, steps, batch)


def _own(w: Float[Array, "o i"]) -> Float[Array, "o i"]:
    return w


def _approximate(w: Float[Array, "o i"], parameters: Float[Array, "o i"]) -> Float[Array, "o i"]:
    return parameters


def _finish(w: Float[Array, "o i"], parameters: Float[Array, "o i"]) -> CompressedTensor:
    return DenseTensor(parameters)
