"""Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
inference time. Wortsman et al., ICML 2022, arXiv:2203.05482.

Uniform: the mean of all members. Greedy (Recipe 1): members in the order of their score, each kept
if the mean with it scores better than the mean without it.

Greedy differs from the paper in: 1. As in the official code, an equal score does not keep a member.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from algorithms.optimizers.iterates import wide


def uniform_soup(members: Sequence[Any]) -> Any:
    """The mean of pytrees of parameters, in their dtypes, summed in float32 or wider."""
    if not members:
        raise ValueError(f"members={members} must be at least one pytree of parameters.")
    total = wide(members[0])
    for member in members[1:]:
        total = jax.tree.map(lambda t, p: t + p, total, member)
    return jax.tree.map(lambda t, p: (t / len(members)).astype(p.dtype), total, members[0])


def greedy_soup(
    members: Sequence[Any], score: Callable[[Any], float]
) -> tuple[Any, tuple[int, ...]]:
    """The greedy soup, and which members are in it, in the order they went in.

    score: of parameters, on data held out; more is better.
    """
    scores = [score(member) for member in members]
    order = sorted(range(len(members)), key=scores.__getitem__, reverse=True)
    kept, soup = tuple(order[:1]), uniform_soup([members[i] for i in order[:1]])
    best = scores[order[0]]
    for i in order[1:]:
        candidate = uniform_soup([members[j] for j in (*kept, i)])
        if (found := score(candidate)) > best:
            kept, soup, best = (*kept, i), candidate, found
    return soup, kept
