import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from algorithms import kv_cache
from experiments.checkpoints.loading import load_model
from experiments.checkpoints.planish import CheckpointWriter
from experiments.checkpoints.sources import open_source
from experiments.errors import UserError
from experiments.generate import continue_text, encode_prompt
from experiments.generation import Sampling, choose, generate, generate_together
from experiments.recipes import Recipe
from experiments.streaming import Walk, compress_model
from models.block import Flow
from models.decoder import Decoder
from models.layers import empty_cache
from tests.algorithms.integers import rtn
from tests.experiments import tiny

GREEDY = Sampling()
PROMPT = [5, 9, 11, 4]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.model(tmp_path_factory.mktemp("generation"))


@pytest.fixture(scope="module")
def model(source):
    return load_model(source)


def run(model, prompt=PROMPT, *, max_tokens=6, stops=(), sampling=GREEDY, seed=0):
    key = jax.random.key(seed)
    return list(
        generate(model, prompt, max_tokens=max_tokens, stops=stops, sampling=sampling, key=key)
    )


def test_greedy_is_the_argmax_of_the_whole_forward_pass(model):
    tokens = list(PROMPT)
    for _ in range(6):
        tokens.append(int(jnp.argmax(model(jnp.asarray(tokens)[None])[0, -1])))
    assert run(model) == tokens[len(PROMPT) :]


def test_prompts_of_any_length_are_continued_together(model):
    prompts, hot = [PROMPT, [7], list(range(1, 40)), PROMPT], Sampling(temperature=1.5)
    keys = jax.random.split(jax.random.key(3), len(prompts))
    for sampling in (GREEDY, hot):
        steps = generate_together(model, prompts, max_tokens=6, sampling=sampling, keys=keys)
        together = np.stack(list(steps), axis=1).tolist()
        for prompt, key, found in zip(prompts, keys, together, strict=True):
            alone = generate(model, prompt, max_tokens=6, stops=(), sampling=sampling, key=key)
            assert found == list(alone)


@pytest.mark.parametrize("element", ["fp8", "int8"])
@pytest.mark.some(1)
def test_a_rounded_cache_holds_codes_and_changes_nothing(model, element):
    """What is generated over codes is the argmax of the whole pass, which rounds to them."""
    rounding = nnx.clone(model)
    config = dataclasses.replace(model.config, cache=element)
    tokens = jnp.asarray([PROMPT])
    fresh = Decoder(config, rngs=nnx.Rngs(0))
    nnx.update(fresh, nnx.state(rounding))
    positions = jnp.arange(tokens.shape[1])[None]
    x = fresh.stem(tokens, positions)
    for block in fresh.blocks:
        kv_cache.fit(block, [Flow(x, block.attention_norm(x), positions)])
        x, _ = block(x, positions)
    assert empty_cache(config, 0, 1, 8).k.dtype.itemsize == 1
    found = list(PROMPT)
    for _ in range(6):
        found.append(int(jnp.argmax(fresh(jnp.asarray(found)[None])[0, -1])))
    assert run(fresh) == found[len(PROMPT) :]


def test_a_stop_token_ends_the_text_and_is_left_out(model):
    tokens = run(model)
    assert run(model, stops=[tokens[2]]) == tokens[: tokens.index(tokens[2])]


def test_samples_are_a_function_of_the_seed(model):
    hot = Sampling(temperature=2.0)
    assert run(model, sampling=hot, seed=1) == run(model, sampling=hot, seed=1)
    assert len({tuple(run(model, sampling=hot, seed=s, max_tokens=12)) for s in range(4)}) > 1


@pytest.mark.parametrize("narrow", [dict(top_k=1), dict(top_p=1e-6)])
def test_the_narrowest_sampling_is_greedy(model, narrow):
    assert run(model, sampling=Sampling(temperature=1.0, **narrow)) == run(model)


def test_samples_follow_the_distribution_that_was_asked_for():
    logits = jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.1]))

    def frequencies(**sampling):
        rows, key = jnp.tile(logits, (20000, 1)), jax.random.key(0)
        return np.bincount(choose(rows, key, Sampling(**sampling)), minlength=4) / 20000

    np.testing.assert_allclose(frequencies(temperature=1.0), [0.4, 0.3, 0.2, 0.1], atol=0.015)
    sharp = np.square([0.4, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(frequencies(temperature=0.5), sharp / sharp.sum(), atol=0.015)
    top2 = [4 / 7, 3 / 7, 0, 0]
    np.testing.assert_allclose(frequencies(temperature=1.0, top_k=2), top2, atol=0.015)
    np.testing.assert_allclose(frequencies(temperature=1.0, top_p=0.6), top2, atol=0.015)
    np.testing.assert_allclose(frequencies(temperature=1.0, top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0],
                               atol=0.015)  # fmt: skip


def test_text_comes_from_packed_weights(source, tmp_path):
    writer = CheckpointWriter(tmp_path / "c")
    compress_model(source, writer, Recipe(rtn(bits=8, group_size=32)), None, Walk())
    writer.finish(source.config, source.tokenizer(), {})
    config = {"chat": False, "max_tokens": 8, "seed": 0, "sampling": {}}
    pieces = list(continue_text(open_source(tmp_path / "c"), "ab cd", config))
    ids = run(load_model(open_source(tmp_path / "c")), source.tokenizer().encode("ab cd"),
              max_tokens=8, stops=source.tokenizer().stops)  # fmt: skip
    assert "".join(pieces) == source.tokenizer().decode(ids)


@pytest.mark.parametrize(
    "mistake, sentence",
    [
        (dict(prompt=[]), "The prompt has no tokens"),
        (dict(max_tokens=200), "exceed the model's context of 128"),
    ],
)
@pytest.mark.some(1)
def test_a_prompt_that_does_not_fit_is_refused(model, mistake, sentence):
    with pytest.raises(UserError, match=sentence):
        run(model, **mistake)


@pytest.mark.parametrize(
    "mistake", [dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5)]
)
def test_impossible_sampling_is_refused(mistake):
    with pytest.raises(UserError, match=f"sampling.{next(iter(mistake))}"):
        Sampling(**mistake)


def test_a_chat_needs_a_template(source):
    with pytest.raises(UserError, match="no chat template"):
        encode_prompt(source.tokenizer(), "hello", chat=True)
    assert encode_prompt(source.tokenizer(), "ab", chat=False) == source.tokenizer().encode("ab")
