"""Learning rates over a run, as factors whose peak is 1: an optimizer's own number is the peak.

WSD, warmup-stable-decay: MiniCPM, Hu et al., COLM 2024, arXiv:2404.06395; with its shapes of decay,
Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations, Hägele et al., NeurIPS
2024, arXiv:2405.18392. With x from 0 to 1 over the decay and f the factor at the end,
    linear  1 - (1 - f) x,   sqrt  1 - (1 - f) √x,   exponential  fˣ
MiniCPM's own decay 0.5^(s/T) is `exponential`.

Power Scheduler: A Batch Size and Token Number Agnostic Learning Rate Scheduler. Shen, Stallone,
Mishra, Zhang, Tan, Prasad, Soria, Cox, Panda, 2024, arXiv:2408.13359:
    η(n) = min(η_max, β a n^b)
for n tokens and batches of β: with h the step at which the two are equal, min(1, (s/h)^b). The
authors' code has no decay at its end, which is `decay=0.0` here.
"""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike

DECAYS: dict[str, Callable[[Array, float], Array]] = {
    "linear": lambda x, end: 1 - (1 - end) * x,
    "sqrt": lambda x, end: 1 - (1 - end) * jnp.sqrt(x),
    "exponential": lambda x, end: end**x,
}


def constant(*, warmup: int = 0) -> optax.Schedule:
    """From 0 to 1 in `warmup` steps, then 1."""
    return _risen(optax.constant_schedule(1.0), warmup)


def linear(*, steps: int, warmup: int = 0, end: float = 0.0) -> optax.Schedule:
    """From 0 to 1 in `warmup` steps, then along a line to `end` at the last of `steps`."""
    return _risen(optax.linear_schedule(1.0, end, steps - warmup), warmup)


def cosine(*, steps: int, warmup: int = 0, end: float = 0.0) -> optax.Schedule:
    """From 0 to 1 in `warmup` steps, then along a cosine to `end` at the last of `steps`."""
    return optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, steps, end)


def wsd(
    *, steps: int, warmup: int = 0, decay: float = 0.2, shape: str = "sqrt", end: float = 0.0
) -> optax.Schedule:
    """From 0 to 1 in `warmup` steps, then 1, then down to `end` over the last `decay` of the steps.

    shape: linear, sqrt or exponential; the last needs an end above 0.
    """
    if shape not in DECAYS:
        raise ValueError(f"shape={shape} must be one of {', '.join(DECAYS)}.")
    if shape == "exponential" and end <= 0:
        raise ValueError(f"end={end} must be above 0 for an exponential decay.")
    return _ended(optax.constant_schedule(1.0), steps, warmup, decay, shape, end)


def power(
    *,
    steps: int,
    warmup: int = 0,
    hold: int | None = None,
    exponent: float = -0.51,
    decay: float = 0.1,
    end: float = 0.0,
) -> optax.Schedule:
    """From 0 to 1 in `warmup` steps, 1 until step `hold`, then a power of the steps.

    hold: h; null: the end of the warm-up. exponent: b. decay: the fraction of the steps at the end
    in which a line to `end` is a factor besides, as in `wsd`; 0: none.
    """
    h = max(warmup, 1) if hold is None else hold
    if h < max(warmup, 1):
        raise ValueError(f"hold={hold} must be at least warmup={warmup}, and 1 step.")
    if exponent >= 0:
        raise ValueError(f"exponent={exponent} must be below 0.")
    factor = lambda s: jnp.minimum(1.0, (jnp.maximum(s, 1) / h) ** exponent)  # noqa: E731
    return _ended(factor, steps, warmup, decay, "linear", end)


def scaled(schedule: optax.Schedule, peak: float) -> optax.Schedule:
    """A schedule times a number."""
    return lambda count: peak * schedule(count)


def _risen(after: optax.Schedule, warmup: int) -> optax.Schedule:
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), after], [warmup])


def _ended(
    middle: optax.Schedule, steps: int, warmup: int, decay: float, shape: str, end: float
) -> optax.Schedule:
    """`middle`, after a linear warm-up, and at the end decayed from where it is."""
    if not 0 <= decay <= 1:
        raise ValueError(f"decay={decay} must be a fraction of the steps, between 0 and 1.")
    last = round(decay * steps)
    if warmup < 0 or warmup + last > steps:
        raise ValueError(f"warmup={warmup} and the decay's {last} must fit into {steps=} steps.")

    def decayed(count: ArrayLike) -> ArrayLike:
        x = jnp.clip(count / last, 0.0, 1.0)
        return middle(steps - last) * DECAYS[shape](x, end)

    risen = _risen(lambda count: middle(count + warmup), warmup)
    return optax.join_schedules([risen, decayed], [steps - last]) if last else risen
