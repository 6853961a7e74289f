"""One sparsity for the whole model, another for each of its units: the interface that methods have.

Units are blocks or layers. What a method measures of one is a short vector, so that all can be kept
until the last is there.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, Real

Statistics = Any  # of a site, a pytree of arrays


class SparsityMethod(NamedTuple):
    """How sparse each unit is, where a fraction of all weights goes.

    `init(i)` and `observe(stats, x)` are as in `LayerwiseMethod`, None where no activations are
    looked at. `measure(weights, stats)` is of one unit, its layers' weights with their sites'
    statistics. `allocate(measures, sizes, sparsity)` gives each unit's fraction, such that
    `sparsity` is their mean, weighed by `sizes`.
    """

    unit: Literal["layer", "block"]
    measure: Callable[[Sequence[Float[Array, "..."]], Sequence[Statistics]], Real[Array, " m"]]
    allocate: Callable[
        [Real[np.ndarray, "u m"], Int[np.ndarray, " u"], float | int], Float[np.ndarray, " u"]
    ]
    init: Callable[[int], Statistics] | None = None
    observe: Callable[[Statistics, Float[Array, "n i"]], Statistics] | None = None
