"""AWQ's layout: round trips, the official unpacking's numbers, and what is refused."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.tensors import DenseTensor
from experiments.checkpoints.layouts.awq import AWQ
from tests.experiments.checkpoints.layouts.grid_cases import assert_same, random_grid

GOLDEN = Path(__file__).parents[3] / "golden" / "layouts" / "awq.npz"


@pytest.mark.parametrize(
    ("o", "i", "group"), [(32, 64, 32), (8, 96, 96), (24, 128, 16), (16, 12, 12), (40, 128, 64)]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_round_trip(o, i, group, symmetric):
    tensor = random_grid(o, i, bits=4, group=group, symmetric=symmetric)
    scheme, arrays = AWQ().scheme(tensor), AWQ().encode(tensor)
    assert arrays["qweight"].shape == (i, o // 8)
    assert arrays["qzeros"].shape == (i // group, o // 8)
    assert arrays["scales"].shape == (i // group, o) and arrays["scales"].dtype == np.float16
    assert_same(AWQ().decode(arrays, json.loads(json.dumps(scheme))), tensor)
    described = json.loads(json.dumps(AWQ().describe({"a.b": scheme, "a.c": None})))
    assert described["modules_to_not_convert"] == ["a.c"]
    parsed = AWQ().parse(described, ["a.b", "a.c"])
    assert parsed["a.c"] is None
    assert_same(AWQ().decode(arrays, parsed["a.b"]), tensor)


def test_the_order_in_a_word():
    """Outputs 0 to 7 of one input: from the lowest bits 0, 2, 4, 6, 1, 3, 5, 7."""
    tensor = random_grid(8, 1, bits=4, group=1, symmetric=True)
    codes = np.asarray(tensor.codes())[:, 0]
    word = sum(int(codes[k]) << 4 * place for place, k in enumerate([0, 2, 4, 6, 1, 3, 5, 7]))
    assert AWQ().encode(tensor)["qweight"].view(np.uint32)[0, 0] == word


def check_golden(path):
    """What AutoAWQ packed: read as its own unpacking reads it, and packed again bit for bit."""
    with np.load(path) as golden:
        cases = sorted({name.split("/")[0] for name in golden.files})
        assert len(cases) == 4
        for case in cases:
            arrays = {n: golden[f"{case}/{n}"] for n in ("qweight", "qzeros", "scales")}
            scheme = {"bits": 4, "group_size": int(golden[f"{case}/setting"])}
            found = AWQ().decode(arrays, scheme)
            dense = np.asarray(found.dequantize())
            np.testing.assert_array_equal(dense, golden[f"{case}/float32"].T)
            np.testing.assert_array_equal(dense.astype(np.float16), golden[f"{case}/float16"].T)
            for name, array in AWQ().encode(found).items():
                np.testing.assert_array_equal(array, arrays[name], err_msg=f"{case} {name}")


def test_the_official_unpacking_gives_our_numbers():
    check_golden(GOLDEN)


def test_symmetric_and_asymmetric_layers_share_a_model():
    pair = [random_grid(16, 64, bits=4, group=32, symmetric=s) for s in (True, False)]
    described = AWQ().describe({str(k): AWQ().scheme(t) for k, t in enumerate(pair)})
    assert described["zero_point"] and described["modules_to_not_convert"] is None
    whole = [random_grid(16, n, bits=4, group=n, symmetric=True) for n in (64, 96)]
    schemes = {str(t.columns): AWQ().scheme(t) for t in whole}
    assert AWQ().describe(schemes)["group_size"] == -1
    schemes = {"a": AWQ().scheme(whole[0]), "b": AWQ().scheme(pair[0])}
    with pytest.raises(ValueError, match="a has groups of 64 columns and other layers of 32"):
        AWQ().describe(schemes)


def test_names_are_excluded_by_their_parts():
    described = {"bits": 4, "group_size": 64, "version": "GEMM", "modules_to_not_convert": ["mlp"]}
    parsed = AWQ().parse(described, ["l.0.mlp.up", "l.0.q", "lm_head"])
    assert parsed == {"l.0.mlp.up": None, "l.0.q": {"bits": 4, "group_size": 64}, "lm_head": None}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"version": "gemv"}, "version='gemv'"),
        ({"bits": 8}, "bits=8"),
        ({"group_size": "32"}, "group_size='32' is not read"),
        ({"group_size": 0}, "group_size=0"),
        ({"quant_method": "gptq"}, "is not read"),
        ({"modules_to_not_convert": "mlp"}, "modules_to_not_convert='mlp' .* is no list"),
    ],
)
def test_settings_that_are_not_read(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        AWQ().parse({"quant_method": "awq", "bits": 4, "group_size": 32} | changes, ["l"])


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        (dict(bits=3), "The AWQ layout cannot hold codes of 3 bits: it holds integers of 4 bits"),
        (dict(scale_dtype=jnp.bfloat16), "cannot hold scales of bfloat16"),
        (dict(o=20), "cannot hold 20 outputs, for eight share a word"),
        (dict(group=8), "groups of 8 of 64 columns: its loaders run groups of 16, 32, 64, 128"),
    ],
)
def test_tensors_that_have_no_place(case, sentence):
    case = dict(o=32, i=64, bits=4, group=32, symmetric=False) | case
    with pytest.raises(ValueError, match=sentence):
        AWQ().scheme(random_grid(case.pop("o"), case.pop("i"), **case))


def test_models_that_have_no_place():
    with pytest.raises(ValueError, match="cannot hold a DenseTensor"):
        AWQ().encode(DenseTensor(jnp.zeros((8, 8))))
    scheme = AWQ().scheme(random_grid(16, 64, bits=4, group=32, symmetric=True))
    with pytest.raises(ValueError, match="keep lm_head dense"):
        AWQ().describe({"lm_head": scheme})
    with pytest.raises(ValueError, match="No layer is compressed"):
        AWQ().describe({"lm_head": None})


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("qweight", lambda x: x[:-1, :-1], "are not those of group_size=32"),
        ("qweight", lambda x: x.astype(np.int64), "qweight is int64, not int32"),
        ("qweight", lambda x: x[:0], "are not those"),
        ("qzeros", lambda x: x[:, :-1], "are not those"),
        ("scales", lambda x: x[0], "scales is missing or no matrix"),
        ("scales", lambda x: x.astype(np.int32), "scales are int32, not float16"),
    ],
)
def test_arrays_that_do_not_fit(name, change, sentence):
    tensor = random_grid(32, 64, bits=4, group=32, symmetric=True)
    arrays = dict(AWQ().encode(tensor))
    arrays[name] = change(arrays[name])
    with pytest.raises(ValueError, match=sentence):
        AWQ().decode(arrays, AWQ().scheme(tensor))
