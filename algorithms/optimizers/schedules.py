"""Learning-rate schedules with a peak of one, and what multiplies a peak by one of them."""

import optax


def scaled(schedule: optax.Schedule, peak: float) -> optax.Schedule:
    """peak · schedule."""

    return lambda count: peak * schedule(count)
