"""What the model says with one unit changed, against what it said: the divergence of its outputs.
NVIDIA Model Optimizer, `AutoQuantizeKLDivSearcher`, https://github.com/NVIDIA/Model-Optimizer.
Notes: papers/autoquantize.md.

Of logits l and, with one option in place, l', at each position
    KL(p ‖ p') = Σ_v p_v (l_v - l'_v) - log Σ exp l + log Σ exp l',   p = softmax(l)
It is measured, not approximated, and takes the rest of the model for each option. Vocabularies come
in parts: the sums are kept relative to the largest logit so far.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class OutputDivergence(NamedTuple):
    """A score by the whole model's output."""


def kl() -> OutputDivergence:
    """What an option changes of the model's predictions, in nats per token."""
    return OutputDivergence()


class Parts(NamedTuple):
    """Of the logits seen so far, at one position."""

    top: Float[Array, "*n"]
    total: Float[Array, "*n"]  # Σ exp(l - top)
    apart: Float[Array, "*n"]  # Σ exp(l - top) (l - l')
    top_changed: Float[Array, "*n"]
    total_changed: Float[Array, "*n"]

    @property
    def divergence(self) -> Float[Array, "*n"]:
        """KL(p ‖ p'), in nats."""
        log_z = self.top + jnp.log(self.total)
        log_z_changed = self.top_changed + jnp.log(self.total_changed)
        return self.apart / self.total - log_z + log_z_changed


def nothing(*shape: int) -> Parts:
    zeros, least = jnp.zeros(shape), jnp.full(shape, -jnp.inf)
    return Parts(least, zeros, zeros, least, zeros)


def add(parts: Parts, logits: Float[Array, " v"], changed: Float[Array, " v"]) -> Parts:
    """With the logits of some more tokens of the vocabulary, at one position."""
    top = jnp.maximum(parts.top, logits.max())
    top_changed = jnp.maximum(parts.top_changed, changed.max())
    shrink, p = jnp.exp(parts.top - top), jnp.exp(logits - top)
    return Parts(
        top,
        parts.total * shrink + p.sum(),
        parts.apart * shrink + jnp.sum(p * (logits - changed)),
        top_changed,
        parts.total_changed * jnp.exp(parts.top_changed - top_changed)
        + jnp.exp(changed - top_changed).sum(),
    )
