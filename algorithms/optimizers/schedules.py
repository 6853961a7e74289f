"""Learning-rate schedules with a peak of one, and what multiplies a peak by one of them."""

import optax
from jaxtyping import Array, Float


def scaled(schedule: optax.Schedule, peak: float) -> optax.Schedule:
    """peak · schedule."""

    def at(count) -> Float[Array, ""]:
        return peak * schedule(count)

    return at
