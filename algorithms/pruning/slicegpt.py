"""SliceGPT. Ashkboos, Croci, Gennari do Nascimento, Hoefler, Hensman, "SliceGPT: Compress Large
Language Models by Deleting Rows and Columns", ICLR 2024, arXiv:2401.15024. Notes:
papers/slicegpt.md.

An orthogonal Q turns the residual stream X [n, D] and leaves what a model with RMSNorm computes as
it is (QuaRot has it too). With Q the principal directions of the stream, by their variance,
    Xᵀ X = Q Λ Qᵀ,   λ_1 >= … >= λ_D
the last channels of X Q hold little, and go: writers lose rows, readers columns. A norm goes on to
divide by the root of Σ x² / D.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def observe(x: Float[Array, "*m D"], *, normalized: bool = True) -> Float[Array, "D D"]:
    """What activations add to Xᵀ X; normalized: each token divided by its root mean square, so that
    it counts as much as any other, as it does for what reads it behind a norm.
    """
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if normalized:
        mean = jnp.mean(x**2, -1, keepdims=True)
        x = x / jnp.sqrt(jnp.where(mean > 0, mean, 1))
    return jnp.matmul(x.T, x, precision="highest")


def principal_directions(h: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D D"]:
    """Q: eigenvectors of Xᵀ X as columns, the one with the most variance first."""
    values, vectors = np.linalg.eigh(np.asarray(h, np.float64))
    return vectors[:, np.argsort(-values, kind="stable")]
