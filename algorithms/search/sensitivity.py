"""What a score of an option is made of: what passes a layer, and how the option changes it.

A layer is y = W x. An option computes ŷ in its place, and changes W by D. Every score is a sum over
tokens, which adds up over chunks, and a function of that sum.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float


class Passing(NamedTuple):
    """What passes a layer: n tokens, i inputs, o outputs."""

    x: Float[Array, "n i"]
    y: Float[Array, "n o"]
    change: Float[Array, "n o"]  # ŷ - y
    g: Float[Array, "n o"] | None  # ∂L/∂y of the loss of all tokens, in nats


class Sensitivity(NamedTuple):
    """A score by layers alone.

    `measure(passing)` gives sums over its tokens; `score(sums, w, d, tokens)` what the option
    costs, of the sums over all of them. `gradients`: whether g is looked at, which takes a backward
    pass.
    `weights`: whether D is, which an option has only where it multiplies its input by a matrix.
    """

    measure: Callable[[Passing], Any]
    score: Callable[[Any, Float[Array, "*e o i"], Float[Array, "*e o i"], int], Float[Array, ""]]
    gradients: bool = False
    weights: bool = False
