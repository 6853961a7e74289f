"""muP: its table, what a fresh model makes of it, and that sizes do not depend on the width."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms.mup import MATRICES, coordinate_check, multipliers, mup, scale_by_width, slopes
from algorithms.objectives import CrossEntropy
from algorithms.training import Batch
from experiments.checkpoints.fresh import Fresh
from experiments.checkpoints.loading import load_model
from experiments.errors import UserError

BASE = dict(hidden=32, head_size=8)


def fresh(width, **settings):
    """Heads and feed-forward grow with the width."""
    return Fresh(
        vocabulary=64, hidden=width, layers=2, heads=4, kv_heads=4, head_size=width // 4,
        feed_forward=2 * width, context=16, **settings,
    )  # fmt: skip


def test_the_table_is_that_of_the_official_code():
    """microsoft/mup at commit 1981497: init.py divides a matrix's deviation by the root of the
    width's growth, MuReadout the input of the head by it, MuAdam the rate of matrices; its example
    has scores of 1/d, here times √d_0.
    """
    found = multipliers(4.0, 32, 8)
    assert found == (0.5, 0.25, 8**0.5 / 32)
    assert multipliers(1.0, 8, 8) == (1.0, 1.0, 8**-0.5)
    params = {"blocks": [{"q": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}],
              "embed": jnp.ones((3, 2))}  # fmt: skip
    for rule, matrices, others in (("adam", 0.25, 1.0), ("sgd", 1.0, 4.0)):
        scaling = scale_by_width(4.0, rule=rule)
        updates, _ = scaling.update(params, scaling.init(params), params)
        block = updates["blocks"][0]["q"]
        assert float(block["kernel"][0, 0]) == matrices
        assert float(block["bias"][0]) == float(updates["embed"][0, 0]) == others


def test_a_base_model_is_as_without():
    plain, base = fresh(32), fresh(32, mup=BASE)
    for name in plain.names():
        np.testing.assert_array_equal(plain.read(name), base.read(name))
    assert (base.config.logit_scale, base.config.attention_scale) == (1.0, 8**-0.5)


def test_a_wider_model_has_smaller_matrices_and_logits():
    wide = fresh(128, mup=BASE)
    assert (wide.config.logit_scale, wide.config.attention_scale) == (0.25, 8**0.5 / 32)
    for name, deviation in (("embed.weight", 0.02), ("head.weight", 0.02),
                            ("blocks.0.attention.q.weight", 0.01),
                            ("blocks.0.mlp.down.weight", 0.005)):  # fmt: skip
        np.testing.assert_allclose(wide.read(name).std(), deviation, rtol=0.05)
    assert wide.digest() != fresh(128).digest() and wide.digest() == fresh(128, mup=BASE).digest()


@pytest.mark.parametrize("parametrized", [True, False])
@pytest.mark.some(1)
def test_sizes_do_not_depend_on_the_width(parametrized):
    """After four steps at a rate that a base model bears well; without muP they grow."""
    tokens = np.random.default_rng(0).integers(0, 64, size=(8, 17))
    batch, widths = Batch(tokens[:, :-1], tokens[:, 1:]), (32, 64, 128)
    models = {w: load_model(fresh(w, mup=BASE if parametrized else None)) for w in widths}

    def optimizer(width):
        adam = optax.adam(1e-2)
        return mup(adam, growth=width / 32) if parametrized else adam

    found = slopes(
        coordinate_check(models, optimizer, batch, CrossEntropy(), jax.random.key(0), steps=4)
    )
    if parametrized:
        assert all(abs(found[name]) < 0.25 for name in ("blocks.0", "blocks.1")), found
        assert found["logits"] < 0.25, found
    else:
        assert found["blocks.1"] > 1 and found["logits"] > 0.4, found


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: scale_by_width(0.0), "growth=0.0 must be positive"),
        (lambda: scale_by_width(1.0, rule="muon"), "rule='muon' must be adam or sgd"),
    ],
)
def test_bad_settings_are_named(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_experts_are_refused():
    with pytest.raises(UserError, match="mup: its table says nothing of the routers of experts"):
        fresh(32, mup=BASE, experts=dict(count=2, chosen=1, feed_forward=8))


def test_its_matrices_are_the_kernels_of_the_blocks():
    assert MATRICES == r"blocks\..*\.kernel"
