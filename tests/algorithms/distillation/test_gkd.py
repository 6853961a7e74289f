"""GKD against a port of TRL's loss, its theory, and what is supervised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from algorithms.distillation.gkd import gkd, mixed, response_mask
from algorithms.distillation.on_policy import OnPolicyGKD
from algorithms.training import Batch
from models.config import DecoderConfig
from models.decoder import Decoder
from tests.algorithms.distillation import divergences_official as official

PROMPT, LENGTH = jnp.asarray([2, 3, 1]), jnp.asarray([6, 5, 4])


def logits(seed=0, shape=(3, 7, 9)):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(2 * rng.normal(size=shape)) for _ in range(2))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_equals_the_code_of_trl_sequence_by_sequence(x64, beta, temperature):
    """Deviation 1: every sequence weighs the same, where TRL's mean is over all tokens."""
    s, t = logits()
    mask = response_mask(PROMPT, LENGTH, 7)
    method = gkd(beta=beta, temperature=temperature)
    settings = dict(beta=beta, temperature=temperature)
    rows = [[np.asarray(x[n : n + 1]) for x in (s, t, mask)] for n in range(3)]
    theirs = np.mean([official.generalized_jsd(*row, **settings) for row in rows])
    np.testing.assert_allclose(method.loss(s, t, mask), theirs, rtol=1e-12)
    whole = official.generalized_jsd(*map(np.asarray, (s, t, mask)), **settings)
    np.testing.assert_allclose(method.divergence(s, t, mask), whole, rtol=1e-12)
    assert abs(whole / theirs - 1) > 1e-4


def test_the_mask_is_of_what_predicts_the_response():
    """Of a prompt of 2 and a length of 6, positions 1 to 4 predict tokens 2 to 5."""
    expected = [[0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]]
    np.testing.assert_array_equal(response_mask(PROMPT, LENGTH, 7), np.array(expected, bool))


def test_prompts_and_padding_do_not_count():
    s, t = logits()
    mask = response_mask(PROMPT, LENGTH, 7)
    method = gkd()
    other = jnp.where(mask[..., None], s, 17 * jnp.cos(s))
    assert method.loss(other, t, mask) == method.loss(s, t, mask)
    slope = jax.grad(lambda s: method.loss(s, t, mask))(s)
    np.testing.assert_array_equal(jnp.any(slope != 0, -1), mask)


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_as_many_are_sampled_as_the_fraction_says(fraction, per_sequence):
    method = gkd(student_fraction=fraction, per_sequence=per_sequence)
    found = jax.vmap(lambda key: method.on_policy(key, 5))(
        jax.random.split(jax.random.key(0), 3000)
    )
    assert float(found.mean()) == pytest.approx(fraction, abs=0.03)
    together = (found.all(1) | ~found.any(1)).all()
    assert bool(together) == (not per_sequence or fraction in (0, 1))


def test_rows_are_of_the_student_where_they_are_chosen():
    chosen = jnp.asarray([True, False, True])
    sampled = {"tokens": jnp.ones((3, 4), jnp.int32), "count": jnp.asarray([1, 2, 3])}
    data = {"tokens": jnp.zeros((3, 4), jnp.int32), "count": jnp.asarray([7, 8, 9])}
    found = mixed(chosen, sampled, data)
    np.testing.assert_array_equal(found["count"], [1, 8, 3])
    np.testing.assert_array_equal(found["tokens"][:, 2], [1, 0, 1])


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(student_fraction=1.5), "student_fraction=1.5 must be from 0 to 1"),
        (dict(beta=-0.1), "beta=-0.1 must be from 0"),
        (dict(temperature=0.0), "temperature=0.0 must be positive"),
    ],
)
def test_bad_settings_are_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        gkd(**settings)


def test_what_only_fills_a_batch_counts_nothing():
    config = DecoderConfig(vocabulary=11, hidden=8, layers=1, heads=1, kv_heads=1, head_size=8,
                           feed_forward=8, context=9)  # fmt: skip
    model, teacher = (Decoder(config, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    tokens = jax.random.randint(jax.random.key(2), (3, 9), 0, 11)
    objective = OnPolicyGKD(gkd=gkd(), prompt=3)

    def judged(rows, mask):
        batch = Batch(tokens[:rows, :-1], tokens[:rows, 1:], mask)
        return objective(model, teacher, batch, jax.random.key(3), training=False)

    found, filled = judged(2, None), judged(3, jnp.ones((3, 8)).at[2].set(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, filled)
