"""What a model says of each position, before anybody has computed logits.

A loss over a large vocabulary never needs all logits at once: `kernels.linear_cross_entropy` and
`kernels.linear_kl` take the last activations and the head's weight instead.
"""

from typing import Any, NamedTuple

from jaxtyping import Array, Float

from models.attention import capped


class Predictions(NamedTuple):
    """Logits of n positions as h Wᵀ, capped where the family caps them; without W, h are logits."""

    hidden: Float[Array, "n d"]
    weight: Float[Array, "v _d"] | None = None
    cap: float | None = None
    features: tuple[Float[Array, "n _"], ...] = ()  # activations that were asked for, in order
    related: tuple[Any, ...] = ()  # queries, keys and values that were

    @property
    def logits(self) -> Float[Array, "n v"]:
        if self.weight is None:
            return self.hidden
        return capped(self.hidden @ self.weight.astype(self.hidden.dtype).T, self.cap)
