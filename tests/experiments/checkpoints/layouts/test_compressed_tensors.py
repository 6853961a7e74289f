"""What a layer becomes in compressed-tensors and back; what the library itself made of it is in
tests/golden/exports, by tests/peers/make_exports.py.
"""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from algorithms import formats
from algorithms.activations import quantized_inputs
from algorithms.elements import Integer, SmallFloat
from algorithms.formats import Format
from algorithms.tensors import (
    DenseTensor,
    QuantizedInput,
    QuantizedTensor,
    RotatedTensor,
    SumTensor,
)
from experiments.checkpoints.layouts.compressed_tensors import CompressedTensors
from tests.algorithms.integers import rtn

LAYOUT = CompressedTensors()
TENSOR = Format(
    element=Integer(bits=8, symmetric=True), rows=None, columns=None, scale_dtype="float32"
)
UNEVEN = Format(element=Integer(bits=8), rows=None, columns=None, scale_dtype="float32")
TOKEN = formats.integer(bits=8, group_size=None, symmetric=True, scale_dtype="float32")
SMALL = {
    "fp8_tensor": formats.fp8(rows=None),
    "fp8_channel": formats.fp8(),
    "fp8_channel_bf16": formats.fp8(scale_dtype="bfloat16"),
    "fp8_block": formats.fp8(rows=128, columns=128),
    "fp8_group": formats.fp8(columns=32, scale_dtype="float16"),
    "nvfp4": formats.nvfp4(),
    "mxfp4": formats.microscaling(),
    "mxfp8": formats.microscaling(element="e4m3"),
}
INPUTS = {
    "int8_token": (TOKEN, True),
    "int4_token_uneven": (formats.integer(bits=4, group_size=None, scale_dtype="float32"), True),
    "int8_tensor_dynamic": (TENSOR, True),
    "int8_tensor": (TENSOR, False),
    "int8_tensor_uneven": (UNEVEN, False),
    "fp8_token": (formats.fp8(), True),
    "fp8_tensor": (formats.fp8(rows=None), False),
    "fp8_group": (formats.fp8(columns=32), True),
    "mxfp8": (formats.microscaling(element="e4m3"), True),
    "mxfp4": (formats.microscaling(), True),
    "nvfp4": (formats.nvfp4(), "local"),
}


def weight(o=7, i=64, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(o, i)) * np.exp(rng.normal(size=(o, 1)))
    w[o // 2] = 0  # a row of zeros
    return jnp.asarray(w + 0.1 * (np.arange(o) % 2)[:, None], jnp.float32)


def again(tensor):
    """Through the arrays of a file, and JSON."""
    scheme = json.loads(json.dumps(LAYOUT.scheme(tensor)))
    arrays = LAYOUT.encode(tensor)
    assert all(isinstance(x, np.ndarray) and x.flags.c_contiguous for x in arrays.values())
    read = LAYOUT.parse(json.loads(json.dumps(LAYOUT.describe({"a.b": scheme}))), ["a.b"])
    assert read == {"a.b": scheme}
    return LAYOUT.decode(arrays, read["a.b"])


def assert_equal(found, expected):
    """Fields, types and the dense form, bit for bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(
            np.asarray(a).reshape(-1).view(np.uint8), np.asarray(b).reshape(-1).view(np.uint8)
        )
    np.testing.assert_array_equal(found.dequantize(), expected.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "shape, group, bits",
    [((33, 70), 14, bits) for bits in range(2, 9)]
    + [((7, 64), 16, 4), ((5, 36), 12, 3), ((1, 33), None, 5), ((6, 50), None, 8), ((4, 1), 1, 3)],
)
@pytest.mark.some(6)
def test_integers_come_back_bit_for_bit(shape, group, bits, symmetric):
    """Widths that fill int32 words, and widths that do not."""
    tensor = formats.integer(bits=bits, group_size=group, symmetric=symmetric).quantize(
        weight(*shape)
    )
    assert LAYOUT.scheme(tensor)["format"] == "pack-quantized"
    assert_equal(again(tensor), tensor)


@pytest.mark.parametrize("scale", ["float16", "bfloat16", "float32", None])
def test_scales_keep_their_type(scale):
    tensor = formats.integer(group_size=16, scale_dtype=scale).quantize(weight())
    assert_equal(again(tensor), tensor)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows, columns", [(None, None), (4, 16), (None, 16)])
def test_integers_of_tensors_and_blocks_come_back(rows, columns, symmetric):
    element = Integer(bits=4, symmetric=symmetric)
    tensor = Format(element=element, rows=rows, columns=columns).quantize(weight())
    assert_equal(again(tensor), tensor)


@pytest.mark.parametrize("shape", [(7, 64), (130, 192)])
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.some(4)
def test_small_floats_come_back_bit_for_bit(name, shape):
    tensor = SMALL[name].quantize(weight(*shape))
    assert_equal(again(tensor), tensor)


def test_cut_off_blocks_are_those_that_other_layers_have():
    """So that all layers of a model share one scheme."""
    found = [LAYOUT.scheme(SMALL["fp8_block"].quantize(weight(*s))) for s in ((160, 64), (64, 192))]
    assert found[0] == found[1]
    assert found[0]["weights"]["block_structure"] == [128, 128]


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.some(3)
def test_rounded_inputs_come_back(name, bits=4):
    format, dynamic = INPUTS[name]
    x = jnp.asarray(np.random.default_rng(3).normal(size=(40, 64)) + 0.3, jnp.float32)
    method = quantized_inputs(format=format, dynamic=dynamic)(rtn(bits=bits, group_size=32))
    stats = None if dynamic is True else method.observe(method.init(64), x)
    tensor = method.compress(weight(), stats)
    found = again(tensor)
    assert isinstance(found, QuantizedInput)
    assert_equal(found, tensor)
    np.testing.assert_array_equal(found.rounded(2 * x), tensor.rounded(2 * x))
    assert np.abs(found.rounded(x) - x).max() > 1e-3
    assert LAYOUT.scheme(tensor)["format"] == "int-quantized"


def test_a_scheme_follows_from_shapes_alone():
    for format in (formats.integer(bits=3, group_size=16), *SMALL.values()):
        shapes = jax.eval_shape(format.quantize, weight())
        assert LAYOUT.scheme(shapes) == LAYOUT.scheme(format.quantize(weight()))


SYMMETRIC = formats.integer(group_size=16, symmetric=True).quantize(weight())
UNEVENLY = formats.integer(group_size=16).quantize(weight())


def rotated(tensor):
    return RotatedTensor.from_signs(tensor, jnp.ones(64, jnp.int8))


@pytest.mark.parametrize(
    "tensor, sentence",
    [
        (SumTensor(SYMMETRIC, SYMMETRIC), "no place for a low-rank sum.*correction=none"),
        (rotated(SYMMETRIC), "no place for a rotation while the model runs.*rotation.online"),
        (formats.integer(zero_dtype="float16").quantize(weight()), "zero_dtype=uint8"),
        (formats.nf4(group_size=16).quantize(weight()), "no NormalFloat"),
        (formats.fp8(element="e5m2").quantize(weight()), "no e5m2"),
        (formats.microscaling(element="e3m2").quantize(weight()), "no e3m2"),
        (formats.microscaling(group_size=16).quantize(weight()), r"for \(1, 16\) weights"),
        (formats.nvfp4(group_size=32).quantize(weight()), "NVFP4 in groups of 16"),
        (QuantizedInput(DenseTensor(weight()), None, None, None, TOKEN), "that is not quantized"),
        (QuantizedInput(SYMMETRIC, None, None, None, formats.nvfp4()), "activations=nvfp4_static"),
        (QuantizedInput(SYMMETRIC, None, None, None, formats.nf4()), "no inputs of NormalFloat"),
        (
            QuantizedInput(SYMMETRIC, None, None, None, formats.integer(group_size=16)),
            "does not round an input's scale to float16",
        ),
        (
            QuantizedInput(
                SYMMETRIC, None, None, None,
                formats.integer(group_size=16, scale_dtype=None, search="weights"),
            ),
            "search=null",
        ),
        (
            QuantizedInput(
                SYMMETRIC, None, None, None,
                Format(element=Integer(bits=8), rows=4, columns=None, scale_dtype=None),
            ),
            "no scale for 4 tokens",
        ),
    ],
)  # fmt: skip
def test_what_has_no_place_is_refused(tensor, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        LAYOUT.scheme(tensor)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_zero_points_that_do_not_fit_are_refused():
    bad = QuantizedTensor.from_codes(
        UNEVENLY.codes(), UNEVENLY.scale, UNEVENLY.element, zero=UNEVENLY.zero + 16
    )
    with pytest.raises(ValueError, match="do not fit 4 bits"):
        LAYOUT.encode(bad)


def damaged(tensor, **changes):
    arrays = {**LAYOUT.encode(tensor), **changes}
    arrays = {name: x for name, x in arrays.items() if x is not None}
    return LAYOUT.decode(arrays, LAYOUT.scheme(tensor))


@pytest.mark.parametrize(
    "tensor, changes, clause",
    [
        (SYMMETRIC, {"weight_packed": None}, "weight_packed is missing"),
        (SYMMETRIC, {"weight_shape": np.array([7, 96])}, "takes? .7, 12."),
        (SYMMETRIC, {"weight_packed": np.zeros((7, 8), np.int64)}, "int64 where int32"),
        (SYMMETRIC, {"weight_scale": np.ones((7, 5), np.float16)}, "shape .7, 5. where .7, 4."),
        (SYMMETRIC, {"weight_scale": np.full((7, 4), np.nan, np.float16)}, "NaN or infinity"),
        (SYMMETRIC, {"weight_scale": np.ones((7, 4), np.int8)}, "weight_scale is int8"),
        (SYMMETRIC, {"weight_zero_point": np.ones((7, 4), np.int8)}, "not zero though"),
        (UNEVENLY, {"weight_zero_point": None}, "weight_zero_point is missing"),
        (UNEVENLY, {"weight_zero_point": np.zeros((4, 1), np.int32)}, "weight_zero_point has sh"),
        (SMALL["nvfp4"].quantize(weight()), {"weight_global_scale": None}, "global_scale is miss"),
        (
            SMALL["nvfp4"].quantize(weight()),
            {"weight_global_scale": np.array([np.inf], np.float32)},
            "not one finite number",
        ),
        (
            SMALL["fp8_channel"].quantize(weight()),
            {"weight": np.full((7, 64), np.nan, ml_dtypes.float8_e4m3fn)},
            "weight holds NaN",
        ),
        (SMALL["mxfp4"].quantize(weight()), {"weight_scale": np.full((7, 2), 255, np.uint8)}, "Na"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(tensor, changes, clause):
    with pytest.raises(ValueError, match=clause):
        damaged(tensor, **changes)


def test_zero_points_of_a_symmetric_grid_may_be_there():
    assert_equal(damaged(SYMMETRIC, weight_zero_point=np.zeros((7, 4), np.int8)), SYMMETRIC)


@pytest.mark.parametrize("run", [1, 4, 16])
def test_groups_named_column_by_column_are_read_exactly(run):
    """As older files have them: column j of the weight is in group weight_g_idx[j]."""
    order = np.random.default_rng(5).permutation(np.repeat(np.arange(4), 16 // run))
    group = np.repeat(order, run)
    arrays = dict(LAYOUT.encode(UNEVENLY)) | {"weight_g_idx": group.astype(np.int32)}
    args = dict(LAYOUT.scheme(UNEVENLY)["weights"])
    description = LAYOUT.describe({"a": LAYOUT.scheme(UNEVENLY)})
    description["config_groups"]["group_0"]["weights"] = args | {"actorder": "group"}
    found = LAYOUT.decode(arrays, LAYOUT.parse(description, ["a"])["a"])
    codes, scale = np.asarray(UNEVENLY.codes(), np.float32), np.asarray(UNEVENLY.scale, np.float32)
    expected = (codes - np.asarray(UNEVENLY.zero, np.float32)[:, group]) * scale[:, group]
    np.testing.assert_array_equal(found.dequantize(), expected)
    assert found.block == (1, run)
    arrays["weight_g_idx"] = arrays["weight_g_idx"] + 1
    with pytest.raises(ValueError, match="does not name one of 4 groups"):
        LAYOUT.decode(arrays, LAYOUT.parse(description, ["a"])["a"])


NAMES = ["l.0.q", "l.0.k", "l.1.q", "l.1.k", "lm_head", "m.embed_tokens"]
FOUR, EIGHT = LAYOUT.scheme(SYMMETRIC), LAYOUT.scheme(SMALL["fp8_channel"].quantize(weight()))


def test_one_scheme_is_for_every_linear_layer_but_those_left_out():
    schemes = dict.fromkeys(NAMES, FOUR) | {"lm_head": None, "m.embed_tokens": None}
    said = LAYOUT.describe(schemes)
    assert said["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert said["ignore"] == ["lm_head"] and said["format"] == "pack-quantized"
    assert LAYOUT.parse(said, NAMES) == schemes


def test_several_schemes_name_their_layers():
    schemes = dict(zip(NAMES, [FOUR, EIGHT, FOUR, None, EIGHT, EIGHT], strict=True))
    said = LAYOUT.describe(schemes)
    assert said["format"] == "mixed-precision"
    assert said["config_groups"]["group_1"]["targets"] == ["l.0.k", "lm_head", "m.embed_tokens"]
    assert LAYOUT.parse(said, NAMES) == schemes


def test_a_compressed_embedding_is_named():
    schemes = dict.fromkeys(NAMES, FOUR)
    said = LAYOUT.describe(schemes)
    assert said["config_groups"]["group_0"]["targets"] == ["Linear", "m.embed_tokens"]
    assert LAYOUT.parse(said, NAMES) == schemes


def test_a_name_goes_before_a_pattern_and_that_before_a_class():
    said = LAYOUT.describe(dict.fromkeys(NAMES, FOUR))
    group = said["config_groups"]["group_0"]
    said["config_groups"] = {
        "class": group | {"targets": ["Linear"]},
        "pattern": {**EIGHT, "targets": [r"re:l\.\d\.q"]},
        "name": group | {"targets": ["l.1.q"]},
    }
    said["ignore"] = ["re:lm_"]
    found = LAYOUT.parse(said, [*NAMES, "x.l.0.q"])
    assert found["l.0.q"] == EIGHT and found["l.1.q"] == FOUR and found["l.1.k"] == FOUR
    assert found["lm_head"] is None and found["m.embed_tokens"] is None
    assert found["x.l.0.q"] == FOUR  # patterns hold from the name's beginning


@pytest.mark.parametrize(
    "changes, clause",
    [
        ({"config_groups": {"W4A16": ["Linear"]}}, "not schemes written out"),
        ({"config_groups": None}, "not schemes written out"),
        ({"quantization_status": "frozen"}, "frozen rather than compressed"),
        ({"kv_cache_scheme": {"num_bits": 8, "dynamic": True}}, "by other scales"),
        ({"kv_cache_scheme": {"num_bits": 4}}, "by other scales"),
        ({"transform_config": {"config_groups": {}}}, "turns activations"),
        ({"sparsity_config": {"format": "sparse-4-8"}}, "stored sparse .sparse-4-8."),
        ({"format": "marlin-24", "drop": "format"}, "format marlin-24 is not read"),
        ({"group": {"weights": None}}, "whose weights are dense"),
        ({"group": {"output_activations": {}}}, "rounds outputs"),
        ({"group": {"weights": {"num_bits": 16, "type": "float"}}}, "float of 16 bits"),
        ({"group": {"weights": {"strategy": "block", "block_structure": [1]}}}, "not two numbers"),
        ({"group": {"targets": ["re:(a+)+$"]}}, "no pattern that is read: it repeats too much"),
        ({"ignore": ["re:("]}, "no pattern that is read"),
    ],
)
def test_what_is_not_read_is_refused(changes, clause):
    said = LAYOUT.describe({"a": FOUR})
    group = said["config_groups"]["group_0"]
    group.update(changes.get("group", {}))
    if changes.get("drop"):
        del group["format"]
    said |= {k: v for k, v in changes.items() if k not in ("group", "drop")}
    with pytest.raises(ValueError, match=clause):
        LAYOUT.parse(said, ["a"])


def test_a_small_float_is_named_by_what_it_is():
    odd = Format(element=SmallFloat(name="e2m1"), columns=16, scale_dtype="float16")
    with pytest.raises(ValueError, match="no e2m1 with scales of float16"):
        LAYOUT.scheme(odd.quantize(weight()))
