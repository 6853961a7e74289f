"""What the official codes of structured pruning compute, written anew, slowly, in NumPy.

block_influence      sramshetty/ShortGPT (unofficial; the paper's authors published none),
                     short_gpt/metrics.py, 78d9615fdcae6d90368832bd0a86c49c323549b9, MIT
block_taylor         Nota-NetsPresso/shortened-llm, src/anal_block_sensitivity_taylor.py,
                     4031a9212aa0dbeec8f2ad504af9346c758b0147, no licence stated
channel_importance,
head_ranking         NVIDIA/Model-Optimizer, modelopt/torch/prune/plugins/mcore_minitron.py,
                     06a8c9d261a03206f46b58d9e31f7efe76bee906, Apache-2.0
taylor_importance    horseee/LLM-Pruner, LLMPruner/pruner/hf_llama_pruner.py (TaylorImportance),
                     128a07d977f9b205d60ab14cfbc6a78f8a8e39d2, Apache-2.0
reap                 CerebrasResearch/reap, src/reap/pruning_metrics.py,
                     1970473c51ca3caeb98c10392f15b3a08a672974, Apache-2.0
hierarchical         wazenmai/HC-SMoE, hcsmoe/merging/clustering.py (linkage "average"),
                     6216ac87f10500e026cac8c5722d1c7bbdc71667, no licence stated
pca                  microsoft/TransformerCompression, src/slicegpt/rotate.py (pca_calc),
                     6b12cdee6ad51791d7c776b3a046bc408b9e77e9, MIT
"""

import numpy as np


def block_influence(x, y):
    """1 - cosine similarity of every token, averaged; 0.5 where it is no number."""
    found = []
    for a, b in zip(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), strict=True):
        norms = np.sqrt((a**2).sum()) * np.sqrt((b**2).sum())
        found.append(1 - (a @ b / norms if norms else 0.5))
    return np.mean(found)


def block_taylor(weights, gradients):
    """norm_power 1, sums within matrices and over them."""
    return sum(np.abs(w * g).sum() for w, g in zip(weights, gradients, strict=True))


def channel_importance(batches):
    """Of activations [B, T, i]: mean over tokens, squares summed over windows, the root."""
    total = 0
    for batch in batches:
        for window in batch:
            total = total + np.mean(np.abs(window), 0) ** 2
    return np.sqrt(total)


def head_ranking(importance, heads, groups):
    """Heads, the best first, within each group of query heads: [groups, heads / groups]."""
    by_head = [np.sqrt((each**2).sum()) for each in np.split(importance, heads)]
    size = heads // groups
    ranked = [sorted(range(g * size, (g + 1) * size), key=lambda h: -by_head[h])
              for g in range(groups)]  # fmt: skip
    return np.array(ranked)


def taylor_importance(group, taylor, channels):
    """group: (weight, gradient, "out" or "in") of matrices [o, i] that share `channels`; those with
    more channels have several for each, summed as the code's consecutive groups are.
    """
    total = np.zeros(channels)
    for w, g, side in group:
        salience = w * g
        axis = 1 if side == "out" else 0
        one = np.abs(salience.sum(axis)) if taylor == "vectorize" else np.abs(salience).sum(axis)
        total += one.reshape(channels, -1).sum(1)
    return total


def reap(outputs, logits, chosen, renormalize):
    """outputs: of every expert on every token [E, n, D]; logits of the router [n, E]."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    found = np.zeros(len(outputs))
    best = np.argsort(-p, 1, kind="stable")[:, :chosen]
    for expert in range(len(outputs)):
        terms = []
        for token in range(len(logits)):
            if expert in best[token]:
                weight = p[token, expert]
                if renormalize:
                    weight = weight / p[token, best[token]].sum()
                terms.append(weight * np.linalg.norm(outputs[expert, token]))
        found[expert] = np.mean(terms) if terms else 0
    return found


def hierarchical(outputs, count):
    """The two nearest clusters join, by the mean distance of their members, until `count` are left;
    the later takes the number of the earlier.
    """
    clusters = np.arange(len(outputs))
    distances = np.linalg.norm(outputs[:, None] - outputs[None], axis=-1)
    while len(names := np.unique(clusters)) > count:
        pairs = [(distances[np.ix_(clusters == a, clusters == b)].mean(), a, b)
                 for n, a in enumerate(names) for b in names[n + 1 :]]  # fmt: skip
        _, a, b = min(pairs)
        clusters[clusters == b] = a
    return clusters


def pca(batches):
    """Eigenvalues and eigenvectors of Xᵀ X, which 1 % of its mean diagonal is added to."""
    h = sum(x.T @ x for x in batches)
    h = h + 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
    values, vectors = np.linalg.eigh(h)
    order = np.argsort(-values)
    return values[order], vectors[:, order]
