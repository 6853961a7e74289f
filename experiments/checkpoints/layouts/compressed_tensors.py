"""compressed-tensors: what llm-compressor writes and transformers, vLLM and SGLang load.

    what                               format                 arrays of a layer
    INT2 to INT8, weights alone        pack-quantized         weight_packed, weight_scale,
                                                              weight_shape, weight_zero_point
    INT2 to INT8 with rounded inputs   int-quantized          weight, weight_scale,
                                                              weight_zero_point, input_scale, …
    FP8 E4M3 with rounded inputs       float-quantized        weight, weight_scale, input_scale
    FP8 E4M3, weights alone            naive-quantized        weight, weight_scale
    NVFP4                              nvfp4-pack-quantized   weight_packed, weight_scale,
                                                              weight_global_scale,
                                                              input_global_scale
    MXFP4                              mxfp4-pack-quantized   weight_packed, weight_scale
    MXFP8                              mxfp8-quantized        weight, weight_scale
    pruned weights, as until 0.14      see bitmasks.py

Pruned weights with codes are written with the codes of zeros, as today's llm-compressor does.

Scales are shared per group, channel, tensor or block (E4M3: 128 x 128); inputs are rounded per
token, group or tensor. transformers runs all of it; servers run what they have kernels for, which
for integers is 4 and 8 bits mostly.

Facts, of compressed-tensors 0.19 (compressors/*/base.py):
- Packed codes are one little-endian bit stream per row in int32 words, as ours in bytes; signed
  codes are offset by 2^(bits-1). Zero points of groups and channels are packed too, down columns.
- Global scales divide: w = code · weight_scale / weight_global_scale, our `divisor`.
- FP4 has its first code in the low half of a byte. Scales of MX are exponents with bias 127.
- A name of a module goes before a pattern ("re:…", from the name's beginning), that before a class.

GPTQ's activation order needs nothing here: ours takes groups of consecutive columns, whichever it
rounds first. Others' `weight_g_idx`, which gives columns groups in any order, is read exactly, with
a scale for every run of columns that stay together.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from algorithms.tensors import CompressedTensor, QuantizedInput, QuantizedTensor
from experiments.checkpoints.layouts import bitmasks, codes, schemes
from experiments.checkpoints.layouts import scheme_weights as weights
from experiments.checkpoints.layouts.base import Arrays, Layout, Scheme
from experiments.checkpoints.layouts.patterns import compiled

VERSION = "0.19.0"  # of the library whose conventions these are
SPARSE_VERSION = "0.14.0"  # the last that reads them
TABLES = ("embed_tokens", "wte")  # modules that are no linear layers
FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized",
    "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized",
)  # fmt: skip
# Weights of these become bfloat16 when the library unpacks them, whatever the model runs in.
UNPACKED = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized")

CACHES = {
    element: {
        "num_bits": 8, "type": kind, "symmetric": True, "strategy": "tensor", "dynamic": False,
        "group_size": None, "block_structure": None, "actorder": None, "observer": None,
    }
    for element, kind in (("fp8", "float"), ("int8", "int"))
}  # fmt: skip
CACHE_DEFAULTS = {
    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False,
}  # fmt: skip


class CompressedTensors(Layout):
    """`quant_method: compressed-tensors`."""

    method = "compressed-tensors"

    def __init__(self, sparse: str | None = None):
        """sparse: "bitmask" writes pruned weights without codes as versions until 0.14 did."""
        if sparse not in (None, "bitmask"):
            raise ValueError(f"sparse={sparse!r} must be bitmask, or null for none.")
        self._sparse = sparse

    def scheme(self, tensor: CompressedTensor) -> Scheme:
        if self._sparse is not None and (found := bitmasks.scheme_of(tensor)) is not None:
            return found
        return schemes.scheme_of(tensor)

    def encode(self, tensor: CompressedTensor) -> Arrays:
        scheme = self.scheme(tensor)
        if scheme["format"] in bitmasks.FORMATS:
            return bitmasks.encode(tensor, scheme)
        found: dict[str, np.ndarray] = {}
        if isinstance(tensor, QuantizedInput):
            found, tensor = _encode_input(tensor, scheme["input_activations"]), tensor.weight
        assert isinstance(tensor, QuantizedTensor)
        return found | weights.encode(tensor, scheme)

    def decode(self, arrays: Arrays, scheme: Scheme) -> CompressedTensor:
        if scheme["format"] in bitmasks.FORMATS:
            return bitmasks.decode(arrays, scheme)
        weight: CompressedTensor
        if (format := scheme.get("sparsity")) is not None and "compressed" in arrays:
            arrays, alive = bitmasks.spread(arrays, format)
            weight = bitmasks.kept(weights.decode(arrays, scheme), alive, format)
        else:
            weight = weights.decode(arrays, scheme)
        args = scheme["input_activations"]
        if args is None:
            return weight
        scale = zero = divisor = None
        if schemes.is_nv(args):
            divisor = jnp.asarray(codes.one(arrays, "input_global_scale"))
        elif not args["dynamic"]:
            scale = jnp.asarray(codes.one(arrays, "input_scale").reshape(1, 1))
            if not args["symmetric"]:
                signed = codes.one(arrays, "input_zero_point", np.int8).reshape(1, 1)
                zero = jnp.asarray(codes.unsigned(signed, args["num_bits"]), scale.dtype)
        stored = None if scale is None else str(scale.dtype)
        return QuantizedInput(weight, scale, zero, divisor, schemes.input_format(args, stored))

    def describe(self, schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
        groups: dict[str, list[str]] = {}
        for name, scheme in schemes.items():
            if scheme is not None and scheme["format"] not in bitmasks.FORMATS:
                groups.setdefault(json.dumps(scheme, sort_keys=True), []).append(name)
        described = {}
        for number, (text, names) in enumerate(groups.items()):
            # Names alone where there are several: servers look a fused layer's class up first.
            linear = [] if len(groups) > 1 else ["Linear"]
            named = names if len(groups) > 1 else [n for n in names if _is_table(n)]
            group = {"targets": [*linear, *named], **json.loads(text)}
            described[f"group_{number}"] = group | {"output_activations": None}
        formats = {group["format"] for group in described.values()}
        sparse = bitmasks.describe(schemes)
        if sparse and not described:  # as the library has it: nothing is quantized
            return {"quant_method": self.method, "version": SPARSE_VERSION, **sparse}
        return sparse | {
            "quant_method": self.method,
            "version": VERSION,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": described,
            "ignore": [n for n, s in schemes.items() if s is None and not _is_table(n)],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def cache(self, element: str) -> dict[str, Any]:
        return {"kv_cache_scheme": CACHES[element]}

    def cached(self, description: Mapping[str, Any]) -> str | None:
        said = description.get("kv_cache_scheme")
        if said is None:
            return None
        args = CACHE_DEFAULTS | dict(said)
        for element, scheme in CACHES.items():
            if all(args[key] == scheme[key] for key in CACHE_DEFAULTS):
                return element
        raise ValueError("it rounds keys and values by other scales than one for each of a layer")

    def dtype(self, schemes: Collection[Scheme]) -> str | None:
        return "bfloat16" if any(s["format"] in UNPACKED for s in schemes) else None

    def parse(
        self, description: Mapping[str, Any], layers: Collection[str]
    ) -> dict[str, Scheme | None]:
        _require_weights_alone(description)
        self.cached(description)
        format, *named = bitmasks.parse(description)
        groups, ignore = description.get("config_groups"), description.get("ignore") or []
        groups = {} if groups is None and format is not None else groups
        if not isinstance(groups, Mapping) or not all(
            isinstance(group, Mapping) for group in groups.values()
        ):
            raise ValueError("its config_groups are not schemes written out in full")
        targets = {t: group for group in groups.values() for t in group.get("targets") or []}
        chosen = {
            layer: None if _first(ignore, layer) else _first(targets, layer) for layer in layers
        }
        made = {t: _scheme(targets[t], description) for t in set(chosen.values()) - {None}}
        found = {layer: None if t is None else made[t] for layer, t in chosen.items()}
        if format is None:
            return found
        sparse = (n for n in layers if _first(named[0], n) and not _first(named[1], n))
        return found | {name: bitmasks.scheme(format, found[name]) for name in sparse}


def _is_table(name: str) -> bool:
    return name.rpartition(".")[2] in TABLES


def _first(targets: Iterable[str], name: str) -> str | None:
    """The target that counts for a module: by name, else by pattern, else by class."""
    ordered = sorted(targets, key=lambda target: (target.startswith("re:"), target))
    kind = "Embedding" if _is_table(name) else "Linear"
    for target in ordered:
        pattern = target.removeprefix("re:")
        if target == name or pattern != target and compiled(pattern).match(name):
            return target
    return kind if kind in ordered else None


def _require_weights_alone(description: Mapping[str, Any]) -> None:
    if (status := description.get("quantization_status", "compressed")) != "compressed":
        raise ValueError(f"its layers are {status} rather than compressed")
    if description.get("transform_config"):
        raise ValueError("it turns activations while it runs, which is not read")


def _scheme(group: Mapping[str, Any], description: Mapping[str, Any]) -> Scheme:
    if group.get("output_activations") is not None:
        raise ValueError("it rounds outputs of layers, which is not read")
    if group.get("weights") is None:
        raise ValueError("it rounds inputs of layers whose weights are dense, which is not read")
    format, inputs = (
        group.get("format") or description.get("format"),
        group.get("input_activations"),
    )
    if format not in FORMATS:
        raise ValueError(f"its format {format} is not read, which {', '.join(FORMATS)} are")
    return {
        "format": format,
        "weights": schemes.canonical(group["weights"]),
        "input_activations": None if inputs is None else schemes.canonical(inputs),
    }


def _encode_input(t: QuantizedInput, args: Mapping[str, Any]) -> dict[str, np.ndarray]:
    found = {}
    if t.divisor is not None:
        found["input_global_scale"] = np.asarray(t.divisor, np.float32).reshape(1)
    if t.scale is not None:
        found["input_scale"] = np.asarray(t.scale).reshape(1)
    if t.zero is not None:
        found["input_zero_point"] = codes.signed(np.asarray(t.zero), args["num_bits"]).reshape(1)
    return found
