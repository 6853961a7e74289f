"""NorMuon. Li, Liu, Liang, Chen, Zhao, ICLR 2026, arXiv:2510.05491.

Muon's steps are even in their directions but not in their neurons: rows of W [out, in], which are
columns of our kernels [in, out]. With M the average of gradients, O = polar(M), v_r for neuron r:
    v_r <- β₂ v_r + (1 - β₂) mean(O_r²)
    Ô_r = O_r / √v_r
    W <- W - η ‖O‖_F √max(1, out/in) Ô / ‖Ô‖_F

This is the official code. The paper (Alg. 1) differs in:
1. its step, η 0.2 √(out·in) Ô / ‖Ô‖_F, the same root mean square for all shapes: `rms=0.2`;
2. its momentum, which has no Nesterov's look ahead: `nesterov=False`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from algorithms.linalg import frobenius_norm
from algorithms.numerics import widened
from algorithms.optimizers.matrices import orthogonal_momentum, require_matrices

EPSILON = 1e-10


class NeuronState(NamedTuple):
    """v, [..., 1, out] for a kernel [..., in, out], in float32 at least."""

    second_moment: Any


def normuon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.95,
    beta2: float = 0.95,
    nesterov: bool = True,
    coefficients: str | Sequence[Sequence[float]] = "jordan",
    rms: float | None = None,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """NorMuon for parameters that are matrices."""
    return optax.chain(
        scale_by_normuon(
            momentum=momentum, beta2=beta2, nesterov=nesterov, coefficients=coefficients, rms=rms
        ),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_normuon(
    *,
    momentum: float = 0.95,
    beta2: float = 0.95,
    nesterov: bool = True,
    coefficients: str | Sequence[Sequence[float]] = "jordan",
    rms: float | None = None,
) -> optax.GradientTransformation:
    """The direction of `normuon`. The momentum has the parameters' dtype."""
    return optax.chain(
        orthogonal_momentum(momentum=momentum, nesterov=nesterov, coefficients=coefficients),
        scale_by_neuron_norms(beta2=beta2, rms=rms),
    )


def scale_by_neuron_norms(
    *, beta2: float = 0.95, rms: float | None = None
) -> optax.GradientTransformation:
    """Of updates that are orthogonal: as large a step in each neuron.

    rms: the root mean square of a matrix's step; by default its norm stays, but for √(out/in)
    where that is above 1.
    """
    if not 0 <= beta2 < 1:
        raise ValueError(f"beta2={beta2} must be at least 0 and below 1.")
    if rms is not None and rms <= 0:
        raise ValueError(f"rms={rms} must be above 0, or null.")

    def init(params: optax.Params) -> NeuronState:
        require_matrices(params, "normuon")
        return NeuronState(jax.tree.map(lambda p: jnp.zeros_like(mean_square(p)), params))

    def update(
        updates: optax.Updates, state: NeuronState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, NeuronState]:
        v = jax.tree.map(
            lambda o, v: beta2 * v + (1 - beta2) * mean_square(o), updates, state.second_moment
        )
        return jax.tree.map(functools.partial(balance, rms=rms), updates, v), NeuronState(v)

    return optax.GradientTransformation(init, update)


def mean_square(o: Float[Array, "*e i o"]) -> Float[Array, "*e 1 o"]:
    """Of each neuron's weights, in float32 at least."""
    return jnp.mean(widened(o) ** 2, axis=-2, keepdims=True)


def balance(
    o: Float[Array, "*e i o"], v: Float[Array, "*e 1 o"], rms: float | None = None
) -> Float[Array, "*e i o"]:
    """Ô with the norm that a step has."""
    inputs, outputs = o.shape[-2:]
    even = o / (jnp.sqrt(v) + EPSILON)
    if rms is None:
        norm = frobenius_norm(o) * math.sqrt(max(1, outputs / inputs))
    else:
        norm = jnp.asarray(rms * math.sqrt(inputs * outputs), v.dtype)
    return (even * (norm / (frobenius_norm(even) + EPSILON))).astype(o.dtype)
