import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.checkpoints.loading import load_model
from experiments.evaluation import scoring
from experiments.evaluation.scoring import Request, padded, score
from tests.experiments import tiny
from tests.peers.goldens import forward


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.model(tmp_path_factory.mktemp("scoring"))


@pytest.fixture(scope="module")
def model(source):
    return load_model(source)


@pytest.fixture(scope="module")
def requests(source):
    """Of many lengths, up to one token more than the model's context."""
    draw, longest = np.random.default_rng(0), source.config.context
    lengths = [(1, 1), (3, 2), (20, 7), (20, 9), (60, 3), (longest, 1), (1, longest)]
    return [
        Request(*(draw.integers(1, source.config.vocabulary, size=n).tolist() for n in pair))
        for pair in lengths
    ]


def by_forward_pass(model, request):
    """The definition: one whole forward pass for each request, here of the longest there is."""
    tokens = [*request.context, *request.continuation][-(model.config.context + 1) :]
    filled = np.zeros((1, model.config.context), np.int32)
    filled[0, : len(tokens) - 1] = tokens[:-1]
    logits = np.asarray(jax.nn.log_softmax(forward(model, jnp.asarray(filled))[0]))
    last = logits[: len(tokens) - 1][-len(request.continuation) :]
    picked = last[np.arange(len(last)), request.continuation]
    return picked.sum(), bool((last.argmax(-1) == request.continuation).all())


def test_scores_are_those_of_whole_forward_passes(source, model, requests):
    start = jnp.zeros((1, model.config.context), jnp.int32).at[0, :3].set(jnp.array([5, 9, 4]))
    greedy = [int(forward(model, start)[0, 2].argmax())]
    asked = [*requests, Request([5, 9, 4], greedy)]
    found = score(source, asked, batch=64)
    for each, request in zip(found, asked, strict=True):
        loglikelihood, likeliest = by_forward_pass(model, request)
        assert each.loglikelihood == pytest.approx(loglikelihood, abs=2e-4)
        assert each.greedy == likeliest
    assert found[-1].greedy and not all(each.greedy for each in found)


@pytest.mark.parametrize("batch", [1, 4096])
def test_a_score_does_not_depend_on_what_it_is_batched_with(source, requests, batch):
    together, alone = score(source, requests, batch=batch), score(source, requests[2:3], batch=1)
    assert together[2].loglikelihood == pytest.approx(alone[0].loglikelihood, abs=1e-4)


def test_portions_bound_what_is_held_and_change_nothing(source, requests, monkeypatch):
    whole = score(source, requests, batch=64)
    monkeypatch.setattr(scoring, "PORTION", 4 * 128 * source.config.hidden)
    batches = scoring.batched(requests, source.config, 64)
    portions = scoring.in_portions(batches, source.config)
    assert [batch for portion in portions for batch in portion] == batches and len(portions) > 1
    for portion in portions:
        held = sum(4 * batch.tokens.size * source.config.hidden for batch in portion)
        assert len(portion) == 1 or held <= scoring.PORTION
    parts = score(source, requests, batch=64)
    assert [p.loglikelihood for p in parts] == pytest.approx([w.loglikelihood for w in whole])


def test_lengths_are_padded_to_few_and_never_beyond_the_longest():
    lengths = [padded(n, 1000) for n in range(1, 1001)]
    assert sorted(set(lengths)) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1000]
    assert all(n <= length for n, length in enumerate(lengths, start=1))


def test_few_shapes_whatever_the_requests(source):
    draw = np.random.default_rng(1)
    many = [Request([1] * int(n), [2]) for n in draw.integers(1, source.config.context, 300)]
    batches = scoring.batched(many, source.config, 512)
    by_length = {batch.tokens.shape[1]: set() for batch in batches}
    for batch in batches:
        by_length[batch.tokens.shape[1]].add(batch.tokens.shape)
    assert all(len(shapes) == 1 for shapes in by_length.values())
    assert sorted(row for batch in batches for row in batch.rows) == list(range(300))
