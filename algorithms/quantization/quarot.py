"""QuaRot. Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler, Hensman, "QuaRot:
Outlier-Free 4-Bit Inference in Rotated LLMs", NeurIPS 2024, arXiv:2404.00456. Notes:
papers/quarot.md.

An orthogonal R turns the residual stream, x -> x R (rows are tokens), and RMSNorm without its scale
γ commutes with it: rms(x R) = rms(x) R. So the model computes what it did (Section 3.1) where
    embedding   E -> E R
    readers     W -> W diag(γ) R,   γ -> 1
    writers     W -> Rᵀ W,          b -> Rᵀ b
With H the Hadamard matrix of a head over √h, values and what reads them turn within each head:
    values      W -> (I ⊗ H)ᵀ W,    b -> (I ⊗ H)ᵀ b
    their sum   W -> W (I ⊗ H)
What elementwise products make cannot be turned beforehand. There the layer turns its input:
    y = W x = (W Uᵀ) (U x),   U = Hᵀ / √n.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from algorithms import incoherence
from algorithms.layerwise import LayerwiseMethod
from algorithms.tensors.rotated import RotatedTensor
from kernels.hadamard import hadamard

KINDS = ("hadamard", "random")


def residual_rotation(key: Key[Array, ""], n: int, kind: str = "hadamard") -> Float[Array, "n n"]:
    """R: diag(s) H / √n with random signs s, or any orthogonal matrix alike (QR of a normal one).

    Raises ValueError for another kind, and for an n without a Hadamard matrix.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be hadamard or random.")
    if kind == "random":
        return jax.random.orthogonal(key, n)
    return incoherence.rotate(jnp.eye(n), incoherence.signs(key, n))


def read_rotated(
    w: Float[Array, "*e o i"], gamma: Float[Array, " i"], r: Float[Array, "i i"]
) -> Float[Array, "*e o i"]:
    """W diag(γ) R: a reader of the turned residual, its norm's scale folded in; or experts' W."""
    return jnp.matmul(w * gamma.reshape([1] * (w.ndim - 1) + [-1]), r, precision="highest")


def write_rotated(w: Float[Array, "..."], r: Float[Array, "o o"]) -> Float[Array, "..."]:
    """Rᵀ W, or Rᵀ b: a writer to the turned residual; or experts' W."""
    return jnp.matmul(r.T, w, precision="highest")


def rotate_heads(x: Float[Array, "*r n"], head_size: int) -> Float[Array, "*r n"]:
    """x (I ⊗ H): the last axis, head by head."""
    return hadamard(x.reshape(*x.shape[:-1], -1, head_size)).reshape(x.shape)


def rotate_values(w: Float[Array, "o *i"], head_size: int) -> Float[Array, "o *i"]:
    """(I ⊗ H)ᵀ W, or (I ⊗ H)ᵀ b: a layer whose outputs are heads."""
    return rotate_heads(w.T, head_size).T


def rotated_inputs() -> Callable[[LayerwiseMethod], LayerwiseMethod]:
    """Make a method's layers turn their input by the Hadamard matrix of its width, without signs.

    The method sees turned activations and W Uᵀ. Raises ValueError, from `init` or `compress`, for a
    width without a Hadamard matrix.
    """

    def wrap(method: LayerwiseMethod) -> LayerwiseMethod:
        def compress(w: Float[Array, "o i"], stats, *key) -> RotatedTensor:
            inner = method.compress(hadamard(w), stats, *key)
            return RotatedTensor.from_signs(inner, jnp.ones(w.shape[1], jnp.int8))

        def error(w, approximation, stats):
            return method.error(hadamard(w), hadamard(approximation), stats)

        observe = None if method.observe is None else _observe_turned(method.observe)
        return method._replace(observe=observe, compress=compress, error=error)

    return wrap


def _observe_turned(observe):
    return lambda stats, *x: observe(stats, *map(hadamard, x))
