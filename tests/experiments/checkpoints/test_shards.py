"""Files of tensors that we write are those that the safetensors library writes."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors

from experiments.checkpoints import shards

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
