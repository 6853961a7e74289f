"""Layers that low-rank methods are tested on."""

import jax
import jax.numpy as jnp
import numpy as np

from algorithms.layerwise import LayerwiseMethod
from algorithms.tensors import DenseTensor


def layer(seed=0, o=12, i=20, n=80):
    """W [o, i] and correlated X [n, i] whose channels differ in size by a hundredfold."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, i)) @ rng.normal(size=(i, i)) * np.geomspace(0.1, 10, i)
    return rng.normal(size=(o, i)), x


def losing(e):
    """A data-free method that loses E."""
    return LayerwiseMethod(None, None, lambda w, stats: DenseTensor(w - jnp.asarray(e, w.dtype)))


def observed(method, batches):
    if method.observe is None:
        return None
    stats = method.init(batches[0].shape[1])
    for x in batches:
        stats = method.observe(stats, jnp.asarray(x))
    return stats


def compress(method, w, x):
    """W compressed as the walk does it, in float32."""
    stats = observed(method, [jnp.asarray(x, jnp.float32)])
    key = (jax.random.key(0),) if method.seeded else ()
    return jax.jit(method.compress)(jnp.asarray(w, jnp.float32), stats, *key), stats


def output_norm(d, x):
    """‖D X‖² in float64."""
    return np.sum((np.asarray(d, np.float64) @ x.T) ** 2)
