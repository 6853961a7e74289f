"""Families, read and written: what config.json says, where tensors lie."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.checkpoints.families import FAMILIES
from experiments.checkpoints.families.raw import Raw
from experiments.checkpoints.huggingface import read_config
from experiments.checkpoints.sources import open_source, shapes
from tests.experiments.checkpoints.synthetic import CONFIG
from tests.peers import goldens

NAMES = goldens.names(goldens.COMMITTED)


@pytest.fixture(params=NAMES)
def folder(request):
    return goldens.COMMITTED / request.param


def test_every_family_is_among_the_golden_models():
    found = {open_source(goldens.COMMITTED / name).config.family for name in NAMES}
    # transformers has no Nemotron-NAS of its own: tests/experiments/checkpoints/test_nemotron.py
    assert found == set(FAMILIES) - {"nemotron-nas"}


def test_what_is_written_reads_as_it_was(folder):
    path = folder / "config.json"
    config = read_config(json.loads(path.read_text()), path)
    family = FAMILIES[config.family]
    written = json.loads(json.dumps(family.write(config)))
    again = read_config(written, path)
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(again, field.name)
        assert ours == (pytest.approx(theirs) if isinstance(theirs, float) else theirs), field.name
    assert written["architectures"] == [family.architecture]


def test_tensors_come_back_where_they_were(folder):
    """All of transformers' own, but for rows that no position uses."""
    source = open_source(folder)
    family, config = FAMILIES[source.config.family], source.config
    ours = {name: np.asarray(source.read(name), np.float32) for name in source.names()}
    written = family.stored(config, ours)
    assert set(ours) == set(shapes(config))
    for name, x in written.items():
        entry = source._entry(name)
        expected = np.asarray(entry.open(), np.float32)
        skipped = family.unused_rows.get("positions", 0) if "positions" in name else 0
        np.testing.assert_allclose(x[skipped:], expected[skipped:], atol=1e-6)
    ours_not = {"lm_head.weight", "pooler.dense.weight", "pooler.dense.bias"}
    assert set(source._entries) - ours_not == set(written) - ours_not


def test_a_model_that_its_family_has_no_setting_for():
    config = dataclasses.replace(CONFIG, qk_norm=True)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no setting for qk_norm=True"):
        FAMILIES["llama"].write(config)


@pytest.mark.parametrize(
    ("family", "settings", "sentence"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False where planish runs T"),
        ("opt", {"word_embed_proj_dim": 7}, "word_embed_proj_dim=7 where planish runs 8 or None"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma2", {"hidden_activation": "mish"}, "hidden_activation='mish' where planish runs si"),
        ("granite", {"logits_scaling": "x"}, "logits_scaling='x' where a number is expected"),
        ("mixtral", {"num_experts_per_tok": 9}, "chosen=9 must be from 1 to count=8"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "incomplete rotary parameters"),
    ],
)
def test_settings_that_planish_does_not_run(family, settings, sentence, tmp_path):
    raw = {
        "architectures": [FAMILIES[family].architecture], "vocab_size": 9, "hidden_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
        "max_position_embeddings": 16, "ffn_dim": 8, "n_embd": 8, "n_layer": 1, "n_head": 2,
        "n_positions": 16,
    }  # fmt: skip
    with pytest.raises(Exception, match=sentence):
        read_config(raw | settings, tmp_path / "config.json")
    assert read_config(raw, tmp_path / "config.json").family == family


def test_settings_are_asked_for_by_name(tmp_path):
    raw = Raw({"a": 3, "b": "x"}, tmp_path / "config.json")
    assert raw.count("a") == 3 and raw.number("c", 2.0) == 2.0
