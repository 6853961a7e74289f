"""Scores of options: ports of what official codes compute, and what theory says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.search import kl
from algorithms.search.autoquantize import autoquantize
from algorithms.search.hawq import hawq
from algorithms.search.output_error import output_error
from algorithms.search.sensitivity import Passing


def layer(n=50, i=6, o=4, size=0.1):
    rng = np.random.default_rng(0)
    w, x, g = rng.normal(size=(o, i)), rng.normal(size=(n, i)), rng.normal(size=(n, o))
    return w, size * rng.normal(size=(o, i)), x, g


def scored(sensitivity, w, d, x, g, parts=1):
    """As the search does: sums over parts of the tokens, then the score."""
    pieces = zip(np.array_split(x, parts), np.array_split(g, parts), strict=True)
    sums = [
        sensitivity.measure(Passing(*map(jnp.asarray, (x, x @ w.T, x @ d.T, g)))) for x, g in pieces
    ]
    total = jax.tree.map(lambda *each: sum(each), *sums)
    return float(sensitivity.score(total, jnp.asarray(w), jnp.asarray(d), len(x)))


def official_autoquantize(w, d, x, g):
    """modelopt/torch/quantization/algorithms.py of NVIDIA/Model-Optimizer at 00aba57ddb7d
    (Apache-2.0), token by token: what it adds to a recipe's importance.
    """
    total = 0.0
    for token, gradient in zip(x, g, strict=True):
        difference = (w + d) @ token - w @ token
        total += sum(gradient[o] ** 2 * difference[o] ** 2 for o in range(len(w)))
    return total


def test_autoquantize_is_the_official_code(x64):
    """Up to the half of Taylor's second term, and per token."""
    w, d, x, g = layer()
    expected = official_autoquantize(w, d, x, g) / 2 / len(x)
    assert scored(autoquantize(), w, d, x, g, parts=3) == pytest.approx(expected, rel=1e-10)


def test_hawq_is_the_official_code(x64):
    """ILP.ipynb of Zhen-Dong/HAWQ at 87ad098c0f1d (MIT): the trace over the number of weights,
    times the squared change. The trace is that of the sum of g xᵀ ⊗ g xᵀ.
    """
    w, d, x, g = layer()
    fisher = sum(
        np.outer(v, v) for v in (np.outer(b, a).ravel() for a, b in zip(x, g, strict=True))
    )
    expected = np.trace(fisher) / w.size * np.sum(d**2) / 2 / len(x)
    assert scored(hawq(), w, d, x, g, parts=3) == pytest.approx(expected, rel=1e-10)


def test_the_output_error_is_that_of_all_tokens_together(x64):
    w, d, x, g = layer()
    expected = np.sum((x @ d.T) ** 2) / np.sum((x @ w.T) ** 2)
    assert scored(output_error(), w, d, x, g, parts=4) == pytest.approx(expected, rel=1e-10)
    assert scored(output_error(), 0 * w, 0 * d, x, g) == 0


def test_autoquantize_is_the_expected_growth_of_a_likelihood(x64):
    """Of a softmax whose tokens are drawn from itself it is the divergence to second order, as long
    as one output is changed at a time: there are no cross terms then.
    """
    rng = np.random.default_rng(1)
    logits, n = rng.normal(size=5), 200_000
    p = np.exp(logits) / np.exp(logits).sum()
    g = p - np.eye(5)[rng.choice(5, size=n, p=p)]
    change = np.zeros((n, 5))
    change[:, 2] = 1e-2
    passing = Passing(jnp.zeros((n, 1)), jnp.zeros((n, 5)), jnp.asarray(change), jnp.asarray(g))
    s = float(autoquantize().score(autoquantize().measure(passing), jnp.zeros(1), jnp.zeros(1), n))
    changed = logits + change[0]
    exact = np.sum(p * (np.log(p) - changed + np.log(np.exp(changed).sum())))
    assert s == pytest.approx(exact, rel=0.02)


def test_hawq_knows_no_directions_and_autoquantize_does(x64):
    """A change where no input is: the trivial score by size alone counts it, the other does not."""
    w, d, x, g = layer()
    x[:, :3] = 0
    d[:, 3:] = 0
    assert scored(autoquantize(), w, d, x, g) == 0
    assert scored(hawq(), w, d, x, g) > 0


@pytest.mark.parametrize("parts", [1, 3])
def test_the_divergence_is_that_of_softmaxes_in_parts_or_whole(x64, parts):
    rng = np.random.default_rng(0)
    logits, changed = 30 * rng.normal(size=12), 30 * rng.normal(size=12)
    found = kl.nothing()
    for a, b in zip(np.array_split(logits, parts), np.array_split(changed, parts), strict=True):
        found = kl.add(found, jnp.asarray(a), jnp.asarray(b))
    log_p, log_q = (jax.nn.log_softmax(jnp.asarray(z)) for z in (logits, changed))
    assert float(found.divergence) == pytest.approx(
        float(jnp.sum(jnp.exp(log_p) * (log_p - log_q)))
    )
    same = kl.add(kl.nothing(), jnp.asarray(logits), jnp.asarray(logits))
    assert float(same.divergence) == 0
