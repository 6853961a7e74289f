"""Live checks of exports against transformers and compressed-tensors: `make test-peers`."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.kv_cache import SCALES
from algorithms.tensors import CompressedTensor, DenseTensor, QuantizedInput
from experiments.checkpoints.families import FAMILIES
from experiments.checkpoints.layouts.compressed_tensors import CompressedTensors
from experiments.checkpoints.loading import load_model
from experiments.checkpoints.sources import Source, open_source
from tests.peers import exports, goldens
from tests.peers.test_live import run

pytestmark = pytest.mark.peers
BFLOAT16 = ("nvfp4", "mxfp4", "mxfp8")  # what the loader makes of these weights
LAYERS = goldens.REPOSITORY / "tests" / "golden" / "exports"  # by make_exports.py
FLOOR = 1e-9  # of a root mean square, so that it can divide


@pytest.fixture(scope="module")
def loaded(python, tmp_path_factory) -> Mapping[str, tuple]:
    """Of each case: what was exported, the folder, what transformers makes of it."""
    place = tmp_path_factory.mktemp("exports")
    made = {name: exports.write(case, place / name) for name, case in exports.CASES.items()}
    run(python, "run_exports.py", *(str(place / name) for name in made))
    return {n: (made[n], open_source(place / n), np.load(f"{place / n}.npz")) for n in made}


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def weight_of(name: str, tensor) -> np.ndarray:
    """The dense form as the loader should make it."""
    if not isinstance(tensor, CompressedTensor):
        return np.asarray(tensor, np.float32)
    w = tensor.dequantize()
    return np.asarray(w.astype(jnp.bfloat16) if name.startswith(BFLOAT16) else w, np.float32)


@pytest.mark.parametrize("name", exports.CASES)
def test_the_loader_makes_our_weights_bit_for_bit(loaded, name):
    made, source, theirs = loaded[name]
    for ours, tensor in made.items():
        np.testing.assert_array_equal(
            theirs[stored_name(source, ours)], weight_of(name, tensor), ours
        )
        dense = tensor.dequantize() if isinstance(tensor, CompressedTensor) else tensor
        np.testing.assert_array_equal(source.read(ours), dense)


@pytest.mark.parametrize("name", exports.CASES)
def test_a_layer_gives_what_ours_gives(loaded, name):
    made, source, theirs = loaded[name]
    layers = [ours for ours, tensor in made.items() if isinstance(tensor, CompressedTensor)]
    assert layers
    for ours in layers:
        module = stored_name(source, ours).removesuffix(".weight")
        given, gave = jnp.asarray(theirs[f"in:{module}"]), theirs[f"out:{module}"]
        tensor = as_loaded(source.tensor(ours), theirs[stored_name(source, ours)])
        bias = made.get(ours.removesuffix("weight") + "bias", 0.0)
        difference = rms(tensor.matmul(given) + bias - gave) / rms(gave)
        assert difference < exports.CASES[name].tolerance, (ours, difference)
        if isinstance(tensor, QuantizedInput):  # which the check would notice if it were not there
            missing = rms(tensor.weight.matmul(given) - gave) / rms(gave)
            nearest = 0.0 if name.startswith("mx") else difference  # whose scales are other ones
            assert missing > max(5e-3, nearest), (ours, missing)


@pytest.mark.parametrize("name", exports.CASES)
def test_the_model_gives_our_logits(loaded, name):
    _, source, theirs = loaded[name]
    model = load_model(on_weights(source, theirs))
    ours = goldens.forward(model, jnp.asarray(theirs["tokens"]))
    difference = rms(ours - theirs["logits"]) / max(rms(theirs["logits"]), FLOOR)
    assert difference < exports.CASES[name].logits, difference
    if source.config.cache is not None:  # which the check would notice if it were not there
        for block in model.blocks:
            for scale in SCALES:
                getattr(block.attention, scale).set_value(jnp.zeros(1))
        exact = goldens.forward(model, jnp.asarray(theirs["tokens"]))
        assert rms(exact - theirs["logits"]) / rms(theirs["logits"]) > 0.01


@pytest.mark.parametrize("name", exports.CASES)
def test_the_folder_runs_as_it_says(loaded, name):
    """In 16 bits, where more falls between two codes."""
    theirs, case = loaded[name][2], exports.CASES[name]
    difference = rms(theirs["plain"] - theirs["logits"]) / rms(theirs["logits"])
    assert difference < (0.05 if case.inputs is None else 0.2 + 2 * case.logits), difference


@pytest.fixture(scope="module")
def peers_own(python, tmp_path_factory) -> Path:
    """Folders that llm-compressor wrote, each with what transformers makes of it beside it."""
    place = tmp_path_factory.mktemp("llmcompressor")
    run(python, "make_llmcompressor.py", str(place))
    return place


# Presets of llm-compressor, and the root mean square on logits: see exports.Case.
PRESETS = {
    **dict.fromkeys(["W4A16", "W4A16_ASYM", "W8A16", "W3A16", "MXFP4A16", "MXFP8A16"], 1e-4),
    **dict.fromkeys(["W8A8", "W4A8", "W4AFP8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "mixed"], 0.1),
    **{"NVFP4A16": 1e-4, "NVFP4": 0.5},
}


@pytest.mark.parametrize("name", PRESETS)
def test_what_llmcompressor_wrote_is_read(peers_own, name):
    source, theirs = open_source(peers_own / name), np.load(f"{peers_own / name}.npz")
    layout, rounded = CompressedTensors(), 0
    for ours in source.names():
        tensor = source.tensor(ours)
        np.testing.assert_array_equal(
            theirs[stored_name(source, ours)], weight_of(name.lower(), tensor)
        )
        if not isinstance(tensor, CompressedTensor):
            continue
        rounded += 1
        kept = dict(layout.encode(tensor))
        module = stored_name(source, ours).removesuffix(".weight")
        stored = source._quantized.arrays(module)
        for key, x in kept.items():  # the very arrays, where we would write them
            np.testing.assert_array_equal(np.asarray(stored[key]).reshape(x.shape), x, key)
            assert stored[key].dtype == x.dtype, key
        assert set(stored) == set(kept)
        assert layout.scheme(tensor) == source._quantized.schemes[module]
    assert rounded == 14 - (name == "mixed")
    ours = goldens.forward(load_model(on_weights(source, theirs)), jnp.asarray(theirs["tokens"]))
    difference = rms(ours - theirs["logits"]) / rms(theirs["logits"])
    assert difference < PRESETS[name], difference


def test_the_committed_layers_are_what_the_library_makes(python, tmp_path):
    run(python, "make_exports.py", str(tmp_path))
    for name in ("layers.safetensors", "schemes.json"):
        assert (tmp_path / name).read_bytes() == (LAYERS / name).read_bytes(), name


def as_loaded(tensor: CompressedTensor, weight: np.ndarray) -> CompressedTensor:
    """A layer of ours on the weights that the loader made."""
    dense = DenseTensor(jnp.asarray(weight))
    if isinstance(tensor, QuantizedInput):
        return QuantizedInput(dense, tensor.scale, tensor.zero, tensor.divisor, tensor.format)
    return dense


def on_weights(source: Source, weights: Mapping[str, np.ndarray]) -> Source:
    """An export of ours with the loader's weights, bfloat16 where it makes them so."""

    def tensor(name: str):
        found = source.tensor(name)
        if not isinstance(found, CompressedTensor):
            return found
        return as_loaded(found, weights[stored_name(source, name)])

    changed = copy.copy(source)
    changed.tensor = tensor
    return changed


def stored_name(source: Any, ours: str) -> str:
    (place,) = FAMILIES[source.config.family].places(source.config, ours)
    return place.name
