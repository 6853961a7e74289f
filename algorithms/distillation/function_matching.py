"""Function matching. Beyer, Zhai, Royer, Markeeva, Anil, Kolesnikov, Knowledge Distillation: A Good
Teacher is Patient and Consistent, CVPR 2022, arXiv:2106.05237.

Teacher and student see the same input, and inputs from beyond the data: their two functions are to
agree between images too. With λ ~ Beta(c, c) turned to λ ≥ ½ and x' the batch in another order
(mixup, Zhang et al., arXiv:1710.09412),
    x̃ = λ x + (1 - λ) x',   loss = τ² KL(teacher(x̃) ‖ student(x̃))
Labels play no part. Any inputs that can be added are mixed: pixels, features, embeddings. Tokens
cannot be; what is left for them is that both models read the same ones.

This differs from the code of big_vision in: 1. λ may be each example's own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Shaped

from algorithms.distillation.divergences import DistillationLoss, forward_kl


class FunctionMatching(NamedTuple):
    augment: Callable[[Key[Array, ""], Any], Any]  # what both models see, of a batch
    loss: DistillationLoss  # of their logits


def function_matching(
    *, concentration: float = 1.0, per_example: bool = False, temperature: float = 1.0
) -> FunctionMatching:
    """Mixup for both models, and the KL of what they make of it.

    concentration: c; of 1, every λ is as likely, and for c → 0 nothing is mixed. per_example: a λ
    for each example instead of one a batch.
    """
    if not concentration > 0:
        raise ValueError(f"concentration={concentration} must be positive.")

    def augment(key: Key[Array, ""], inputs: Any) -> Any:
        batch = jax.tree.leaves(inputs)[0].shape[0]
        share = mixing_share(key, batch if per_example else 1, concentration)
        return mixup(inputs, share)

    return FunctionMatching(augment, forward_kl(temperature=temperature))


def mixing_share(key: Key[Array, ""], count: int, concentration: float) -> Float[Array, " b"]:
    """λ of the batch (count 1), or of each example: at least ½, so that it stays mostly itself."""
    share = jax.random.beta(key, concentration, concentration, (count,))
    return jnp.maximum(share, 1 - share)


def mixup(inputs: Any, share: Float[Array, " _b"]) -> Any:
    """Each example of a pytree of batches with the one before it."""

    def mixed(x: Shaped[Array, "b ..."]) -> Float[Array, "b ..."]:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"Inputs of dtype {x.dtype} cannot be mixed: give floating numbers.")
        own = share.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return own * x + (1 - own) * jnp.roll(x, 1, axis=0)

    return jax.tree.map(mixed, inputs)
