"""Writes what compressed-tensors itself makes of a layer: `python make_exports.py FOLDER`.

In the peers' environment. layers.safetensors holds for each scheme "<scheme>/<array>" as its own
compressor packs a random weight, "<scheme>/dense" as it unpacks that again, "<scheme>/rounded" as
it rounds the input "x"; schemes.json says what they are in its own words. The committed ones are in
tests/golden/exports.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStatus,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file

SHAPE, BLOCK = (6, 64), [4, 32]
UNEVEN = {"symmetric": False}
TENSOR = {"strategy": "tensor", "dynamic": False}


def schemes() -> dict[str, QuantizationScheme]:
    """By name; presets with groups that divide the small weight."""
    found = {f"w{bits}_group": scheme(f"W{bits}A16", group_size=16) for bits in range(2, 9)}
    found |= {f"w{b}_group_uneven": scheme(f"W{b}A16", group_size=32, **UNEVEN) for b in (3, 4, 8)}
    channel = {"strategy": "channel", "group_size": None}
    found |= {f"w{b}_channel_uneven": scheme(f"W{b}A16", **channel, **UNEVEN) for b in (2, 5)}
    found["w8a8"] = scheme("W8A8")
    found["w8a8_uneven"] = scheme("W8A8", TENSOR | UNEVEN, **UNEVEN)
    found["w8a8_static"] = scheme("W8A8", TENSOR)
    found["w4a8"] = scheme("W4A8", group_size=32)
    found["w4afp8"] = scheme("W4AFP8", group_size=32)
    found["fp8"] = scheme("FP8")
    found["fp8_dynamic"] = scheme("FP8_DYNAMIC")
    found["fp8_block"] = scheme("FP8_BLOCK", {"group_size": 32}, block_structure=BLOCK)
    for name in ("NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4", "MXFP8A16", "MXFP8"):
        found[name.lower()] = scheme(name)
    return found


def scheme(preset: str, inputs: dict | None = None, **weights) -> QuantizationScheme:
    """A preset with other settings."""
    base = preset_name_to_scheme(preset, ["Linear"])
    args = QuantizationArgs(**base.weights.model_dump() | {"zp_dtype": None} | weights)
    given = base.input_activations
    if given is not None and inputs:
        given = QuantizationArgs(**given.model_dump() | {"zp_dtype": None} | inputs)
    made = QuantizationScheme(targets=["Linear"], weights=args, input_activations=given)
    made.format = infer_module_format(torch.nn.Linear, made)
    return made


def weight_state(w: torch.Tensor, args: QuantizationArgs) -> dict[str, torch.Tensor]:
    """The weight with its scales and zero points, as calibration would set them."""
    spread = grouped(w, args)
    low, high = spread.amin(-1), spread.amax(-1)
    state = {"weight": w}
    divisor = generate_gparam(w.min(), w.max()) if args.strategy == "tensor_group" else None
    if divisor is not None:
        state["weight_global_scale"] = divisor
    scale, zero = calculate_qparams(low, high, args, global_scale=divisor)
    if args.scale_dtype == torch.uint8:  # which calculate_qparams gives as powers of two
        scale = scale.float()
    return state | {"weight_scale": scale, "weight_zero_point": zero}


def grouped(w: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """What shares a scale, along the last axis."""
    o, i = w.shape
    if args.strategy == "block":
        r, c = args.block_structure
        w = torch.nn.functional.pad(w, (0, -i % c, 0, -o % r))
        blocks = w.reshape(w.shape[0] // r, r, w.shape[1] // c, c).transpose(1, 2)
        return blocks.flatten(2)
    if args.strategy == "tensor":
        return w.reshape(1, -1)
    return w.reshape(o, -1, args.group_size if "group" in args.strategy else i)


def input_state(x: torch.Tensor, args: QuantizationArgs) -> dict[str, torch.Tensor]:
    if args.strategy == "tensor_group":
        return {"input_global_scale": generate_gparam(x.min(), x.max())}
    if args.dynamic:
        return {}
    scale, zero = calculate_qparams(x.min().reshape(1), x.max().reshape(1), args)
    found = {"input_scale": scale}
    return found if args.symmetric else found | {"input_zero_point": zero}


def rounded(x: torch.Tensor, args: QuantizationArgs, state: dict) -> torch.Tensor:
    module = torch.nn.Module()
    module.quantization_status = QuantizationStatus.COMPRESSED
    for name, tensor in state.items():
        module.register_buffer(name, tensor)
    return forward_quantize(module, x[None], "input", args)[0]


def main() -> None:
    rng = np.random.default_rng(0)
    w = torch.from_numpy(rng.standard_normal(SHAPE) * np.exp(rng.standard_normal((SHAPE[0], 1))))
    x = torch.from_numpy(rng.standard_normal((4, SHAPE[1]))).float()
    kept, said = {"x": x}, {}
    for name, made in schemes().items():
        compressor = BaseCompressor.get_value_from_registry(made.format)
        packed = compressor.compress(weight_state(w.float(), made.weights), made)
        kept |= {f"{name}/dense": compressor.decompress(packed, made)["weight"]}
        if made.input_activations is not None:
            state = input_state(x, made.input_activations)
            kept[f"{name}/rounded"] = rounded(x, made.input_activations, state)
            packed |= state
        kept |= {f"{name}/{key}": tensor for key, tensor in packed.items()}
        said[name] = json.loads(made.model_dump_json())
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: t.detach().contiguous() for name, t in kept.items()}, folder / "layers.safetensors"
    )
    versions = {p: importlib.metadata.version(p) for p in ("compressed-tensors", "torch")}
    text = json.dumps({"versions": versions, "schemes": said}, indent=1, sort_keys=True)
    (folder / "schemes.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
