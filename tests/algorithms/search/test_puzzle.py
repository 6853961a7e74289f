"""What a library of Puzzle's is made of, against slow ports of the official code, and its theory.

Official: https://github.com/NVIDIA/Model-Optimizer, Apache-2.0, at 448658d297:
`IndependentChannelContributionHook` (modelopt/torch/prune/importance_hooks/base_hooks.py),
AverageKV (modelopt/torch/puzzletron/pruning/pruning_utils.py), `normalized_mse_loss`
(modelopt/torch/puzzletron/tools/kd_model.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from algorithms.blockwise import learn_block
from algorithms.search.puzzle import channel_contribution, local_distillation, pooled_heads
from algorithms.walk import set_weights, through
from models.block import Flow
from models.config import BlockSizes, DecoderConfig
from models.decoder import build_block

RNG = np.random.default_rng(0)
SMALL = DecoderConfig(
    vocabulary=5, hidden=8, layers=1, heads=2, kv_heads=2, head_size=4, feed_forward=12, context=8,
    blocks=(BlockSizes(kv_heads=2, feed_forward=6),),
)  # fmt: skip


def official_contribution(chunks, w):
    total = [0.0] * w.shape[1]
    for x in chunks:  # [B, T, i]
        for i in range(w.shape[1]):
            total[i] += float(np.mean([abs(v) for v in x[:, :, i].ravel()]))
    return [t * np.sqrt(sum(w[o, i] ** 2 for o in range(w.shape[0]))) for i, t in enumerate(total)]


def test_channels_are_worth_what_they_are_in_the_official_code():
    """Up to a factor, as it sums means over batches."""
    w, chunks = RNG.normal(size=(5, 7)), RNG.normal(size=(3, 2, 4, 7))
    found = channel_contribution(jnp.asarray(np.abs(chunks).mean((0, 1, 2))), jnp.asarray(w))
    np.testing.assert_allclose(3 * found, official_contribution(chunks, w), rtol=1e-5)


def test_a_channel_is_worth_what_the_output_loses_without_it():
    """The mean norm of its column times its activation; the largest activation need not win."""
    x, w = RNG.normal(size=(50, 3)) * [1.0, 2.0, 3.0], RNG.normal(size=(4, 3)) * [9.0, 1.0, 0.1]
    lost = [np.linalg.norm(x[:, [i]] * w[:, i], axis=1).mean() for i in range(3)]
    found = channel_contribution(jnp.asarray(np.abs(x).mean(0)), jnp.asarray(w))
    np.testing.assert_allclose(found, lost, rtol=1e-5)
    assert int(np.argmax(found)) == 0 and int(np.argmax(np.abs(x).mean(0))) == 2


def test_heads_are_pooled_as_in_the_official_code():
    w, bias = RNG.normal(size=(4 * 3, 5)), RNG.normal(size=4 * 3)
    expected = np.zeros((2 * 3, 5))
    for group in range(2):
        for channel in range(3):
            rows = [w[(2 * group + member) * 3 + channel] for member in range(2)]
            expected[group * 3 + channel] = sum(rows) / 2
    np.testing.assert_allclose(pooled_heads(jnp.asarray(w), 4, 2), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pooled_heads(jnp.asarray(bias), 4, 4), bias, rtol=1e-5, atol=1e-6)
    alike = np.tile(w[:3], (4, 1))  # heads that are the same lose nothing
    np.testing.assert_allclose(pooled_heads(jnp.asarray(alike), 4, 1), w[:3], rtol=1e-5, atol=1e-6)


def test_training_brings_a_block_nearer_to_its_parent():
    """And no weight outside of what is trained is touched; the loss is the official normalized
    error.
    """
    block = build_block(SMALL, 0, rngs=nnx.Rngs(0))
    x = jnp.asarray(RNG.normal(size=(4, 6, 8)), jnp.float32)
    flow = Flow(x, x, jnp.broadcast_to(jnp.arange(6), (4, 6)))
    aim = [flow._replace(residual=x + 0.1 * jnp.asarray(RNG.normal(size=x.shape), jnp.float32))]
    methods = dict.fromkeys(
        ("mlp.gate", "mlp.up", "mlp.down"), local_distillation(steps=20, learning_rate=1e-2)
    )
    before = np.asarray(block.attention.q.kernel[...])
    tensors, loss = learn_block(block, [flow], aim, methods, jax.random.key(0))
    set_weights(block, tensors)
    np.testing.assert_array_equal(block.attention.q.kernel[...], before)
    moved = [flow]
    through(block, moved)
    given, target = np.asarray(moved[0].residual), np.asarray(aim[0].residual)
    official = np.mean((given - target) ** 2) / np.mean((target - 1e-6) ** 2)
    assert loss.last == pytest.approx(official, rel=1e-4) and loss.last < 0.9 * loss.first


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: pooled_heads(jnp.ones((6, 2)), 3, 2), "fewer=2 must divide heads=3"),
        (lambda: pooled_heads(jnp.ones((6, 2)), 3, 0), "fewer=0 must divide"),
        (lambda: local_distillation(steps=0), "steps=0 and batch=4 must be at least 1"),
        (lambda: local_distillation(learning_rate=0.0), "learning_rate=0.0 must be above 0"),
    ],
)
def test_what_cannot_be_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
