"""Exports of families that keep layers joined, transposed or by expert: written, read, refused."""

import numpy as np
import pytest

from experiments import compress, evaluate
from experiments.checkpoints.planish import Checkpoint
from experiments.checkpoints.sources import open_source
from experiments.errors import UserError
from tests.experiments.test_families import write_model

GRID = ["algorithm=rtn", "bits=4", "algorithm.format.group_size=16"]


@pytest.mark.parametrize("family", ["phi3", "qwen2_moe", "gemma2"])
@pytest.mark.parametrize("form", ["compressed_tensors", "gptq"])
@pytest.mark.some(2)
def test_joined_layers_and_experts_come_back(family, form, config, tmp_path):
    model = write_model(tmp_path / family, family)
    done = compress.run(config(*model, *GRID, f"export={form}"))
    folder = done.folder / "export" / form
    source, checkpoint = open_source(folder), Checkpoint(done.checkpoint)
    assert source.config == checkpoint.config and source.names() == checkpoint.names()
    for name in source.names():
        found, ours = source.read(name), checkpoint.read(name)
        exact = "norm" not in name  # Gemma's are kept as their distance from one
        np.testing.assert_allclose(found, ours, rtol=0, atol=0 if exact else 1e-3)
        assert type(source.tensor(name)).__name__ == type(checkpoint.tensor(name)).__name__ or (
            isinstance(source.tensor(name), np.ndarray)
            and isinstance(checkpoint.tensor(name), np.ndarray)
        )


@pytest.mark.parametrize(
    ("family", "measure"), [("gpt2", "perplexity"), ("opt", "perplexity"), ("bert", "similarity")]
)
@pytest.mark.some(1)
def test_dense_exports_of_any_family_evaluate_as_the_checkpoint(family, measure, config, tmp_path):
    model = [*write_model(tmp_path / family, family), f"evaluation={measure}"]
    done = compress.run(config(*model, *GRID, "export=safetensors", "export.dtype=float32"))
    folder = done.folder / "export" / "safetensors_float32"
    again = evaluate.run(config(*model, f"model.path={folder}", name="evaluate")).record
    expected, found = (r["metrics"][measure]["window_losses"] for r in (done.record, again))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "overrides", "sentence"),
    [
        ("gpt2", [], r"GPT2LMHeadModel keeps its matrices as \[in, out\].*export dense weights"),
        ("bert", ["evaluation=similarity"], "this is an encoder: export dense weights"),
        (
            "phi3",
            [r"rules=[{match: 'blocks\.1\.attention\.k', algorithm: null}]"],
            "one matrix in other software, and not all of them are compressed",
        ),
        (
            "phi3",
            [r"rules=[{match: 'blocks\.1\.attention\.k', algorithm: {format: {bits: 8}}}]"],
            "one matrix in other software, and differ in element",
        ),
    ],
)
def test_what_has_no_place_is_refused_before_anything_is_computed(
    family, overrides, sentence, config, tmp_path
):
    model = write_model(tmp_path / family, family)
    with pytest.raises(UserError, match=sentence):
        compress.run(config(*model, *GRID, *overrides, "export=compressed_tensors"))
    assert not list(tmp_path.rglob("*.partial"))
