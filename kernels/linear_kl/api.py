"""The public function: checks shapes, chooses an implementation."""

from collections.abc import Callable
from typing import Any

from jax import lax
from jaxtyping import Array, Float

from kernels import dispatch
from kernels.linear_cross_entropy.api import bucket as of_student
from kernels.linear_kl import mosaic, reference, xla
from kernels.linear_kl.divergence import Divergence

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "reference": reference.linear_kl,
    "xla": xla.linear_kl,
    "mosaic": mosaic.linear_kl,
}
KINDS = ("forward", "reverse", "jsd")


def linear_kl(
    h_s: Float[Array, "t ds"],
    w_s: Float[Array, "v _ds"],
    h_t: Float[Array, "_t dt"],
    w_t: Float[Array, "_v _dt"],
    *,
    kind: str = "forward",
    temperature: float = 1.0,
    beta: float = 0.5,
    implementation: str = "auto",
) -> Float[Array, " t"]:
    """The divergence between teacher and student at each token in nats, of the softmaxes of
    h_t w_tᵀ / temperature and h_s w_sᵀ / temperature.

    kind: "forward", KL(teacher ‖ student); "reverse", KL(student ‖ teacher); "jsd", the generalized
    Jensen-Shannon divergence with `beta` the teacher's share of the mixture (`divergence` has the
    equations). It is not multiplied by temperature². float32, or the wider type of the arguments.

    Differentiable in h_s and w_s. The teacher is not differentiated: its gradients are zero.
    Neither pass holds all the logits: backward computes them anew. implementation: see
    `kernels.dispatch`; "reference" does hold them. Raises ValueError for shapes that do not fit, an
    unknown kind, settings out of range, and an implementation that cannot run.
    """
    _check(h_s, w_s, h_t, w_t, kind, temperature, beta)
    arrays = (h_s, w_s, lax.stop_gradient(h_t), lax.stop_gradient(w_t))
    divergence = Divergence(kind, beta, temperature)
    return dispatch.run(
        "linear_kl", IMPLEMENTATIONS, implementation, *arrays,
        lacks=mosaic.lacks(*arrays), bucket=bucket(h_s, w_s, kind), divergence=divergence,
    )  # fmt: skip


def _check(h_s, w_s, h_t, w_t, kind, temperature, beta) -> None:
    for name, h, w in (("s", h_s, w_s), ("t", h_t, w_t)):
        if h.shape[1] != w.shape[1]:
            raise ValueError(
                f"h_{name} and w_{name} must have the same last dimension, "
                f"h_{name}.shape={h.shape}, w_{name}.shape={w.shape}."
            )
    if h_s.shape[0] != h_t.shape[0]:
        raise ValueError(f"h_s and h_t must have the same tokens, {h_s.shape=}, {h_t.shape=}.")
    if w_s.shape[0] != w_t.shape[0]:
        raise ValueError(f"w_s and w_t must have the same vocabulary, {w_s.shape=}, {w_t.shape=}.")
    if w_s.shape[0] == 0:
        raise ValueError(f"w_s must have a row for each entry of the vocabulary, {w_s.shape=}.")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}.")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive.")
    if not 0 < beta < 1:
        raise ValueError(f"beta={beta} must lie between 0 and 1: the ends are no divergence.")


def bucket(h_s, w_s, kind: str) -> str:
    """Shapes whose speed is alike: by the passes of a kind, and as the student's cross-entropy."""
    passes = "jsd" if kind == "jsd" else "kl"
    return f"{passes}, {of_student(h_s, w_s)}"
