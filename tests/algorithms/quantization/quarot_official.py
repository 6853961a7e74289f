"""A slow NumPy port, in float64, of what QuaRot's code does to a Llama's weights.

https://github.com/spcl/QuaRot, fake_quant/rotation_utils.py (fuse_layer_norms, rotate_model) and
fake_quant/hadamard_utils.py (matmul_hadU, apply_exact_had_to_linear), commit
5008669b08c1f11f9b64d52d16fddd47ca754c5a, Apache-2.0. Left out: the mean that it takes off each row
of the embedding (deviation 7). Weights are [out, in]. Widths that are no power of two take the
order-K matrix as an argument: the official tables are not ours.
"""

import numpy as np

PREFIXES = {"attention_norm": ("attention.q", "attention.k", "attention.v"),
            "mlp_norm": ("mlp.gate", "mlp.up")}  # fmt: skip


def matmul_had(x, had_k=None):
    """Each row of x times H: a butterfly down to order K, then the order-K matrix; over √n."""
    n, k = x.shape[-1], 1 if had_k is None else len(had_k)
    rows = x.reshape(-1, n, 1)
    while rows.shape[1] > k:
        pairs = rows.reshape(len(rows), rows.shape[1] // 2, 2, rows.shape[2])
        both = [pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]]
        rows = np.concatenate(both, axis=-1)
    if had_k is not None:
        rows = np.asarray(had_k) @ rows
    return rows.reshape(x.shape) / np.sqrt(n)


def rotate_model(weights, q, layers, head_size, had_down=None, had_o=None):
    """Weights by our names, norms fused and everything turned by Q, head Hadamards included."""
    w = {name: np.asarray(x, np.float64) for name, x in weights.items()}
    w.setdefault("head.weight", w["embed.weight"])
    w["head.weight"] = w["head.weight"] * w["norm.weight"] @ q
    w["embed.weight"] = w["embed.weight"] @ q
    w["norm.weight"] = np.ones(len(q))
    for layer in range(layers):
        _rotate_layer(w, f"blocks.{layer}.", q, head_size, had_down, had_o)
    return w


def _rotate_layer(w, at, q, head_size, had_down, had_o):
    for norm, readers in PREFIXES.items():
        for path in readers:
            w[f"{at}{path}.weight"] = w[f"{at}{path}.weight"] * w[f"{at}{norm}.weight"] @ q
        w[f"{at}{norm}.weight"] = np.ones(len(q))
    for path in ("attention.o", "mlp.down"):
        w[f"{at}{path}.weight"] = q.T @ w[f"{at}{path}.weight"]
        if f"{at}{path}.bias" in w:
            w[f"{at}{path}.bias"] = q.T @ w[f"{at}{path}.bias"]
    w[f"{at}mlp.down.weight"] = matmul_had(w[f"{at}mlp.down.weight"], had_down)
    v = w[f"{at}attention.v.weight"].T
    by_head = matmul_had(v.reshape(len(v), -1, head_size)).reshape(v.shape)
    w[f"{at}attention.v.weight"] = by_head.T
    w[f"{at}attention.o.weight"] = matmul_had(w[f"{at}attention.o.weight"], had_o)
