"""The main job with a structure: pruned alone, pruned and compressed, exported, gone on with."""

import json

import numpy as np
import pytest

from experiments import compress, exporting
from experiments.checkpoints.planish import Checkpoint
from experiments.checkpoints.sources import open_source
from experiments.entry import build, resolved
from experiments.errors import UserError
from experiments.evaluation.footprint import Footprint
from experiments.report import calibration, cells, label
from tests.experiments import tiny
from tests.experiments.checkpoints.synthetic import CONFIG
from tests.experiments.test_resume import interrupt

RTN = ["algorithm=rtn", "algorithm.format.group_size=32"]
NARROW = ["structure=minitron", "structure.feed_forward=32"]
ALONE = ["structure=shortgpt", "structure.layers=1", "algorithm=none"]


def test_a_pruned_model_is_an_ordinary_smaller_one(config, tmp_path):
    """Recorded, described, exported and read back as any other; and pruned further."""
    done = compress.run(config(*ALONE, "export=safetensors", "walk.dense_dtype=float32"))
    record, made = done.record, Checkpoint(done.checkpoint)
    assert (made.config.layers, made.config.family) == (1, "llama")
    said = record["structure"]
    assert said["layers"] == [2, 1] and said["removed"]["layers"] in ("0", "1")
    assert said["parameters"][1] == Footprint(**record["footprint"]).parameters
    assert said["parameters"][0] > said["parameters"][1] and len(said["scores"]) == 2
    assert label(record) == "ShortGPT less 1 block" and calibration(record) == "6 × 16"
    row = cells(record, None, label(record))
    assert row[1] == "–" and row[2] == f"{record['bytes_on_disk'] / 1e6:.1f}"
    assert record["layers"][0]["errors"] == {} and "structure" in record["estimate"]["operations"]

    exported = exporting.place(done.folder, build(config("export=safetensors"), "export"))
    raw = json.loads((exported / "config.json").read_text())
    assert raw["num_hidden_layers"] == 1 and raw["architectures"] == ["LlamaForCausalLM"]
    again, original = open_source(exported), tiny.model(tmp_path)
    kept = 1 - int(said["removed"]["layers"])
    assert again.config.layers == 1
    for within in ("attention.q", "mlp.down"):
        np.testing.assert_array_equal(
            made.read(f"blocks.0.{within}.weight"), original.read(f"blocks.{kept}.{within}.weight")
        )
    card = (exported / "README.md").read_text()
    assert "ShortGPT less 1 block" in card and "layers 1 of 2" in card

    narrower = config(f"model.path={done.checkpoint}", *NARROW, *RTN)
    plan = compress.prepare(narrower)
    assert (plan.source.config.layers, plan.source.config.feed_forward) == (1, 32)
    assert label({"config": resolved(narrower)}) == "Minitron feed_forward 32 + RTN 4 bit g32"


@pytest.mark.parametrize(
    "settings",
    [
        [*NARROW, "algorithm=none"],
        ["structure=minitron", "structure.heads=2", "algorithm=gptq", *RTN[1:]],
        ["structure=slicegpt", "structure.hidden=64", "rotation=quarot", *RTN],
        ["structure=llm_pruner", "structure.feed_forward=32", "algorithm=none"],
    ],
)
@pytest.mark.some(1)
def test_an_interrupted_run_ends_with_the_same_bytes(config, tmp_path, monkeypatch, settings):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt(patched, "blocks.1", KeyboardInterrupt())
        compress.run(config(*settings))
    done = compress.run(config(*settings))
    assert len(done.record["attempts"]) == 2
    undisturbed = compress.run(config(*settings, f"runs={tmp_path / 'elsewhere'}"))
    assert tiny.files(done.checkpoint) == tiny.files(undisturbed.checkpoint)


def test_an_interrupted_evaluation_keeps_what_was_removed(config, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(compress, "Checkpoint", interrupted)
        compress.run(config(*ALONE))
    assert compress.run(config(*ALONE)).record["structure"]["layers"] == [2, 1]


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (["algorithm=none"], "algorithm=none leaves all weights as they are, and no other step"),
        (["algorithm=none", "activations=int8_token"], "activations goes around an algorithm"),
        ([*ALONE, "calibration=gptaq"], "calibration goes around an algorithm, and there is none"),
        ([*ALONE, "algorithm@pruning=wanda"], "pruning goes around an algorithm"),
        (
            [*ALONE, "rules=[{match: '.*mlp.up', algorithm: {format: {bits: 8}}}]"],
            "changes settings of an algorithm, and algorithm=none has none",
        ),
        (["structure=reap"], "family llama has no mixture of experts"),
        (["structure=minitron", "structure.heads=0"], "heads=0 must be from 1 to the 3"),
        ([*ALONE[:2], "rules=[{match: 'blocks.1.*', algorithm: null}]"], "decides no layer"),
        (["structure=slicegpt", "structure.multiple=0"], "structure: multiple=0 must be positive"),
    ],
)
def test_what_cannot_be_is_a_sentence(config, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        compress.prepare(config(*settings))


def test_what_finds_a_structure_is_estimated():
    """Passes over the original's blocks; more where gradients are wanted, and none where blocks are
    named.
    """
    from experiments.estimate import _scoring
    from experiments.streaming import Walk
    from experiments.structures.depth import shortened_llama, shortgpt

    def operations(structure):
        found = _scoring(CONFIG, structure, (8, 16), Walk())
        return sum(part.operations for part in found.parts.values()), found.memory

    once, taylor = operations(shortgpt(layers=1)), operations(shortened_llama(score="taylor"))
    assert taylor[0] == pytest.approx(4 * once[0]) and taylor[1] > once[1]
    assert operations(shortgpt(layers=[0])) == (0, 0)
