"""What a checkpoint's description says of a model's size and work."""

import math

import jax.numpy as jnp
import pytest

from algorithms.tensors import DenseTensor, ExpertsTensor, LowRankTensor, SparseTensor, SumTensor
from experiments.checkpoints.planish import _describe
from experiments.checkpoints.sources import shapes
from experiments.evaluation.footprint import footprint
from models.config import DecoderConfig, Mixing

CONFIG = DecoderConfig(vocabulary=11, hidden=8, layers=2, heads=2, kv_heads=1, head_size=4,
                       feed_forward=6, context=16)  # fmt: skip
MIXTURE = Mixing(count=4, chosen=2, feed_forward=6, layers=(1,))


def described(config):
    return {name: _describe(jnp.zeros(shape)) for name, shape in shapes(config).items()}


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_passes_through_all_matrices_of_a_dense_model(tied):
    """q, k, v, o and three of the feed-forward layer, twice; the head, whosever weight it has."""
    config = DecoderConfig(**{**vars(CONFIG), "tied_embeddings": tied})
    by_hand = 2 * (8 * 8 + 2 * 4 * 8 + 8 * 8 + 3 * 6 * 8) + 11 * 8
    assert footprint(config, described(config)).multiplications == by_hand


def test_a_token_passes_through_the_experts_that_are_chosen():
    config = DecoderConfig(**{**vars(CONFIG), "experts": MIXTURE})
    experts, router = 2 * 3 * 6 * 8, 4 * 8
    dense = footprint(CONFIG, described(CONFIG)).multiplications
    found = footprint(config, described(config)).multiplications
    assert found == dense - 3 * 6 * 8 + experts + router


def test_numbers_that_are_not_there_are_not_multiplied_by():
    name, w = "blocks.0.mlp.up.weight", jnp.ones((6, 8))
    mask = jnp.zeros((6, 8), bool).at[:, ::4].set(True)
    sparse = SparseTensor.of(w, mask, count=12)
    factors = LowRankTensor(jnp.ones((6, 3)), jnp.ones((3, 8)))
    before = footprint(CONFIG, described(CONFIG)).multiplications
    for tensor, count in [(sparse, 12), (factors, 3 * 14), (SumTensor(sparse, factors), 12 + 42)]:
        found = footprint(CONFIG, {**described(CONFIG), name: _describe(tensor)})
        assert found.multiplications == before - 6 * 8 + count
    experts = ExpertsTensor(DenseTensor(jnp.ones((4, 6, 8))))
    assert experts.multiplications() == 6 * 8 and math.prod(experts.shape) == 4 * 6 * 8


def test_what_an_earlier_version_did_not_write_is_not_made_up():
    sparse = _describe(SparseTensor.of(jnp.ones((6, 8)), jnp.ones((6, 8), bool), count=48))
    del sparse["multiplications"]
    found = footprint(CONFIG, {**described(CONFIG), "blocks.0.mlp.up.weight": sparse})
    assert found.multiplications is None and found.weights == 48
