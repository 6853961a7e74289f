"""The layout of AutoAWQ: `quant_method: awq`, `version: gemm`, read by transformers and vLLM too.

Of a layer W [o, i] with groups of c columns, codes of 4 bits:

    qweight  int32 [i, o / 8]    outputs 0, 2, 4, 6, 1, 3, 5, 7 in a word, from its lowest bits
    qzeros   int32 [i / c, o / 8]    likewise
    scales   float16 [i / c, o]

W = scale (code - zero); a symmetric grid has the zero point 8 everywhere. All layers share one
group size; those in `modules_to_not_convert` are dense.

Facts from casper-hansen/AutoAWQ at 88e4c76 (MIT): awq/utils/packing_utils.py,
awq/modules/linear/gemm.py, awq/models/_config.py. It multiplies in float16, so that its dense
weight is ours rounded to float16 once; with float32 scales it is ours.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from algorithms.tensors import CompressedTensor, QuantizedTensor
from experiments.checkpoints.layouts import grids
from experiments.checkpoints.layouts.base import Arrays, Layout, Scheme
from experiments.checkpoints.layouts.gptq import HEAD, common_group
from kernels import packing

BITS = 4
GROUPS = (16, 32, 64, 128)  # that the loaders run, beside whole rows
ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # of outputs in a word, from its lowest bits


class AWQ(Layout):
    """Integers of 4 bits, symmetric and asymmetric, one group size for the model."""

    method = "awq"

    def scheme(self, tensor: CompressedTensor) -> Scheme:
        held = grids.require(tensor, "AWQ", (BITS,))
        (o, i), group = held.shape, held.group_size
        if o % 8:
            raise ValueError(
                f"The AWQ layout cannot hold {o} outputs, for eight share a word: leave the layer "
                "dense."
            )
        if group not in (*GROUPS, i) or i % group:
            raise ValueError(
                f"The AWQ layout cannot hold groups of {group} of {i} columns: its loaders run "
                f"groups of {', '.join(map(str, GROUPS))} that divide a row, and whole rows."
            )
        return {"bits": BITS, "group_size": group, "whole_rows": group == i}

    def encode(self, tensor: CompressedTensor) -> Arrays:
        self.scheme(tensor)
        assert isinstance(tensor, QuantizedTensor)
        zero = np.broadcast_to(np.asarray(tensor.zero_point()), tensor.scale.shape)
        return {
            "qweight": _pack(np.asarray(tensor.codes()).T),
            "qzeros": _pack(zero.T),
            "scales": np.asarray(tensor.scale).T.copy(),
        }

    def decode(self, arrays: Arrays, scheme: Scheme) -> QuantizedTensor:
        i, group = _require_shapes(arrays, scheme)
        codes, zero = (_unpack(arrays[name]).T for name in ("qweight", "qzeros"))
        packed = np.asarray(packing.pack(jnp.asarray(codes), BITS))
        return grids.quantized(packed, i, BITS, arrays["scales"].T, zero, group)

    def describe(self, schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
        held = {name: s for name, s in schemes.items() if s is not None}
        if HEAD in held:
            raise ValueError("AWQ's loaders keep lm_head dense: leave the head uncompressed.")
        group = common_group(held.values())
        for name, scheme in held.items():
            whole = scheme["whole_rows"] and group == -1
            if scheme["group_size"] != group and not whole:
                raise ValueError(
                    f"{name} has groups of {scheme['group_size']} columns and other layers of "
                    f"{group}, and an AWQ model has one group_size: export compressed_tensors."
                )
        return {
            "quant_method": self.method,
            "version": "gemm",
            "bits": BITS,
            "group_size": group,
            "zero_point": True,
            "modules_to_not_convert": [n for n, s in schemes.items() if s is None] or None,
        }

    def parse(
        self, description: Mapping[str, Any], layers: Collection[str]
    ) -> dict[str, Scheme | None]:
        bits, group = description.get("bits", 4), description.get("group_size", 128)
        version = description.get("version") or description.get("format") or "gemm"
        version = str(version).lower()
        known = description.get("quant_method", "awq") == "awq" and version == "gemm"
        if not known or bits != BITS or type(group) is not int or not (group > 0 or group == -1):
            raise ValueError(
                f"An AWQ quantization_config with version={version!r}, bits={bits!r} and "
                f"group_size={group!r} is not read: gemm with 4 bits and a positive group_size or "
                "-1 is."
            )
        listed = description.get("modules_to_not_convert") or []
        if not isinstance(listed, list):
            raise ValueError(
                f"modules_to_not_convert={listed!r} of the quantization_config is no list: fetch "
                "the model again."
            )
        dense = [HEAD, *map(str, listed)]
        scheme = {"bits": BITS, "group_size": group}
        return {n: None if any(part in n for part in dense) else scheme for n in layers}


def _pack(codes: np.ndarray) -> np.ndarray:
    """int32 [r, o / 8] of codes [r, o] below 16."""
    ordered = codes.reshape(len(codes), -1, 8)[..., ORDER].reshape(codes.shape)
    return np.ascontiguousarray(ordered[:, ::2] | ordered[:, 1::2] << 4).view("<i4")


def _unpack(words: np.ndarray) -> np.ndarray:
    pairs = np.ascontiguousarray(words).view(np.uint8)
    ordered = np.stack([pairs & 15, pairs >> 4], -1).reshape(len(words), -1, 8)
    return ordered[..., np.argsort(ORDER)].reshape(len(words), -1)


def _require_shapes(arrays: Arrays, scheme: Scheme) -> tuple[int, int]:
    """(i, c) of a layer whose arrays fit together."""
    for name in ("qweight", "qzeros", "scales"):
        fits = name in arrays and arrays[name].ndim == 2
        grids.require_fit(fits, "AWQ", f"{name} is missing or no matrix")
    for name in ("qweight", "qzeros"):
        dtype = arrays[name].dtype
        grids.require_fit(dtype == np.int32, "AWQ", f"{name} is {dtype}, not int32")
    scales = arrays["scales"]
    known = str(scales.dtype) in grids.SCALES
    grids.require_fit(known, "AWQ", f"scales are {scales.dtype}, not float16")
    i, width = arrays["qweight"].shape
    group = i if scheme["group_size"] == -1 else min(scheme["group_size"], i)
    groups = math.ceil(i / group) if i else 0
    fits = i > 0 and scales.shape == (groups, 8 * width)
    fits = fits and arrays["qzeros"].shape == (groups, width)
    grids.require_fit(
        fits, "AWQ",
        f"qweight {arrays['qweight'].shape}, qzeros {arrays['qzeros'].shape} and scales "
        f"{scales.shape} are not those of group_size={scheme['group_size']}",
    )  # fmt: skip
    return i, group
