"""Scores of structured pruning against ports of the official codes, and what a cut leaves."""

import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.pruning import (
    hc_smoe,
    llm_pruner,
    minitron,
    reap,
    shortened_llama,
    shortgpt,
    slicegpt,
)
from algorithms.pruning.structured import (
    highest,
    highest_heads,
    norm_over_fewer,
    spans,
    take,
)
from tests.algorithms.pruning import structured_official as official


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_highest_stay_in_their_order_and_of_equals_the_first():
    np.testing.assert_array_equal(highest(np.array([1.0, 3, 2, 3]), 2), [1, 3])
    np.testing.assert_array_equal(highest(np.zeros(4), 3), [0, 1, 2])
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"count={count} must be from 1 to the 4 units"):
            highest(np.zeros(4), count)


def test_heads_go_with_their_group_and_equally_many_of_each():
    heads, kv = np.array([1.0, 2, 3, 9, 0, 0, 4, 5, 6]), np.array([0.0, 0, 0])
    kept, groups = highest_heads(heads, kv, (4, 2))
    np.testing.assert_array_equal(groups, [1, 2])
    np.testing.assert_array_equal(kept, [3, 4, 7, 8])  # of equals, the first
    kept, groups = highest_heads(heads, np.array([100.0, 0, 0]), (3, 1))
    np.testing.assert_array_equal(groups, [0])  # for what it is worth itself
    np.testing.assert_array_equal(kept, [0, 1, 2])


@pytest.mark.parametrize(
    "counts, sentence",
    [
        ((0, 1), "heads=0 must be from 1 to the 9"),
        ((4, 4), "kv_heads=4 must be from 1 to the 3"),
        ((7, 3), "heads=7 with kv_heads=3: each key-value head keeps equally many of the 3"),
        ((4, 1), "heads must be kv_heads times 1 to 3"),
    ],
)
def test_counts_that_no_grouping_satisfies_are_refused(counts, sentence):
    with pytest.raises(ValueError, match=sentence):
        highest_heads(np.zeros(9), np.zeros(3), counts)


def test_a_unit_is_taken_with_all_its_channels():
    x = np.arange(24).reshape(2, 12)
    np.testing.assert_array_equal(take(x, 1, np.array([0, 2]), 3), x[:, [0, 1, 2, 3, 8, 9, 10, 11]])
    np.testing.assert_array_equal(take(x, 0, np.array([1]), 2), x[1:])
    assert take(x, 1, np.arange(3), 3).tobytes() == x.tobytes()


def test_a_norm_over_fewer_channels_gives_what_it_did_where_the_others_are_zero():
    x, gamma = normal(5, 8), normal(8, seed=1)
    x[:, [2, 5, 6]] = 0
    kept, eps = np.array([0, 1, 3, 4, 7]), 1e-2
    before = (gamma * x / np.sqrt((x**2).mean(1, keepdims=True) + eps))[:, kept]
    fewer = x[:, kept]
    scale = norm_over_fewer(gamma[kept], 8, 5)
    after = scale * fewer / np.sqrt((fewer**2).mean(1, keepdims=True) + eps * 8 / 5)
    np.testing.assert_allclose(after, before, rtol=1e-5)
    assert norm_over_fewer(gamma, 8, 8) is gamma


def test_spans_say_all_numbers():
    assert spans([0, 3, 4, 5, 9]) == "0, 3-5, 9" and spans([]) == ""


def test_block_influence_is_that_of_the_other_code_in_any_chunks():
    x, y = normal(3, 4, 8), normal(3, 4, 8, seed=1)
    x[0, 0] = 0
    parts = [shortgpt.observe(jnp.asarray(a), jnp.asarray(b)) for a, b in zip(x, y, strict=True)]
    total = shortgpt.Similarity(*map(sum, zip(*parts, strict=True)))
    np.testing.assert_allclose(
        shortgpt.block_influence(total), official.block_influence(x, y), rtol=1e-5
    )
    still = shortgpt.observe(jnp.asarray(y), jnp.asarray(3 * y))
    assert abs(float(shortgpt.block_influence(still))) < 1e-6  # a block that only scales


def test_a_blocks_taylor_terms_are_those_of_the_official_code():
    weights, gradients = [normal(3, 4), normal(5)], [normal(3, 4, seed=1), normal(5, seed=2)]
    found = shortened_llama.taylor(*(list(map(jnp.asarray, x)) for x in (weights, gradients)))
    np.testing.assert_allclose(found, official.block_taylor(weights, gradients), rtol=1e-5)
    losses = jnp.asarray([1.0, 3.0])
    np.testing.assert_allclose(shortened_llama.perplexity(losses), np.exp(2), rtol=1e-6)


def test_minitron_ranks_channels_and_heads_as_the_official_code_does():
    batches = [normal(2, 5, 12, seed=n) * np.linspace(1, 2, 12) for n in range(3)]
    seen = sum(minitron.observe(jnp.asarray(x)) for x in batches)
    s = np.asarray(minitron.importance(seen, 6))
    expected = official.channel_importance(batches)
    np.testing.assert_allclose(s, expected, rtol=1e-5)
    by_head = np.asarray(minitron.head_importance(jnp.asarray(s), 6))
    kept, _ = highest_heads(by_head, np.zeros(2), (4, 2))
    np.testing.assert_array_equal(kept, np.sort(official.head_ranking(expected, 6, 2)[:, :2], None))


@pytest.mark.parametrize("how", ["mean", "l2"])
def test_minitron_brings_activations_together_in_other_ways(how):
    x = normal(4, 5, 3)
    seen = minitron.observe(jnp.asarray(x), over_batch=how, over_sequence=how)
    found = minitron.importance(seen, 4, over_batch=how)
    expected = np.abs(x).mean((0, 1)) if how == "mean" else np.sqrt((x**2).sum((0, 1)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="over_batch='max' must be mean or l2"):
        minitron.require_aggregations(over_batch="max")


@pytest.mark.parametrize("taylor", llm_pruner.TAYLOR)
def test_a_group_is_worth_what_the_official_code_says(taylor):
    """Two projections into a layer of 6 channels, one out of it; heads of 2 channels."""
    shapes = {"gate": (6, 4), "up": (6, 4), "down": (4, 6), "norm": (4,)}
    weights = {name: normal(*shape, seed=n) for n, (name, shape) in enumerate(shapes.items())}
    gradients = {name: normal(*s, seed=9 + n) for n, (name, s) in enumerate(shapes.items())}
    axes = {"gate": ("ff", "hidden"), "up": ("ff", "hidden"), "down": ("hidden", "ff"),
            "norm": ("hidden",)}  # fmt: skip
    group = [(weights[n], gradients[n], side) for n, side in
             (("gate", "out"), ("up", "out"), ("down", "in"))]  # fmt: skip
    arrays = [{name: jnp.asarray(x) for name, x in each.items()} for each in (weights, gradients)]
    for units in (6, 3):
        found = llm_pruner.importance(*arrays, axes, {"ff": units}, taylor)
        expected = official.taylor_importance(group, taylor, units)
        assert found.keys() == {"ff"}
        np.testing.assert_allclose(found["ff"], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="taylor='second' must be param_first or vectorize"):
        llm_pruner.require_taylor("second")


@pytest.mark.parametrize("renormalize", [True, False])
def test_experts_are_worth_what_the_official_code_says(renormalize):
    """One is reached by no token."""
    outputs, logits, chosen = normal(5, 7, 3), normal(7, 5, seed=1), 2
    logits[:, 3] = -50
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    best = np.argsort(-p, 1)[:, :chosen]
    weights = np.take_along_axis(p, best, 1)
    weights = weights / weights.sum(1, keepdims=True) if renormalize else weights
    order = np.argsort(best.ravel(), kind="stable")  # rows sorted by expert
    rows = outputs[best.ravel()[order], np.repeat(np.arange(7), chosen)[order]]
    counts = np.bincount(best.ravel(), minlength=5)
    seen = reap.observe(jnp.asarray(rows), jnp.asarray(weights.ravel()[order]), jnp.asarray(counts))
    expected = official.reap(outputs, logits, chosen, renormalize)
    np.testing.assert_allclose(reap.saliency(seen), expected, rtol=1e-5)
    assert expected[3] == 0 and counts[3] == 0
    np.testing.assert_array_equal(reap.saliency(seen, "frequency"), counts)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_experts_join_as_in_the_official_code(count):
    outputs = normal(8, 5, 4)
    outputs[6] = outputs[1] + 1e-3
    chosen = jnp.asarray([3, 1, 4, 0, 5, 0, 2, 6])
    parts = [hc_smoe.observe(jnp.asarray(outputs[:, a:b]), chosen) for a, b in ((0, 2), (2, 5))]
    seen = hc_smoe.Outputs(*map(sum, zip(*parts, strict=True)))
    labels = hc_smoe.clusters(seen, count)
    expected = official.hierarchical(outputs.mean(1), count)
    np.testing.assert_array_equal(labels[:, None] == labels, expected[:, None] == expected)
    firsts = [int(np.argmax(labels == n)) for n in range(count)]
    assert firsts == sorted(firsts) and len(set(labels)) == count
    assert count == 8 or labels[1] == labels[6]


def test_experts_are_averaged_by_how_often_they_were_chosen():
    labels = np.array([0, 1, 0, 2, 1, 2])
    found = hc_smoe.merging(labels, np.array([3, 5, 1, 0, 0, 0]))
    expected = [[0.75, 0, 0.25, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0.5, 0, 0.5]]
    np.testing.assert_allclose(found, expected)


def test_principal_directions_are_those_of_the_official_code_and_lose_least():
    mixed = normal(40, 6) @ normal(6, 6, seed=1)
    batches = [mixed[:20], mixed[20:]]
    h = sum(np.asarray(slicegpt.observe(jnp.asarray(x), normalized=False)) for x in batches)
    q, (_, expected) = slicegpt.principal_directions(h), official.pca(batches)
    np.testing.assert_allclose(np.abs(np.sum(q * expected, 0)), 1, atol=1e-3)
    np.testing.assert_allclose(q.T @ q, np.eye(6), atol=1e-6)

    def left(directions):
        return np.sum((mixed @ directions[:, :4]) ** 2)

    assert left(q) > left(np.eye(6)) and left(q) > left(np.linalg.qr(normal(6, 6, seed=2))[0])


def test_tokens_count_alike_once_normalized():
    x = normal(10, 4)
    sizes = np.geomspace(1, 1e3, 10, dtype=np.float32)[:, None]
    found = [slicegpt.observe(jnp.asarray(each)) for each in (x, sizes * x, np.zeros_like(x))]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)
    assert not found[2].any()
