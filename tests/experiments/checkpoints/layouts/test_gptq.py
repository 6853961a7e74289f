"""GPTQ's layout: round trips, the official unpacking's numbers, and what is refused."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import formats
from algorithms.tensors import DenseTensor
from experiments.checkpoints.layouts.gptq import GPTQ
from tests.experiments.checkpoints.layouts.grid_cases import assert_same, random_grid

GOLDEN = Path(__file__).parents[3] / "golden" / "layouts" / "gptq.npz"
SHAPES = [(32, 64, 32), (64, 96, 96), (32, 64, 16)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("o", "i", "group"), SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.some(6)
def test_round_trip(bits, o, i, group, symmetric):
    layout = GPTQ("gptq_v2" if i == 96 else None)
    tensor = random_grid(o, i, bits=bits, group=group, symmetric=symmetric)
    scheme, arrays = layout.scheme(tensor), layout.encode(tensor)
    assert arrays["qweight"].shape == (i * bits // 32, o)
    assert arrays["qzeros"].shape == (i // group, o * bits // 32)
    assert arrays["scales"].shape == (i // group, o) and arrays["scales"].dtype == np.float16
    assert_same(layout.decode(arrays, json.loads(json.dumps(scheme))), tensor)
    parsed = layout.parse(layout.describe({"a.b": scheme, "a.c": None}), ["a.b", "a.c"])
    assert parsed["a.c"] is None
    assert_same(layout.decode(arrays, parsed["a.b"]), tensor)


@pytest.mark.parametrize(("bits", "o", "i"), [(2, 16, 16), (4, 8, 24), (8, 4, 12), (8, 12, 20)])
def test_rows_that_fill_words_but_not_bytes_of_ours(bits, o, i):
    """Our packing pads a row to 8 codes; a file's words end with the row."""
    tensor = random_grid(o, i, bits=bits, group=i, symmetric=False)
    arrays = GPTQ().encode(tensor)
    assert_same(GPTQ().decode(arrays, GPTQ().scheme(tensor)), tensor)


def test_the_form_alone_decides():
    shapes = jax.eval_shape(
        formats.integer(group_size=32, symmetric=True).quantize, jnp.zeros((32, 64))
    )
    assert GPTQ().scheme(shapes) == {
        "bits": 4, "group_size": 32, "whole_rows": False, "sym": True, "checkpoint_format": "gptq",
    }  # fmt: skip


def test_the_older_convention_keeps_zero_points_less_one():
    tensor = random_grid(32, 64, bits=4, group=32, symmetric=True)
    v1, v2 = (GPTQ(f).encode(tensor)["qzeros"].view(np.uint8) for f in ("gptq", "gptq_v2"))
    assert (v1 == 0x77).all() and (v2 == 0x88).all()


def test_the_older_convention_of_others_is_read_with_real_zero_points():
    tensor = random_grid(32, 64, bits=4, group=32, symmetric=False, low=1)
    arrays = GPTQ().encode(tensor)
    arrays = {**arrays, "qzeros": arrays["qzeros"] - np.int32(0x11111111)}
    scheme = {"bits": 4, "group_size": 32, "checkpoint_format": "gptq"}
    assert_same(GPTQ().decode(arrays, scheme), tensor)
    wrapped = arrays | {"qzeros": np.full_like(arrays["qzeros"], -1)}
    with pytest.raises(ValueError, match="zero point 15 .* take for 0 or for 16: convert"):
        GPTQ().decode(wrapped, scheme)


@pytest.mark.parametrize(("run", "block"), [(1, 1), (8, 8), (32, 32)])
def test_activation_order_is_read_exactly(run, block):
    tensor = random_grid(32, 128, bits=4, group=32, symmetric=False)
    arrays = dict(GPTQ().encode(tensor))
    rng = np.random.default_rng(0)
    index = np.repeat(rng.permutation(np.repeat(np.arange(4), 32 // run)), run).astype(np.int32)
    arrays["g_idx"] = index
    found = GPTQ().decode(arrays, GPTQ().scheme(tensor))
    codes, scale, zero = (
        np.asarray(x, np.float32) for x in (tensor.codes(), tensor.scale, tensor.zero)
    )
    expected = (codes - zero[:, index]) * scale[:, index]
    np.testing.assert_array_equal(found.dequantize(), expected)
    x = np.random.default_rng(1).normal(size=(3, 128)).astype(np.float32)
    np.testing.assert_allclose(found.matmul(jnp.asarray(x)), x @ expected.T, rtol=1e-4, atol=1e-4)
    assert found.block[1] >= block


def test_groups_that_do_not_divide_a_row_are_read():
    """GPTQModel cuts the last group off; we do not write such layers."""
    tensor = random_grid(32, 96, bits=4, group=32, symmetric=True)
    arrays = dict(GPTQ().encode(tensor))
    for name in ("qzeros", "scales"):
        arrays[name] = arrays[name][:2]
    arrays["g_idx"] = np.arange(96, dtype=np.int32) // 64
    found = GPTQ().decode(arrays, {"bits": 4, "group_size": 64, "checkpoint_format": "gptq"})
    codes, scale = np.asarray(tensor.codes(), np.float32), arrays["scales"].T.astype(np.float32)
    np.testing.assert_array_equal(found.dequantize(), (codes - 8) * scale[:, np.arange(96) // 64])


def check_golden(path):
    """What GPTQModel packed: read as its own unpacking reads it, and packed again bit for bit."""
    with np.load(path) as golden:
        cases = sorted({name.split("/")[0] for name in golden.files})
        assert len(cases) == 12
        for case in cases:
            arrays = {n: golden[f"{case}/{n}"] for n in ("qweight", "qzeros", "scales", "g_idx")}
            bits, group, version = (int(x) for x in golden[f"{case}/setting"])
            stored = ("gptq", "gptq_v2")[version - 1]
            scheme = {"bits": bits, "group_size": group, "checkpoint_format": stored}
            found = GPTQ().decode(arrays, scheme)
            dense = np.asarray(found.dequantize())
            np.testing.assert_array_equal(dense, golden[f"{case}/float32"].T)
            np.testing.assert_array_equal(dense.astype(np.float16), golden[f"{case}/float16"].T)
            if "order" in case or "old" in case:
                continue  # not written by us
            for name, array in GPTQ(stored).encode(found).items():
                np.testing.assert_array_equal(array, arrays[name], err_msg=f"{case} {name}")


def test_the_official_unpacking_gives_our_numbers():
    check_golden(GOLDEN)


def test_a_mixed_model():
    layout = GPTQ("gptq_v2")
    tensors = {
        "model.layers.0.mlp.up_proj": random_grid(32, 64, bits=4, group=32, symmetric=True),
        "model.layers.0.mlp.down_proj": random_grid(32, 64, bits=4, group=32, symmetric=True),
        "model.layers.1.mlp.up_proj": random_grid(32, 64, bits=8, group=32, symmetric=True),
        "model.layers.1.mlp.down_proj": random_grid(32, 64, bits=4, group=16, symmetric=False),
        "model.layers.1.mlp.gate_proj": random_grid(32, 32, bits=4, group=32, symmetric=True),
        "model.layers.10.mlp.up_proj": random_grid(32, 96, bits=4, group=96, symmetric=True),
    }
    schemes = {name: layout.scheme(t) for name, t in tensors.items()}
    schemes |= {"lm_head": None, "model.layers.1.mlp": None}
    described = json.loads(json.dumps(layout.describe(schemes)))
    assert described["dynamic"] == {
        r"+:^model\.layers\.1\.mlp\.up_proj$": {"bits": 8, "group_size": 32, "sym": True},
        r"+:^model\.layers\.1\.mlp\.down_proj$": {"bits": 4, "group_size": 16, "sym": False},
        r"+:^model\.layers\.10\.mlp\.up_proj$": {"bits": 4, "group_size": -1, "sym": True},
        r"-:^model\.layers\.1\.mlp$": {},
    }
    assert (described["bits"], described["group_size"], described["lm_head"]) == (4, 32, False)
    parsed = layout.parse(described, schemes)
    for name, scheme in schemes.items():
        if scheme is None:
            assert parsed[name] is None
        else:
            assert_same(layout.decode(layout.encode(tensors[name]), parsed[name]), tensors[name])


def test_whole_rows_of_different_widths_are_one_setting():
    wide = [random_grid(32, n, bits=4, group=n, symmetric=True) for n in (64, 96)]
    described = GPTQ().describe({f"l{t.columns}": GPTQ().scheme(t) for t in wide})
    assert described["group_size"] == -1 and "dynamic" not in described


def test_settings_of_others():
    base = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": True}
    assert GPTQ().parse(base, ["m.l", "lm_head"]) == {
        "m.l": {"bits": 4, "group_size": 128, "sym": True, "checkpoint_format": "gptq"},
        "lm_head": None,
    }
    some = base | {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]}
    parsed = GPTQ().parse(some, ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"])
    assert [s is None for s in parsed.values()] == [False, True]
    ordered = base | {
        "dynamic": {r".*(?:up|down).*": {"bits": 8}, r"-:.*layers\.1\..*": {}}, "lm_head": True,
    }  # fmt: skip
    parsed = GPTQ().parse(ordered, ["layers.0.up", "layers.1.up", "lm_head"])
    assert [s and s["bits"] for s in parsed.values()] == [8, None, 4]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"checkpoint_format": "marlin"}, "checkpoint_format='marlin' is not read"),
        ({"quant_method": "awq"}, "quant_method='awq'"),
        ({"pack_dtype": "int64"}, "pack_dtype='int64'"),
        ({"rotation": "hadamard"}, "rotation='hadamard' is not read"),
        ({"bits": 5}, "l has bits=5 and group_size=128"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": None}, "group_size=None"),
        ({"dynamic": {"(": {}}}, "'\\(' of .* is no pattern"),
        ({"dynamic": {"(a+)+$": {}}}, "is no pattern that is read: it repeats too much"),
        ({"dynamic": {".*.*.*.*.*x": {}}}, "it repeats too much"),
        ({"modules_in_block_to_quantize": 5}, "modules_in_block_to_quantize=5 .* is no list"),
        ({"dynamic": ["a"]}, "`dynamic` .* is no table of patterns"),
        ({"dynamic": {"a": 4}}, "`dynamic` .* is no table of patterns"),
    ],
)
def test_settings_that_are_not_read(changes, sentence):
    base = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
    with pytest.raises(ValueError, match=sentence):
        GPTQ().parse(base | changes, ["l"])


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        (dict(bits=5), "cannot hold codes of 5 bits: it holds integers of 2, 3, 4 or 8 bits"),
        (dict(scale_dtype=np.float32), "cannot hold scales of float32"),
        (dict(o=30), "output dimensions of 30 with codes of 4 bits"),
        (dict(i=36, group=36), "input dimensions of 36"),
        (dict(group=8), "groups of 8 of 64 columns: its loaders run groups of 16, 32"),
    ],
)
def test_tensors_that_have_no_place(case, sentence):
    case = dict(o=32, i=64, bits=4, group=32, symmetric=False) | case
    with pytest.raises(ValueError, match=sentence):
        GPTQ().scheme(random_grid(case.pop("o"), case.pop("i"), **case))


def test_other_forms_have_no_place():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(32, 64)), jnp.float32)
    float_zero = formats.integer(zero_dtype="float16", group_size=32).quantize(w)
    block = formats.Format(element=float_zero.element, columns=32, rows=2)
    for tensor, sentence in (
        (DenseTensor(w), "cannot hold a DenseTensor"),
        (formats.fp8().quantize(w), "elements that are no integers, SmallFloat.name='e4m3'"),
        (formats.nvfp4().quantize(w), "elements that are no integers"),
        (float_zero, "zero points of float16, which are no whole numbers"),
        (dataclasses.replace(block, rows=2).quantize(w), "scales that 2 rows share"),
    ):
        with pytest.raises(ValueError, match=sentence):
            GPTQ().encode(tensor)


def test_an_asymmetric_grid_in_the_older_convention():
    tensor = random_grid(32, 64, bits=4, group=32, symmetric=False)
    with pytest.raises(ValueError, match="has no room for a zero point of 0.*choose gptq_v2"):
        GPTQ("gptq").encode(tensor)
    with pytest.raises(ValueError, match="checkpoint_format='v3' must be gptq or gptq_v2"):
        GPTQ("v3")


def test_mixtures_that_have_no_place():
    schemes = {
        str(s): GPTQ().scheme(random_grid(32, 64, bits=4, group=32, symmetric=s))
        for s in (True, False)
    }
    with pytest.raises(ValueError, match="set checkpoint_format=gptq_v2, which holds both"):
        GPTQ().describe(schemes)
    with pytest.raises(ValueError, match="No layer is compressed"):
        GPTQ().describe({"a": None})


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("qweight", lambda x: x[:4], "qweight .4, 32., qzeros .* are not those of bits=4"),
        ("qweight", lambda x: x.astype(np.int64), "qweight is int64, not int32"),
        ("qweight", lambda x: x[:0], "are not those"),
        ("qzeros", lambda x: x[0], "qzeros is missing or no matrix"),
        ("scales", lambda x: x.astype(np.int16), "scales are int16, not float16"),
        ("scales", lambda x: x[:, :-1], "are not those"),
        ("g_idx", lambda x: x + 1, "g_idx does not name one of 2 groups for 64 inputs"),
        ("g_idx", lambda x: x[:-1], "g_idx does not name"),
    ],
)
def test_arrays_that_do_not_fit(name, change, sentence):
    tensor = random_grid(32, 64, bits=4, group=32, symmetric=True)
    arrays = dict(GPTQ().encode(tensor))
    arrays[name] = change(arrays[name])
    with pytest.raises(ValueError, match=sentence):
        GPTQ().decode(arrays, GPTQ().scheme(tensor))
