"""The error of a layer's output: what layer-wise methods minimize, as GPTQ. Frantar, Ashkboos,
Hoefler, Alistarh, ICLR 2023, arXiv:2210.17323. Notes: papers/autoquantize.md.

    s = ‖(Ŵ - W) X‖² / ‖W X‖²

It weighs all layers alike, whatever the model makes of their outputs.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from algorithms.numerics import relative_error
from algorithms.search.sensitivity import Passing, Sensitivity


def output_error() -> Sensitivity:
    """The relative squared error of each layer's output."""
    return Sensitivity(measure, score)


def measure(passing: Passing) -> Float[Array, "2"]:
    """‖ŷ - y‖² and ‖y‖²."""
    return jnp.stack([jnp.sum(passing.change**2), jnp.sum(passing.y**2)])


def score(sums: Float[Array, "2"], w: Array, d: Array, tokens: int) -> Float[Array, ""]:
    """s."""
    return relative_error(sums[0], sums[1])
