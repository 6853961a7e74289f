"""Pruned layers as compressed-tensors kept them; what its own compressors made of some is in
tests/golden/sparse, by tests/peers/make_sparse.py.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import formats
from algorithms.pruning.magnitude import magnitude
from algorithms.pruning.pruned import pruned
from algorithms.tensors import QuantizedInput, SparseTensor, filled
from experiments.checkpoints import shards
from experiments.checkpoints.layouts.compressed_tensors import CompressedTensors
from tests.algorithms.integers import rtn

LAYOUT = CompressedTensors("bitmask")
GOLDEN = Path(__file__).parents[3] / "golden" / "sparse"
CODED = ("int8", "fp8")


def golden():
    """Of each case: its configuration, its arrays, its dense form."""
    said = json.loads((GOLDEN / "sparse.json").read_text())
    found = {name: (config, {}) for name, config in said.items()}
    for name, entry in shards.read_header(GOLDEN / "sparse.safetensors").items():
        case, _, field = name.partition("/")
        found[case][1][field] = entry.open()
    return {name: (config, its, its.pop("dense")) for name, (config, its) in found.items()}


CASES = golden()
PRUNED = {
    "layer": magnitude(sparsity=0.6),
    "rows": magnitude(sparsity=0.3, within="row", dtype="float32"),
    "2:4": magnitude(keep=2, block=4),
    "1:4": magnitude(keep=1, block=4, dtype="bfloat16"),
    "all": magnitude(sparsity=0.0, within="row"),
}


def weight(o=7, i=64):
    return jnp.asarray(np.random.default_rng(1).normal(size=(o, i)), jnp.float32)


def made(name):
    return PRUNED[name].compress(weight(), None)


def again(layout, tensor):
    scheme = json.loads(json.dumps(layout.scheme(tensor)))
    read = layout.parse(json.loads(json.dumps(layout.describe({"a.b": scheme}))), ["a.b"])
    assert read == {"a.b": scheme}
    return layout.decode(layout.encode(tensor), scheme)


@pytest.mark.parametrize("name", CASES)
def test_what_the_library_wrote_is_read(name):
    said, arrays, dense = CASES[name]
    tensor = LAYOUT.decode(arrays, LAYOUT.parse(said, ["m"])["m"])
    inner = tensor.weight if isinstance(tensor, QuantizedInput) else tensor
    np.testing.assert_array_equal(tensor.dequantize(), dense.astype(np.float32))
    assert bool(np.asarray(inner.alive()).sum() * 2 == dense.size) is (name != "any")
    if name in CODED:
        assert isinstance(tensor, QuantizedInput)
        return
    found = LAYOUT.encode(tensor)
    assert set(found) == set(arrays)
    for key, x in arrays.items():  # the very arrays
        np.testing.assert_array_equal(found[key], x, key)
        assert found[key].dtype == x.dtype and found[key].shape == x.shape, key
    config = LAYOUT.describe({"m": LAYOUT.scheme(tensor)})["sparsity_config"]
    assert config.items() <= said["sparsity_config"].items()


@pytest.mark.parametrize("name", PRUNED)
def test_it_comes_back_bit_for_bit(name):
    tensor, found = made(name), again(LAYOUT, made(name))
    np.testing.assert_array_equal(found.dequantize(), tensor.dequantize())
    assert name == "1:4" or jax.tree.structure(found) == jax.tree.structure(tensor)
    kept = LAYOUT.encode(tensor)["compressed"]
    assert kept.size == np.asarray(tensor.alive()).sum()


@pytest.mark.parametrize("name", PRUNED)
def test_without_being_asked_it_is_refused(name):
    with pytest.raises(ValueError, match="since its version 0.15; export=safetensors writes") as e:
        CompressedTensors().scheme(made(name))
    assert "\n" not in str(e.value)


FORMATS = {
    "symmetric": formats.integer(group_size=16, symmetric=True),
    "asymmetric": formats.integer(bits=3, group_size=16),
    "fp8": formats.fp8(rows=4, columns=32),
    "nvfp4": formats.nvfp4(),
    "nf4": formats.nf4(group_size=16),
}


@pytest.mark.parametrize("pruner", ["layer", "2:4"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.some(4)
def test_codes_get_those_of_zeros(name, pruner):
    method = rtn(bits=4)._replace(compress=lambda w, _: FORMATS[name].quantize(w + 0.3))
    tensor = pruned(PRUNED[pruner], method).compress(weight(), None)
    found = filled(tensor)
    found.validate()
    np.testing.assert_array_equal(found.dequantize(), tensor.dequantize())
    assert (np.asarray(found.dequantize()) == 0).sum() >= tensor.alive().size / 2
    assert jax.tree.structure(jax.eval_shape(filled, tensor)) == jax.tree.structure(found)
    if name != "nf4":
        np.testing.assert_array_equal(
            again(CompressedTensors(), found).dequantize(), tensor.dequantize()
        )


def test_zero_points_that_are_no_codes_leave_it_sparse():
    format = formats.integer(group_size=16, zero_dtype="float16")
    method = rtn(bits=4)._replace(compress=lambda w, _: format.quantize(w))
    tensor = pruned(PRUNED["layer"], method).compress(weight(), None)
    assert filled(tensor) is tensor
    with pytest.raises(ValueError, match="no place for weights without their zeros"):
        LAYOUT.scheme(tensor)


def test_layers_of_both_formats_are_refused():
    schemes = {"a": LAYOUT.scheme(made("layer")), "b": LAYOUT.scheme(made("2:4")), "c": None}
    with pytest.raises(ValueError, match="these are of both: prune all layers to 2:4, or none"):
        LAYOUT.describe(schemes)


def test_sparse_layers_beside_quantized_ones():
    four = CompressedTensors().scheme(FORMATS["symmetric"].quantize(weight()))
    schemes = {"a": LAYOUT.scheme(made("layer")), "b": four, "c": None}
    said = LAYOUT.describe(schemes)
    assert said["sparsity_config"]["targets"] == ["a"] and said["ignore"] == ["c"]
    said["config_groups"]["group_0"]["targets"] = ["b"]
    assert LAYOUT.parse(said, list(schemes)) == schemes


def damaged(name, **changes):
    arrays = {**LAYOUT.encode(made(name)), **changes}
    return LAYOUT.decode(arrays, LAYOUT.scheme(made(name)))


@pytest.mark.parametrize(
    "name, changes, clause",
    [
        ("layer", {"shape": np.array([7, 64, 1])}, "is not that of a matrix"),
        ("layer", {"shape": np.array([7, 65])}, "not a bit for each of .7, 65."),
        ("layer", {"shape": np.array([-7, 64])}, "is not that of a matrix"),
        ("layer", {"compressed": np.zeros(3, np.float16)}, "3 entries where bitmask has 180"),
        ("layer", {"compressed": np.zeros(180, np.int8)}, "compressed is int8 where a float"),
        ("layer", {"compressed": np.full(180, np.nan, np.float16)}, "NaN or infinity"),
        ("layer", {"row_offsets": np.arange(7)}, "not where the rows of bitmask begin"),
        ("layer", {"row_offsets": np.arange(6)}, "not where the rows of bitmask begin"),
        ("2:4", {"bitmask": np.full((7, 8), 15, np.uint8)}, "not 2 of each 4"),
        ("2:4", {"bitmask": np.zeros((7, 8), np.int8)}, "bitmask is int8 where uint8"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(name, changes, clause):
    with pytest.raises(ValueError, match=clause):
        damaged(name, **changes)


def test_a_setting_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="sparse='24' must be bitmask, or null for none"):
        CompressedTensors("24")


def test_bits_beyond_the_last_column_are_not_looked_at():
    tensor = SparseTensor.of(weight(3, 21), weight(3, 21) > 0, int((weight(3, 21) > 0).sum()))
    arrays = dict(LAYOUT.encode(tensor))
    arrays["bitmask"] = arrays["bitmask"] | np.array([0, 0, 0xE0], np.uint8)
    found = LAYOUT.decode(arrays, LAYOUT.scheme(tensor))
    np.testing.assert_array_equal(found.mask, tensor.mask)
