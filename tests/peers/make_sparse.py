"""Writes pruned layers as compressed-tensors kept them: `python make_sparse.py FOLDER`.

In an environment with requirements-sparse.txt, whose version is the last that does.
sparse.safetensors holds for each case "<case>/<array>" as the library's own compressors leave it
and "<case>/dense", what they make of it again; sparse.json holds the configurations. The committed
ones are in tests/golden/sparse.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import SparsityCompressionConfig
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

ANY, TWO_OF_FOUR = "sparse-bitmask", "sparse-24-bitmask"
CASES = {  # name: shape, dtype, format, what codes are
    "any": ((6, 21), torch.float16, ANY, None),
    "rows": ((5, 64), torch.bfloat16, ANY, None),
    "two_of_four": ((7, 36), torch.float16, TWO_OF_FOUR, None),
    "two_of_four_float32": ((3, 8), torch.float32, TWO_OF_FOUR, None),
    "int8": ((6, 24), torch.float32, TWO_OF_FOUR, "int"),
    "fp8": ((6, 24), torch.float32, TWO_OF_FOUR, "float"),
}
STRUCTURES = {ANY: "unstructured", TWO_OF_FOUR: "2:4"}


def pruned(name: str, shape: tuple[int, int], format: str, rng: np.random.Generator) -> np.ndarray:
    """A random weight with zeros; "rows": as many in each."""
    w = rng.standard_normal(shape)
    if format == TWO_OF_FOUR:
        blocks = w.reshape(-1, 4)
        np.put_along_axis(blocks, np.argsort(np.abs(blocks), -1)[:, :2], 0.0, -1)
    elif name == "rows":
        np.put_along_axis(w, np.argsort(np.abs(w), -1)[:, : shape[1] // 2], 0.0, -1)
    else:
        w[np.abs(w) < 0.7] = 0.0
    return w


def quantized(w: torch.Tensor, kind: str) -> tuple[dict[str, torch.Tensor], QuantizationScheme]:
    """Codes of 8 bits with a scale for each row; inputs rounded too, as llm-compressor had it."""
    args = QuantizationArgs(num_bits=8, type=kind, strategy="channel", symmetric=True)
    inputs = QuantizationArgs(num_bits=8, type=kind, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
    scale, zero = calculate_qparams(w.amin(-1, keepdim=True), w.amax(-1, keepdim=True), args)
    compressor = BaseCompressor.load_from_registry(f"{kind}-quantized", config=None)
    state = {"m.weight": w, "m.weight_scale": scale, "m.weight_zero_point": zero}
    return compressor.compress(state, names_to_scheme={"m": scheme}), scheme


def main() -> None:
    rng, kept, said = np.random.default_rng(0), {}, {}
    for name, (shape, dtype, format, kind) in CASES.items():
        w = torch.from_numpy(pruned(name, shape, format, rng)).to(dtype)
        config = SparsityCompressionConfig.load_from_registry(
            format, targets=["m"], ignore=[], sparsity_structure=STRUCTURES[format]
        )
        said[name] = {"sparsity_config": config.model_dump()}
        state = {"m.weight": w}
        if kind is not None:
            state, scheme = quantized(w, kind)
            group = json.loads(scheme.model_dump_json())
            said[name] |= {"config_groups": {"group_0": group}, "format": f"{kind}-quantized"}
        compressor = BaseCompressor.load_from_registry(format, config=config)
        packed = compressor.compress(dict(state), compression_targets={"m"}, show_progress=False)
        again = dict(compressor.decompress_from_state_dict(dict(packed)))
        dense = again["m.weight"]
        if kind is not None:
            dense = dense.to(torch.float32) * packed["m.weight_scale"].to(torch.float32)
        kept[f"{name}/dense"] = dense
        kept |= {f"{name}/{key.removeprefix('m.')}": x for key, x in packed.items()}
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: x.detach().contiguous() for k, x in kept.items()}, folder / "sparse.safetensors")
    (folder / "sparse.json").write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
