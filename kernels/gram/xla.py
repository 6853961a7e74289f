"""The upper triangle in tiles, mirrored: 10 of 16 tile products."""

import functools

import jax.numpy as jnp

TILES = 4  # a side; more would save more products, each of them slower


def gram(x):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    i, tiles = x.shape[1], min(TILES, x.shape[1])
    edges = [tile * i // tiles for tile in range(tiles + 1)]
    columns = [x[:, a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]
    # float32 stays float32: TF32, a GPU's default, would round Hessians to 10 bits
    product = functools.partial(
        jnp.einsum, "na,nb->ab", precision="highest", preferred_element_type=wide
    )
    upper = {(a, b): product(columns[a], columns[b]) for a in range(tiles) for b in range(a, tiles)}
    for a in range(tiles):  # a CPU may sum the two sides of it in different orders
        upper[a, a] = jnp.triu(upper[a, a]) + jnp.triu(upper[a, a], 1).T
    rows = [[upper[min(a, b), max(a, b)] for b in range(tiles)] for a in range(tiles)]
    return jnp.block([[t if b >= a else t.T for b, t in enumerate(r)] for a, r in enumerate(rows)])
