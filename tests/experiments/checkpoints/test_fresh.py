"""Models that nobody has trained: the same bits however they are read; a tokenizer of bytes."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.checkpoints.fresh import Fresh, byte_tokenizer
from experiments.checkpoints.loading import load_model
from experiments.errors import UserError

SIZES = dict(
    vocabulary=256, hidden=32, layers=4, heads=2, kv_heads=2, head_size=16, feed_forward=64,
    context=16, qkv_bias=True,
)  # fmt: skip


def test_tensors_do_not_depend_on_the_order_in_which_they_are_read():
    one, other = Fresh(**SIZES), Fresh(**SIZES)
    names = sorted(one.names())
    found = {name: one.read(name) for name in names}
    for name in reversed(names):
        assert (other.read(name) == found[name]).all()
    assert one.digest() == other.digest()


def test_each_seed_is_another_model():
    one, other = Fresh(**SIZES), Fresh(**SIZES, seed=1)
    assert (one.read("embed.weight") != other.read("embed.weight")).any()
    assert one.digest() != other.digest()


def test_it_is_initialized_as_gpt2_is():
    source = Fresh(**SIZES, deviation=0.05)
    assert np.std(source.read("embed.weight")) == pytest.approx(0.05, rel=0.05)
    assert np.std(source.read("blocks.1.attention.q.weight")) == pytest.approx(0.05, rel=0.1)
    into = np.std(source.read("blocks.1.mlp.down.weight"))
    assert into == pytest.approx(0.05 / np.sqrt(8), rel=0.1)
    assert (source.read("blocks.0.attention.q.bias") == 0).all()
    assert (source.read("norm.weight") == 1).all()


def test_it_loads_like_any_other():
    logits = load_model(Fresh(**SIZES))(jnp.arange(4)[None])
    assert logits.shape == (1, 4, 256)


def test_every_byte_is_a_token_and_comes_back():
    tokenizer = byte_tokenizer()
    text = "Zwölf Boxkämpfer, 42 %\n\t\0 — 日本語 🙂"
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_sizes_that_make_no_model_are_refused():
    with pytest.raises(UserError, match="kv_heads=3 must divide heads=2"):
        Fresh(**{**SIZES, "kv_heads": 3})
    with pytest.raises(UserError, match="model: .*widht"):
        Fresh(**SIZES, widht=3)
