"""Nemotron-NAS: models whose blocks differ, as other software knows them."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.checkpoints.families import FAMILIES
from experiments.checkpoints.families.nemotron import NEMOTRON
from experiments.checkpoints.huggingface import read_config
from experiments.checkpoints.sources import open_source, shapes
from experiments.errors import UserError
from models.config import BlockSizes
from tests.experiments.checkpoints.synthetic import CONFIG, write_folder

SIZES = ((3, 512), (0, 40), (1, 0), (0, 0))
MIXED = dataclasses.replace(
    CONFIG, layers=4, family="nemotron-nas", kv_heads=3, feed_forward=512,
    blocks=tuple(BlockSizes(kv_heads=k, feed_forward=f) for k, f in SIZES),
)  # fmt: skip
ATTENTION, FFN = {"n_heads_in_group": 8, "no_op": False}, {"ffn_mult": 2.625, "no_op": False}
# Of Llama-3.3-Nemotron-Super-49B, two blocks.
PUBLISHED = {
    "architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas", "hidden_act": "silu",
    "hidden_size": 8192, "intermediate_size": None, "num_key_value_heads": None,
    "num_attention_heads": 64, "num_hidden_layers": 2, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "block_configs": [
        {"attention": ATTENTION, "ffn": FFN},
        {"attention": {"n_heads_in_group": None, "no_op": True},
         "ffn": {"ffn_mult": 1.0, "no_op": False}},
    ],
}  # fmt: skip


def official_width(ffn_mult, hidden):
    """As vLLM has it (vllm/model_executor/models/nemotron_nas.py at 00bd1493, Apache-2.0)."""
    n = int(2 * ffn_mult * hidden / 3)
    return n if n % 256 == 0 else n + 256 - n % 256


def test_published_settings_are_read(tmp_path):
    config = read_config(PUBLISHED, tmp_path / "config.json")
    assert config.blocks == (
        BlockSizes(kv_heads=8, feed_forward=official_width(2.625, 8192)),
        BlockSizes(kv_heads=0, feed_forward=official_width(1.0, 8192)),
    )
    assert config.blocks[0].feed_forward == 14336 and config.kv_heads == 8


@pytest.mark.parametrize("hidden", [96, 576, 8192])
def test_every_multiple_is_said_so_that_it_is_read(hidden):
    for width in range(256, 30000, 256):
        blocks = (BlockSizes(kv_heads=1, feed_forward=width),) * CONFIG.layers
        c = dataclasses.replace(CONFIG, hidden=hidden, blocks=blocks)
        said = NEMOTRON.settings(c)["block_configs"][0]["ffn"]["ffn_mult"]
        assert official_width(said, hidden) == width


def test_a_folder_comes_back_as_it_was(tmp_path):
    raw = json.loads(json.dumps(FAMILIES["nemotron-nas"].write(MIXED)))
    ours = write_folder(tmp_path, raw)
    source = open_source(tmp_path)
    assert source.config == MIXED and source.names() == set(shapes(MIXED)) == set(ours)
    for name, x in ours.items():
        np.testing.assert_array_equal(source.read(name), x)
    assert raw["block_configs"][1]["ffn"]["intermediate_size"] == 40  # of no multiple of 256
    assert raw["block_configs"][3] == {
        "attention": {"n_heads_in_group": None, "no_op": True, "replace_with_linear": False},
        "ffn": {"ffn_mult": None, "no_op": True, "replace_with_linear": False},
    }
    alike = dataclasses.replace(MIXED, blocks=None)
    assert read_config(NEMOTRON.write(alike), tmp_path / "config.json") == alike


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"attention": {"replace_with_linear": True}}, "replace_with_linear=True, which planish"),
        ({"attention": {**ATTENTION, "window_length": 512}}, "attention.window_length=512"),
        (
            {"attention": {"n_heads_in_group": 7}},
            "n_heads_in_group=7, which does not divide the 64",
        ),
        ({"attention": {}}, "n_heads_in_group=None where a positive whole number"),
        ({"attention": None}, r"block_configs\[0\] should say what attention and ffn are"),
        ({"ffn": {"moe": {"num_local_experts": 8}}}, "ffn.moe="),
        ({"ffn": {"no_op": False}}, "intermediate_size=None where a positive whole number"),
        ({"ffn": {**FFN, "hidden_act": "gelu"}}, "hidden_act='gelu' where planish runs 'silu'"),
    ],
)
def test_what_is_no_such_block_is_a_sentence(tmp_path, change, sentence):
    blocks = [{**PUBLISHED["block_configs"][0], **change}, PUBLISHED["block_configs"][1]]
    with pytest.raises(UserError, match=sentence):
        read_config({**PUBLISHED, "block_configs": blocks}, tmp_path / "config.json")
    with pytest.raises(UserError, match="no block_configs for each of its 2 layers"):
        read_config({**PUBLISHED, "block_configs": blocks[:1]}, tmp_path / "config.json")
