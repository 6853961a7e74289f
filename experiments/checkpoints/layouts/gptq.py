"""The layout of AutoGPTQ and GPTQModel: `quant_method: gptq`, read by transformers and vLLM too.

Of a layer W [o, i] with groups of c columns, codes of b bits:

    qweight  int32 [i b / 32, o]    each column's codes down the rows, a little-endian bit stream
    qzeros   int32 [i / c, o b / 32]    zero points along the row, likewise
    scales   float16 [i / c, o]
    g_idx    int32 [i]    each column's group; j // c here

W = scale (code - zero). Two conventions for zero points: "gptq" stores zero - 1, "gptq_v2" the zero
point itself. The older one has no room for a zero point of 0 (readers disagree on what the wrapped
field means), so that asymmetric grids are written as gptq_v2 and symmetric ones, by default, as
gptq, which every reader knows. Our GPTQ permutes columns only while it works: what it returns has
consecutive groups, whatever its activation order.

Layers that differ from the rest are named in `dynamic`, which GPTQModel and vLLM read and
transformers (5.17) does not.

Facts from ModelCloud/GPTQModel at f4c327a (Apache-2.0): nn_modules/qlinear/__init__.py, torch.py,
utils/model.py, quantization/config.py. It multiplies in float16, so that its dense weight is ours
rounded to float16 once; with float32 scales it is ours.
"""

import collections
import json
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from algorithms.tensors import CompressedTensor, QuantizedTensor
from experiments.checkpoints.layouts import grids
from experiments.checkpoints.layouts.base import Arrays, Layout, Scheme
from experiments.checkpoints.layouts.patterns import compiled
from kernels import packing

BITS = (2, 3, 4, 8)
GROUPS = (16, 32, 64, 128, 256, 512, 1024)  # that the loaders run, beside whole rows
FORMATS = ("gptq", "gptq_v2")
HEAD = "lm_head"  # stays dense unless the configuration says otherwise


class GPTQ(Layout):
    """Integers of 2, 3, 4 or 8 bits; symmetric and asymmetric; any mixture of layers."""

    method = "gptq"

    def __init__(self, checkpoint_format: str | None = None):
        """checkpoint_format: gptq or gptq_v2; None: gptq for symmetric grids, else gptq_v2."""
        if checkpoint_format not in (None, *FORMATS):
            raise ValueError(f"{checkpoint_format=} must be {' or '.join(FORMATS)}, or null.")
        self.checkpoint_format = checkpoint_format

    def scheme(self, tensor: CompressedTensor) -> Scheme:
        held = grids.require(tensor, "GPTQ", BITS)
        (o, i), bits, group = held.shape, held.bits, held.group_size
        for name, n in (("input", i), ("output", o)):
            if n * bits % 32:
                raise ValueError(
                    f"The GPTQ layout cannot hold {name} dimensions of {n} with codes of {bits} "
                    f"bits, for they do not fill whole words of 32 bits: leave the layer dense."
                )
        if group not in (*GROUPS, i) or i % group:
            raise ValueError(
                f"The GPTQ layout cannot hold groups of {group} of {i} columns: its loaders run "
                f"groups of {', '.join(map(str, GROUPS))} that divide a row, and whole rows."
            )
        return {
            "bits": bits,
            "group_size": group,
            "whole_rows": group == i,
            "sym": held.zero is None,
            "checkpoint_format": self._format(symmetric=held.zero is None),
        }

    def _format(self, *, symmetric: bool) -> str:
        if self.checkpoint_format is None:
            return "gptq" if symmetric else "gptq_v2"
        if self.checkpoint_format == "gptq" and not symmetric:
            raise ValueError(
                "checkpoint_format='gptq' has no room for a zero point of 0, which asymmetric "
                "grids may have: choose gptq_v2 or a symmetric format."
            )
        return self.checkpoint_format

    def encode(self, tensor: CompressedTensor) -> Arrays:
        scheme = self.scheme(tensor)
        assert isinstance(tensor, QuantizedTensor)
        (o, i), bits, c = tensor.shape, tensor.bits, tensor.group_size
        zero = np.asarray(tensor.zero_point())
        zero = np.broadcast_to(zero - (scheme["checkpoint_format"] == "gptq"), tensor.scale.shape)
        zeros = np.asarray(packing.pack(jnp.asarray(zero.T, jnp.uint8), bits))
        return {
            "qweight": grids.words(np.asarray(tensor.packed), i, bits).T.copy(),
            "qzeros": grids.words(zeros, o, bits),
            "scales": np.asarray(tensor.scale).T.copy(),
            "g_idx": np.arange(i, dtype=np.int32) // c,
        }

    def decode(self, arrays: Arrays, scheme: Scheme) -> QuantizedTensor:
        """Columns in the order of activations keep their own scales: exact, but no longer small."""
        bits = scheme["bits"]
        i, o = _require_shapes(arrays, scheme)
        packed = grids.packed(arrays["qzeros"], o, bits)
        stored = np.asarray(packing.unpack(jnp.asarray(packed), bits, o))
        zero = _zero_points(stored, bits, scheme["checkpoint_format"]).T
        scale = arrays["scales"].T
        packed = grids.packed(arrays["qweight"].T, i, bits)
        group = i if scheme["group_size"] == -1 else min(scheme["group_size"], i)
        index = arrays.get("g_idx", np.arange(i) // group)
        if not np.array_equal(index, np.arange(i) // group):
            group = _run(index)
            scale, zero = scale[:, index[::group]], zero[:, index[::group]]
        return grids.quantized(packed, i, bits, scale, zero, group)

    def describe(self, schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
        held = [s for s in schemes.values() if s is not None]
        _require_one_format(held)
        group = common_group(held)
        merged = {n: s and _setting(s, group) for n, s in schemes.items()}
        settings = collections.Counter(json.dumps(s) for s in merged.values() if s is not None)
        default = json.loads(min(settings, key=lambda s: (-settings[s], s)))
        dynamic: dict[str, Any] = {}
        for name, setting in merged.items():
            if setting is None and name != HEAD:
                dynamic[f"-:{exactly(name)}"] = {}
            elif setting is not None and setting != default:
                dynamic[f"+:{exactly(name)}"] = setting
        return {
            "quant_method": self.method,
            **default,
            "desc_act": False,
            "checkpoint_format": held[0]["checkpoint_format"],
            "format": held[0]["checkpoint_format"],
            "pack_dtype": "int32",
            "lm_head": schemes.get(HEAD) is not None,
            **({"dynamic": dynamic} if dynamic else {}),
        }

    def parse(
        self, description: Mapping[str, Any], layers: Collection[str]
    ) -> dict[str, Scheme | None]:
        stored = description.get("checkpoint_format", description.get("format", "gptq"))
        if description.get("quant_method", "gptq") != "gptq" or stored not in FORMATS:
            raise ValueError(
                f"A quantization_config of quant_method={description.get('quant_method')!r} with "
                f"checkpoint_format={stored!r} is not read: {' and '.join(FORMATS)} are."
            )
        if description.get("pack_dtype", "int32") != "int32" or description.get("rotation"):
            raise ValueError(
                f"A GPTQ checkpoint with pack_dtype={description.get('pack_dtype')!r} and rotation="
                f"{description.get('rotation')!r} is not read: int32 without rotation is."
            )
        return {name: _scheme_of(name, description, stored) for name in layers}


def exactly(name: str) -> str:
    """A pattern that matches this name alone."""
    return f"^{name.replace('.', chr(92) + '.')}$"


def common_group(schemes: Collection[Scheme]) -> int:
    """The group size that says most: of layers with several groups, else -1 for whole rows."""
    if not schemes:
        raise ValueError("No layer is compressed: export the model in a dense format.")
    sizes = [s["group_size"] for s in schemes if not s["whole_rows"]]
    return max(set(sizes), key=lambda s: (sizes.count(s), s)) if sizes else -1


def _require_one_format(schemes: list[Scheme]) -> None:
    formats = {s["checkpoint_format"] for s in schemes}
    if len(formats) > 1:
        raise ValueError(
            "Some layers are symmetric and others are not, and a model has one checkpoint_format: "
            "set checkpoint_format=gptq_v2, which holds both."
        )


def _setting(scheme: Scheme, group: int) -> dict[str, Any]:
    """What the configuration says of a layer; a row that is one group fits that group's size."""
    whole = scheme["whole_rows"] and scheme["group_size"] != group
    size = -1 if whole else scheme["group_size"]
    return {"bits": scheme["bits"], "group_size": size, "sym": scheme["sym"]}


def _scheme_of(name: str, description: Mapping[str, Any], stored: str) -> Scheme | None:
    inside = description.get("modules_in_block_to_quantize")
    if inside is not None and not name.endswith(_endings(inside)):
        return None
    if name == HEAD and not description.get("lm_head"):
        return None
    override = _override(name, description.get("dynamic") or {})
    if override is None:
        return None
    found = {key: override.get(key, description.get(key)) for key in ("bits", "group_size", "sym")}
    bits, size = found["bits"], found["group_size"]
    if bits not in BITS or type(size) is not int or not (size >= 1 or size == -1):
        raise ValueError(
            f"{name} has {bits=} and group_size={size!r} in the quantization_config: 2, 3, 4 or "
            "8 bits and a positive group_size or -1 are read."
        )
    return {**found, "sym": bool(found["sym"]), "checkpoint_format": stored}


def _endings(inside: Any) -> tuple[str, ...]:
    """Of the layers that are compressed, as transformers has it: lists of lists of names."""
    if not isinstance(inside, list):
        raise ValueError(
            f"modules_in_block_to_quantize={inside!r} of the quantization_config is no list: fetch "
            "the model again."
        )
    lists = [part if isinstance(part, list) else [part] for part in inside]
    return tuple(str(end) for part in lists for end in part)


def _override(name: str, dynamic: Any) -> Mapping[str, Any] | None:
    """What the first matching pattern says of a layer; None: it stays dense.

    Patterns that exclude come first, as in the official reader.
    """
    if not isinstance(dynamic, Mapping) or not all(
        isinstance(x, Mapping) for x in dynamic.values()
    ):
        raise ValueError(
            "`dynamic` of the quantization_config is no table of patterns and settings: fetch the "
            "model again."
        )
    ordered = sorted(dynamic.items(), key=lambda item: not item[0].startswith("-"))
    for pattern, setting in ordered:
        bare = pattern[2:] if pattern[:2] in ("-:", "+:") else pattern
        if compiled(bare).match(name):
            return None if pattern.startswith("-:") else setting
    return {}


def _require_shapes(arrays: Arrays, scheme: Scheme) -> tuple[int, int]:
    """(i, o) of a layer whose arrays fit together."""
    bits, size = scheme["bits"], scheme["group_size"]
    for name in ("qweight", "qzeros", "scales"):
        fits = name in arrays and arrays[name].ndim == 2
        grids.require_fit(fits, "GPTQ", f"{name} is missing or no matrix")
    for name in ("qweight", "qzeros"):
        dtype = arrays[name].dtype
        grids.require_fit(dtype == np.int32, "GPTQ", f"{name} is {dtype}, not int32")
    scales = arrays["scales"]
    known = str(scales.dtype) in grids.SCALES
    grids.require_fit(known, "GPTQ", f"scales are {scales.dtype}, not float16")
    rows, o = arrays["qweight"].shape
    i = rows * 32 // bits
    groups = math.ceil(i / (i if size == -1 else size)) if i else 0
    fits = rows * 32 % bits == 0 and i > 0 and scales.shape == (groups, o)
    fits = fits and arrays["qzeros"].shape == (groups, o * bits // 32) and o * bits % 32 == 0
    grids.require_fit(
        fits, "GPTQ",
        f"qweight {arrays['qweight'].shape}, qzeros {arrays['qzeros'].shape} and scales "
        f"{scales.shape} are not those of bits={bits} and group_size={size}",
    )  # fmt: skip
    if "g_idx" in arrays:
        index = arrays["g_idx"]
        fits = index.shape == (i,) and index.dtype.kind == "i"
        fits = fits and 0 <= index.min() and index.max() < groups
        grids.require_fit(
            fits, "GPTQ", f"g_idx does not name one of {groups} groups for {i} inputs"
        )
    return i, o


def _zero_points(stored: np.ndarray, bits: int, checkpoint_format: str) -> np.ndarray:
    if checkpoint_format == "gptq_v2":
        return stored
    if (stored == 2**bits - 1).any():
        raise ValueError(
            f"A layer in the GPTQ layout stores the zero point {2**bits - 1} in the older "
            f"checkpoint_format, which readers take for 0 or for {2**bits}: convert the model to "
            "gptq_v2."
        )
    return stored + np.uint8(1)


def _run(index: np.ndarray) -> int:
    """The longest run such that every group's columns lie in whole runs of it."""
    changes = np.flatnonzero(np.diff(index)) + 1
    return math.gcd(len(index), *changes.tolist())
