"""The main job on a tiny model of every kind of family, from its folder to its checkpoint."""

import json

import numpy as np
import pytest

from experiments import compress, evaluate
from experiments.checkpoints.families import FAMILIES
from experiments.checkpoints.planish import Checkpoint
from experiments.checkpoints.sources import open_source
from tests.experiments import tiny
from tests.experiments.checkpoints.synthetic import write_folder

SIZES = {
    "vocab_size": 53, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
RAW = {
    "gemma2": {"sliding_window": 5},
    "phi3": {},
    "opt": {"ffn_dim": 64},
    "bert": {},
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_inner": 64, "n_positions": 64},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32, "mlp_only_layers": [0],
    },
}  # fmt: skip


def write_model(folder, family):
    """A folder of random weights at a trained model's scale, with the tiny model's tokenizer."""
    raw = {"architectures": [FAMILIES[family].architecture], **SIZES, **RAW[family]}
    write_folder(folder, raw, make=tiny.tensors)
    tiny.model(folder.parent).tokenizer().core.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return [f"model.path={folder}"]


@pytest.mark.parametrize("family", [family for family in RAW if family != "bert"])
@pytest.mark.some(2)
def test_a_model_of_each_kind_is_compressed_and_evaluated(family, config, tmp_path):
    model = write_model(tmp_path / family, family)
    method = ["algorithm=gptq", "algorithm.format.group_size=16", "bits=8"]
    done = compress.run(config(*model, *method))
    before = evaluate.run(config(*model, name="evaluate")).record["metrics"]["perplexity"]
    after = done.record["metrics"]["perplexity"]
    np.testing.assert_allclose(after["window_losses"], before["window_losses"], atol=0.02)
    again = evaluate.run(config(f"checkpoint={done.checkpoint}", name="evaluate")).record
    assert again["metrics"]["perplexity"] == after
    checkpoint, source = Checkpoint(done.checkpoint), open_source(tmp_path / family)
    assert checkpoint.config == source.config and checkpoint.names() == source.names()
    for name in source.names():
        if name.endswith("weight") and source.read(name).ndim > 1 and "blocks" in name:
            w = source.read(name)
            if "router" in name or "shared_gate" in name:
                assert isinstance(checkpoint.tensor(name), np.ndarray)
            found = checkpoint.read(name)
            alive = (found != 0).any(-2, keepdims=True)  # OPT's ReLU gives inputs that are never on
            np.testing.assert_allclose(found, alive * w, atol=0.02 * np.abs(w).max())


@pytest.mark.slow
def test_an_encoder_is_compressed_and_measured(config, tmp_path):
    model = write_model(tmp_path / "bert", "bert")
    (tmp_path / "bert" / "tokenizer_config.json").write_text(
        json.dumps({"cls_token": "<s>", "sep_token": "</s>", "add_bos_token": True})
    )
    ends = open_source(tmp_path / "bert").tokenizer()
    assert (ends.bos, ends.eos) == (1, 2)
    method = ["algorithm=gptq", "algorithm.format.group_size=16", "evaluation=similarity"]
    fine, coarse = (compress.run(config(*model, *method, f"bits={b}")).record for b in (8, 2))
    before = evaluate.run(config(*model, "evaluation=similarity", name="evaluate")).record
    expected, found, far = (
        np.array(r["metrics"]["similarity"]["window_losses"]) for r in (before, fine, coarse)
    )
    assert np.abs(found - expected).max() < 0.1 * np.abs(far - expected).max() < 0.1
