"""Retrieval of halves of windows, against its definition."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import evaluate
from experiments.checkpoints.loading import load_model
from experiments.checkpoints.sources import open_source
from experiments.errors import UserError
from experiments.evaluation import similarity
from experiments.evaluation.perplexity import perplexity
from tests.experiments import tiny
from tests.peers import goldens

WINDOWS = np.random.default_rng(0).integers(3, 61, (5, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The golden encoder, with a tokenizer whose texts stand between tokens 1 and 2."""
    tokenizer = tiny.model(tmp_path_factory.mktemp("tiny")).tokenizer()
    tokenizer = dataclasses.replace(tokenizer, bos=1, eos=2, add_bos=True)
    found = open_source(goldens.COMMITTED / "bert")
    found.tokenizer = lambda: tokenizer
    return found


def embedding(model, tokens):
    x = np.asarray(model(jnp.asarray([[1, *tokens, 2]]))[0], np.float64).mean(0)
    return x / np.linalg.norm(x)


def test_halves_are_looked_up_by_their_mean_activations(source):
    model = load_model(source)
    first = np.stack([embedding(model, w[:4]) for w in WINDOWS])
    second = np.stack([embedding(model, w[4:8]) for w in WINDOWS])
    cosines = first @ second.T
    found = similarity.retrieval(source, WINDOWS, chunk=3)
    own = np.diag(cosines)[:, None]
    np.testing.assert_array_equal(found.before, (cosines > own).sum(1))
    expected = np.log(np.exp((cosines - own) / 0.05).sum(1))
    np.testing.assert_allclose(found.losses, expected, atol=1e-4)
    assert found.accuracy == (found.before == 0).mean()
    assert found.reciprocal_rank == pytest.approx((1 / (1 + found.before)).mean())


def test_a_text_twice_finds_itself(source):
    twice = np.concatenate([WINDOWS[:, :4], WINDOWS[:, :4]], 1)
    found = similarity.retrieval(source, twice)
    assert found.accuracy == 1 and found.losses.max() < np.log(len(twice))


def test_an_encoder_has_no_perplexity(source):
    with pytest.raises(UserError, match="family bert predicts no tokens.*evaluation=similarity"):
        perplexity(source, WINDOWS)


def test_one_window_has_nothing_to_be_told_from(source):
    with pytest.raises(UserError, match="has 1 windows of 9 tokens: ask for more"):
        similarity.retrieval(source, WINDOWS[:1])


def test_a_decoder_can_be_measured_too(config):
    record = evaluate.run(config("evaluation=similarity", name="evaluate")).record
    found = record["metrics"]["similarity"]
    assert 0 <= found["value"] <= 1 and len(found["window_losses"]) == 4
