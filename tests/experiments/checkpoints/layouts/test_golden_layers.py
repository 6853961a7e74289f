"""Layers that compressed-tensors' own compressors packed, kept by tests/peers/make_exports.py."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.tensors import QuantizedInput
from experiments.checkpoints import shards
from experiments.checkpoints.layouts.compressed_tensors import CompressedTensors

FOLDER = Path(__file__).parents[3] / "golden" / "exports"
SCHEMES = json.loads((FOLDER / "schemes.json").read_text())["schemes"]
ENTRIES = shards.read_header(FOLDER / "layers.safetensors")
LAYOUT = CompressedTensors()


def arrays(name):
    prefix = f"{name}/"
    found = {n.removeprefix(prefix): e.open() for n, e in ENTRIES.items() if n.startswith(prefix)}
    return found, found.pop("dense"), found.pop("rounded", None)


def read(name):
    said = {"config_groups": {"group_0": SCHEMES[name]}, "format": SCHEMES[name]["format"]}
    scheme = LAYOUT.parse(said, ["a.layer"])["a.layer"]
    return LAYOUT.decode(arrays(name)[0], scheme), scheme


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.some(8)
def test_a_weight_is_what_the_library_unpacks(name):
    dense = arrays(name)[1]
    found = read(name)[0].dequantize()
    np.testing.assert_array_equal(found.astype(dense.dtype), dense)
    assert np.abs(dense.astype(np.float32)).max() > 1


@pytest.mark.parametrize("name", SCHEMES)
def test_we_write_the_very_arrays(name):
    stored, (tensor, scheme) = arrays(name)[0], read(name)
    written = LAYOUT.encode(tensor)
    assert LAYOUT.scheme(tensor) == scheme
    assert {n: x.dtype for n, x in written.items()} == {n: x.dtype for n, x in stored.items()}
    for n, x in written.items():
        assert x.shape == stored[n].shape, n
        assert x.tobytes() == stored[n].tobytes(), n


@pytest.mark.parametrize("name", [n for n in SCHEMES if SCHEMES[n]["input_activations"]])
@pytest.mark.some(3)
def test_an_input_is_rounded_as_the_library_does(name):
    rounded, tensor = arrays(name)[2], read(name)[0]
    assert isinstance(tensor, QuantizedInput)
    x = ENTRIES["x"].open()
    decided = np.abs(tensor.rounded(jnp.asarray(x)) - rounded) > 1e-5
    assert not decided[~undecided(name, x)].any()
    assert (np.abs(rounded - x) > 1e-5).mean() > 0.5


def undecided(name, x):
    """Where the library may differ. At 8 bits a token's largest lies between two codes if it is
    negative; in MX the library takes the next power of two from 1.75 times a power of two on.
    """
    args = SCHEMES[name]["input_activations"]
    if args["type"] == "int":
        return x == -np.abs(x).max(1, keepdims=True)
    if args["scale_dtype"] != "torch.uint8":
        return np.zeros_like(x, bool)
    largest = np.abs(x.reshape(len(x), -1, 32)).max(-1)
    above = largest / 2 ** np.floor(np.log2(largest)) >= 1.75
    assert 0 < above.sum() < above.size
    return np.repeat(above, 32, 1)
