"""Blocks of one decoder that differ in size: what they compute, with a cache and without."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from algorithms import kv_cache
from experiments.checkpoints.sources import shapes
from models.block import Flow
from models.config import BlockSizes, DecoderConfig, Mixing
from models.decoder import Decoder, readers, sites
from models.sharding import partition, split_by_inputs

PLAIN = DecoderConfig(
    vocabulary=11, hidden=8, layers=4, heads=4, kv_heads=2, head_size=4, feed_forward=12, context=16
)
SIZES = ((2, 12), (0, 6), (1, 0), (0, 0))
MIXED = dataclasses.replace(
    PLAIN, blocks=tuple(BlockSizes(kv_heads=k, feed_forward=f) for k, f in SIZES)
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 7)), jnp.int32)


@pytest.fixture(scope="module")
def model():
    return Decoder(MIXED, rngs=nnx.Rngs(0))


def test_blocks_all_alike_are_the_plain_model():
    alike = (BlockSizes(kv_heads=2, feed_forward=12),) * 4
    same = dataclasses.replace(PLAIN, blocks=alike)
    assert shapes(same) == shapes(PLAIN)
    found = [Decoder(config, rngs=nnx.Rngs(3)) for config in (same, PLAIN)]
    assert nnx.split(found[0].blocks)[0] == nnx.split(found[1].blocks)[0]
    np.testing.assert_array_equal(found[0](TOKENS), found[1](TOKENS))


def test_what_a_block_lacks_adds_nothing(model):
    """Each block by its formula, of the modules that it has."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 7, 8)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    whole, narrow, shy, empty = model.blocks
    for block in (whole, shy):
        mixed, _ = block.attention.mix(block.attention_norm(x), positions, None)
        after = x + block.attention.o(mixed)
        if block is whole:
            after = after + whole.mlp.down(whole.mlp.spread(whole.mlp_norm(after)))
        np.testing.assert_allclose(block(x, positions)[0], after, rtol=1e-5, atol=1e-5)
    expected = x + narrow.mlp.down(narrow.mlp.spread(narrow.mlp_norm(x)))
    np.testing.assert_allclose(narrow(x, positions)[0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(empty(x, positions)[0], x)
    assert [len(block.stages()) - len(block.sites) for block in model.blocks] == [1] * 4


def test_shapes_and_wiring_are_each_blocks_own():
    found = shapes(MIXED)
    assert found["blocks.0.attention.k.weight"] == (8, 8)
    assert found["blocks.2.attention.k.weight"] == (4, 8)
    assert found["blocks.1.mlp.down.weight"] == (8, 6)
    assert not any(name.startswith("blocks.3.") for name in found)
    assert not any(name.startswith(("blocks.1.attention", "blocks.2.mlp")) for name in found)
    assert readers(MIXED, 1) == ["mlp.gate", "mlp.up", "mlp.down"] and not sites(MIXED, 3)
    assert split_by_inputs(MIXED, 2) == {"attention.o"}
    assert tuple(partition(MIXED, "blocks.1.mlp.down.kernel", (6, 8))) == ("model", "fsdp")


def test_a_cache_gives_what_the_whole_pass_does(model):
    caches = model.empty_caches(2, 16)
    assert [cache.k.shape[2] for cache in caches] == [2, 0, 1, 0]
    logits = model(TOKENS)
    count = jnp.full(2, 4)
    found, caches = model.decode(TOKENS[:, :4], caches, count)
    np.testing.assert_allclose(found, logits[:, 3], rtol=1e-4, atol=1e-5)
    for n in range(4, 7):
        found, caches = model.decode(TOKENS[:, n : n + 1], caches, jnp.ones(2, int))
        np.testing.assert_allclose(found, logits[:, n], rtol=1e-4, atol=1e-5)


def test_what_looks_at_attention_passes_by_blocks_that_have_none(model):
    block, x = model.blocks[1], jnp.ones((2, 7, 8))
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    kv_cache.fit(block, [Flow(x, x, positions)])
    assert not kv_cache.exact(block).has_attention
    with pytest.raises(ValueError, match="without attention has no queries"):
        model.predictions(TOKENS, related=(1,))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"blocks": MIXED.blocks[:3]}, "blocks has 3 entries for 4 layers"),
        ({"blocks": (BlockSizes(kv_heads=3, feed_forward=1),) * 4}, "must divide heads=4"),
        ({"blocks": (BlockSizes(kv_heads=1, feed_forward=-1),) * 4}, "feed_forward=-1"),
        ({"experts": Mixing(count=2, chosen=1, feed_forward=4)}, "neither mixtures of experts"),
    ],
)
def test_what_no_decoder_can_be_made_of(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(MIXED, **changes)
