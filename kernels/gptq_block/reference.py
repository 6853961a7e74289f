"""What gptq_block computes, as in the paper's Algorithm 1: each error comes off what follows."""

import jax.numpy as jnp
from jax import lax


def gptq_block(w, u, scale, zero, group, keep=None, *, grid):
    wide = jnp.promote_types(w.dtype, jnp.float32)
    w, u, scale, zero = (x.astype(wide) for x in (w, u, scale, zero))

    def one(w, u, scale, zero, group, keep):
        def column(w, j):
            s, z = scale[group[j]], zero[group[j]]
            codes = grid.encode(w[j], s, z)
            codes = jnp.where(keep[j], codes, jnp.zeros_like(codes))
            error = (w[j] - jnp.where(keep[j], grid.decode(codes, s, z), 0)) / u[j, j]
            return w - jnp.triu(u)[j][:, None] * error, (codes, error)

        return lax.scan(column, w, jnp.arange(w.shape[0]))[1]

    keep = jnp.ones(w.shape, bool) if keep is None else keep
    over = "(c,r),(c,c),(g,r),(g,r),(c),(c,r)->(c,r),(c,r)"
    return jnp.vectorize(one, signature=over)(w, u, scale, zero, group, keep)
