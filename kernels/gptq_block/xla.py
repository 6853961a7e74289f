"""A column takes what the errors of those before it left for it to make up, in one product."""

import jax.numpy as jnp
from jax import lax


def gptq_block(w, u, scale, zero, group, keep=None, *, grid):
    def one(w, u, scale, zero, group, keep=None):
        def quantize_column(errors, column):
            j, w_j, u_j, d, g, stays = column
            w_j = w_j - u_j @ errors  # what the block's columns before j left for j to make up
            q = grid.encode(w_j, scale[g], zero[g])
            value = grid.decode(q, scale[g], zero[g])
            if stays is not None:
                q, value = (jnp.where(stays, x, jnp.zeros_like(x)) for x in (q, value))
            error = (w_j - value) / d
            return errors.at[j].set(error), q

        d = jnp.diag(u)
        above = (u - jnp.diag(d)).T  # row j holds U_kj of the columns k before j
        columns = (jnp.arange(w.shape[0]), w, above, d, group, keep)
        errors, codes = lax.scan(quantize_column, jnp.zeros_like(w), columns)
        return codes, errors

    arguments = (w, u, scale, zero, group, *([] if keep is None else [keep]))
    if w.ndim == 2:
        return one(*arguments)
    over = "(c,r),(c,c),(g,r),(g,r),(c)" + ("" if keep is None else ",(c,r)") + "->(c,r),(c,r)"
    return jnp.vectorize(one, signature=over)(*arguments)
