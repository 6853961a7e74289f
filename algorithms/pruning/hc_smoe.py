"""HC-SMoE. Chen, Liu, Sun, Chao, Hsu, Lee, "Retraining-Free Merging of Sparse MoE via Hierarchical
Clustering", ICML 2025, arXiv:2410.08589. Notes: papers/hc_smoe.md.

Experts f_j that give alike become one. What an expert gives is its mean output over all tokens x,
whether or not they were sent to it,
    o_j = E_x[ f_j(x) ]
Clusters begin as single experts; the two that are nearest join, until as many are left as wanted:
    d(A, B) = 1/(|A| |B|) Σ_{i in A, j in B} ‖o_i - o_j‖₂          (average linkage)
and the weights of a cluster are averaged by how many tokens n_j each expert had,
    W_A = Σ_{j in A} α_j W_j,   α_j = n_j / Σ_{i in A} n_i
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.cluster.hierarchy import cut_tree, linkage


class Outputs(NamedTuple):
    """Of each expert, over the tokens seen so far."""

    total: Float[Array, "E D"]  # of what it gives for every token
    tokens: Int[Array, ""]
    chosen: Int[Array, " E"]  # tokens that were sent to it


def observe(y: Float[Array, "E n D"], counts: Int[Array, " E"]) -> Outputs:
    """y: what every expert gives for every token; counts: tokens that were sent to each."""
    return Outputs(y.astype(jnp.float32).sum(1), jnp.asarray(y.shape[1]), counts)


def clusters(seen: Outputs, count: int) -> Int[np.ndarray, " E"]:
    """The cluster of each expert, numbered by their first experts."""
    o = np.asarray(seen.total, np.float64) / int(seen.tokens)
    found = cut_tree(linkage(o, method="average"), n_clusters=count)[:, 0]
    _, first = np.unique(found, return_index=True)
    return np.argsort(np.argsort(first))[found]


def merging(
    labels: Int[np.ndarray, " E"], chosen: Int[np.ndarray, " E"]
) -> Float[np.ndarray, "C E"]:
    """α, a row for each cluster; of one that no token was sent to, all alike."""
    member = labels[None] == np.arange(labels.max() + 1)[:, None]
    share = member * np.asarray(chosen, np.float64)
    share = np.where(share.sum(1, keepdims=True) > 0, share, member)
    return share / share.sum(1, keepdims=True)
