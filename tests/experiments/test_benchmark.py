import dataclasses

import hydra
import pytest

from experiments import benchmark
from experiments.benchmark_report import markdown
from experiments.checkpoints.sources import open_source
from experiments.entry import CONF
from experiments.errors import UserError
from experiments.evaluation import floor
from experiments.measurements import scale
from experiments.measurements.interruptions import _require_equal, interruptions
from experiments.measurements.scale import write_random_model
from tests.experiments import tiny
from tests.experiments.checkpoints.synthetic import CONFIG


def test_the_floor_counts_every_product_once():
    work = floor.operations(CONFIG, windows=3, context=10)
    weights = 96 * (96 + 2 * 32) + 96 * 96 + 2 * 96 * 64 + 96 * 64
    assert work["linear"] == 2 * (2 * 30 * weights)
    assert work["attention"] == 2 * (2 * 30 * 10 * 96)  # two products of T x T x 96, halved
    assert work["statistics"] == 2 * (30 * (96**2 + 96**2 + 96**2 + 64**2))
    assert floor.product_rate(CONFIG, rows=8, repeats=1) > 0


def test_random_models_of_any_depth_open(tmp_path):
    source = tiny.model(tmp_path)
    (tmp_path / "deep").mkdir()
    config = dataclasses.replace(source.config, layers=5)
    write_random_model(config, source.tokenizer(), tmp_path / "deep")
    deep = open_source(tmp_path / "deep")
    assert deep.config.layers == 5
    assert deep.read("blocks.4.mlp.down.weight").shape == (96, 64)
    assert deep.tokenizer().encode("ab") == source.tokenizer().encode("ab")


def test_memory_is_measured_in_processes_of_their_own(tmp_path):
    base = tiny.overrides(tmp_path)
    own = ["algorithm=rtn", "algorithm.format.group_size=32", *base[2:]]
    settings = ",".join(f"'{override}'" for override in own)
    overrides = [*base[:2], "what=[memory]", "depths=[1,2]", f"memory=[{settings}]"]
    overrides += [f"runs={tmp_path / 'runs'}"]
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        record = benchmark.run(hydra.compose("benchmark", overrides)).record
    rows = record["results"]["memory"]
    assert [row["blocks"] for row in rows] == [1, 2]
    assert all(row["peak_memory"] > 1e7 for row in rows)


@pytest.mark.slow
def test_large_shapes_pass_and_their_exports_evaluate_alike(tmp_path, monkeypatch):
    small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}
    known = scale.MODELS["llama_3_8b"] | small | {"vocab_size": 300}
    monkeypatch.setitem(scale.MODELS, "llama_3_8b", known)
    source = tiny.model(tmp_path)
    text = [o for o in tiny.overrides(tmp_path)[2:] if o.startswith("data")]
    plain = {
        "scaled": {"llama_3_8b": 1},
        "scale_recipes": [["algorithm=gptq", "algorithm.format.group_size=32"]],
        "scale": [*text, "export=compressed_tensors"],
    }
    (row,) = scale.scale(plain, source, tmp_path, benchmark.our_run)
    assert row["loss_of_export"] == pytest.approx(row["loss"], rel=1e-3)
    weights = 2 * 64 * 64 + 2 * 64 * 64 + 3 * 64 * 96
    assert row["held"]["block"] == 4 * (weights + 2 * 64)
    assert row["held"]["statistics"] == 4 * 96 * 96
    assert row["whole"]["blocks"] == 32
    assert row["whole"]["parameters"] == 32 * (weights + 2 * 64) + 2 * 300 * 64 + 64
    assert not (tmp_path / "llama_3_8b").exists()
    record = {"results": {"scale": [row]}, "device": {"cores": 2, "machine": "x86_64"}}
    shown = markdown(record | {"versions": {"jax": "0.11"}}, "scale")
    assert "| llama 3 8b | 1 of 32 | gptq 32 | 0.00 | 0.00 | 0.00 |" in shown


def test_an_unknown_measurement_is_refused(tmp_path):
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        config = hydra.compose("benchmark", ["what=[speed]", *tiny.overrides(tmp_path)[:2]])
    with pytest.raises(UserError, match="choose from gptq, perplexity, memory"):
        benchmark.run(config)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_kills_end_with_equal_bytes(tmp_path):
    base = tiny.overrides(tmp_path)
    settings = ["algorithm=gptq", "algorithm.format.group_size=32", *base]
    plain = {"interrupted": settings, "kills": 2, "seed": 0}
    found = interruptions(plain, tmp_path / "kills")
    assert found["kills"] == len(found["kill_seconds"]) == 2 and found["bytes_equal"]
    assert sum(one["kills"] for one in found["rounds"]) == 2


def test_other_bytes_are_an_error(tmp_path):
    _require_equal({"a": "1"}, {"a": "1"}, tmp_path)
    for found in ({"a": "2"}, {}, {"a": "1", "b": "1"}):
        with pytest.raises(UserError, match="was killed and ended with other bytes in [ab]"):
            _require_equal(found, {"a": "1"}, tmp_path)
