"""Files of tensors that we write are those that the safetensors library writes."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors

from experiments.checkpoints import shards
from experiments.errors import UserError

ARRAYS = {
    "bytes": np.arange(3, dtype=np.uint8),
    "half": np.ones((2, 2), np.float16),
    "of no axis": np.float32(3).reshape(()),
    "brain": np.ones(3, ml_dtypes.bfloat16),
    "small": np.ones(2, ml_dtypes.float8_e4m3fn),
    "shape": np.array([2, 3]),
    "words": np.arange(6, dtype=np.int32).reshape(2, 3).T,  # not contiguous
    'ü "quoted" \\': np.ones(2, np.int8),
    "empty": np.zeros((0, 3), np.float32),
    **{str(dtype): np.ones(1, dtype) for dtype in ("uint16", "int16", "float64", "bool")},
}


def test_the_bytes_are_those_of_the_library(tmp_path):
    metadata = {"planish": json.dumps({"names": 'ü "quoted"'})}
    shards.save(tmp_path / "ours", ARRAYS, metadata)
    arrays = {n: np.ascontiguousarray(x).reshape(x.shape) for n, x in ARRAYS.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=str(x.dtype), shape=list(x.shape), data_ptr=x.ctypes.data, data_len=x.nbytes
        )
        for name, x in arrays.items()
    }
    safetensors.serialize_file(specs, str(tmp_path / "theirs"), metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_it_is_read_back(tmp_path):
    shards.save(tmp_path / "file", ARRAYS, {"format": "pt", "planish": "{}"})
    assert shards.read_metadata(tmp_path / "file") == {"format": "pt", "planish": "{}"}
    found = shards.read_header(tmp_path / "file")
    assert set(found) == set(ARRAYS)
    for name, x in ARRAYS.items():
        if x.size:  # an empty range cannot be mapped
            np.testing.assert_array_equal(found[name].open(), x)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_unfinished_file_is_not_put_in_place(tmp_path):
    shards.save(tmp_path / "file", {"x": np.zeros(3)}, {})
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(KeyError):
        shards.save(tmp_path / "file", {"x": np.zeros(3, np.complex64)}, {})
    assert (tmp_path / "file").read_bytes() == before


def written(path, header, content=b""):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
    return path


def entry(start, stop, shape=None, dtype="U8"):
    shape = [stop - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": entry(0, 4), "b": entry(2, 8)}, "b does not begin where the tensor before it ends"),
        ({"a": entry(0, 4), "b": entry(5, 8)}, "b does not begin where the tensor before it ends"),
        ({"a": entry(1, 8)}, "a does not begin"),
        ({"a": entry(0, 4)}, "bytes follow the last tensor"),
        ({"a": entry(0, 8.0, [8])}, "not all whole numbers"),
        ({"a": entry(0, 8, [True, 8])}, "not all whole numbers"),
        ({"a": entry(0, 8, "8")}, "not all whole numbers"),
        ({"a": entry(0, 8, [2**63, 2**63])}, "a has 8 bytes where its shape needs 85070"),
        ({"a": entry(0, 8, dtype=["U8"])}, ""),
        ({"a": 3}, "TypeError"),
    ],
)
def test_a_header_that_lies(tmp_path, header, reason):
    path = written(tmp_path / "file", header, bytes(8))
    with pytest.raises(UserError, match=f"file is truncated or corrupt .*{reason}"):
        shards.read_header(path)


def test_a_tensor_without_bytes_is_read(tmp_path):
    path = written(tmp_path / "file", {"a": entry(0, 0, [3, 0], "F16")})
    assert shards.read_header(path)["a"].open().shape == (3, 0)


@pytest.mark.parametrize("name", ["x" * 300, "sub/../../x", "a\x00b", ".", ""])
def test_an_index_names_nothing_that_is_opened_elsewhere(tmp_path, name):
    (tmp_path / shards.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="lies outside|lacks the file|no ordinary file|cannot be"):
        shards.weight_files(tmp_path)
