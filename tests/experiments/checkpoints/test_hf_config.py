"""A config.json that we write is read as the decoder it was written of."""

import dataclasses
import json

import pytest

from experiments.checkpoints.hf_config import to_raw
from experiments.checkpoints.huggingface import read_config
from models.rope import RopeScaling
from tests.experiments.checkpoints.synthetic import CONFIG
from tests.peers import goldens

LLAMA3 = RopeScaling(
    kind="llama3", factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0,
    original_context=64,
)  # fmt: skip
SHAPES = {
    "llama": {},
    "llama biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "llama3": {"rope_scaling": LLAMA3, "tied_embeddings": True, "rope_theta": 5e5},
    "linear": {"rope_scaling": RopeScaling(kind="linear", factor=2.5)},
    "mistral": {"windows": (5, 5), "head_size": 14},
    "qwen2": {"qkv_bias": True, "norm_epsilon": 1e-6},
    "qwen2 windows": {"qkv_bias": True, "windows": (None, 7)},
    "qwen3": {"qk_norm": True, "head_size": 14},
    "qwen3 windows": {"qk_norm": True, "windows": (6, None), "qkv_bias": True, "output_bias": True},
}


def again(config, tmp_path):
    path = tmp_path / "config.json"
    return read_config(json.loads(json.dumps(to_raw(config))), path)


@pytest.mark.parametrize("name", SHAPES)
def test_it_is_read_as_what_was_written(tmp_path, name):
    config = dataclasses.replace(CONFIG, **SHAPES[name])
    assert again(config, tmp_path) == config


@pytest.mark.parametrize("name", goldens.names(goldens.COMMITTED))
def test_every_golden_model_is_written_as_its_own_family(tmp_path, name):
    path = goldens.COMMITTED / name / "config.json"
    theirs = json.loads(path.read_text())
    config = read_config(theirs, path)
    assert again(config, tmp_path) == config
    assert to_raw(config)["architectures"] == theirs["architectures"]


@pytest.mark.parametrize(
    "features",
    [
        {"qkv_bias": True, "mlp_bias": True},
        {"output_bias": True},
        {"qk_norm": True, "mlp_bias": True},
        {"windows": (5, None)},
        {"windows": (5, 5), "qkv_bias": True, "output_bias": True},
        {"qkv_bias": True, "windows": (5, 6)},
    ],
)
def test_a_decoder_that_no_family_is_is_refused(features):
    with pytest.raises(ValueError, match="No architecture of transformers has qk_norm="):
        to_raw(dataclasses.replace(CONFIG, **features))
