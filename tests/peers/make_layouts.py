"""Layers that GPTQModel and AutoAWQ packed, and their dense form by the same tools' unpacking.

`python make_layouts.py FOLDER [--seed N]`, in the peers' environment with gptqmodel==7.7.0 and
autoawq==0.2.9 beside it, both by `pip install --no-deps --no-build-isolation`. Writes gptq.npz and
awq.npz: arrays by "<case>/<name>"; "float16" is what the tool computes, "float32" what it computes
once its scales are cast to float32. The committed ones (tests/golden/layouts) have seed 0.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

OUTPUTS, INPUTS = 32, 64
GPTQ_CASES = {  # name: bits, group size, symmetric, version of the zero points, activation order
    **{f"symmetric{b}": (b, 32, True, 1, False) for b in (2, 3, 4, 8)},
    **{f"asymmetric{b}": (b, 32, False, 2, False) for b in (2, 3, 4, 8)},
    **{f"old_asymmetric{b}": (b, 16, False, 1, False) for b in (4, 8)},
    **{f"asymmetric{b}order": (b, 16, False, 2, True) for b in (3, 4)},
}
AWQ_CASES = {  # name: group size, symmetric
    "symmetric": (32, True),
    "asymmetric": (32, False),
    "rows": (-1, False),
    "fine": (16, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for file, cases, make in (("gptq", GPTQ_CASES, gptq), ("awq", AWQ_CASES, awq)):
        arrays = {}
        for index, (name, case) in enumerate(cases.items()):
            made = make(*case, np.random.default_rng([arguments.seed, index]))
            arrays |= {f"{name}/{k}": x for k, x in made.items()}
        np.savez_compressed(arguments.folder / f"{file}.npz", **arrays)


def grid(bits, group, symmetric, low, rng):
    """Codes [o, i], scales and zero points [o, G]."""
    codes = rng.integers(0, 2**bits, (OUTPUTS, INPUTS))
    groups = INPUTS // (INPUTS if group == -1 else group)
    scales = rng.uniform(1e-3, 0.1, (OUTPUTS, groups)).astype(np.float16)
    zeros = rng.integers(low, 2**bits, (OUTPUTS, groups))
    return codes, scales, np.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros


def linear(codes, scales, zeros, index) -> torch.nn.Linear:
    """A layer whose weight lies on the grid, in float32; `index`: each column's group."""
    weight = (codes - zeros[:, index]) * scales.astype(np.float32)[:, index]
    layer = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    layer.weight.data = torch.from_numpy(weight.astype(np.float32))
    return layer


def gptq(bits, group, symmetric, version, ordered, rng) -> dict[str, np.ndarray]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils import model as conversion

    codes, scales, zeros = grid(bits, group, symmetric, 1 if version == 1 else 0, rng)
    index = np.arange(INPUTS) // group
    if ordered:
        index = rng.permutation(index)
    module = TorchLinear(
        bits=bits, group_size=group, sym=symmetric, desc_act=ordered,
        in_features=INPUTS, out_features=OUTPUTS,
    )  # fmt: skip
    layer = linear(codes, scales, zeros, index)
    module.pack_original(
        layer, torch.from_numpy(scales.astype(np.float32)), torch.from_numpy(zeros),
        torch.from_numpy(index.astype(np.int32)),
    )  # fmt: skip
    module.eval()
    config = QuantizeConfig(bits=bits, group_size=group, sym=symmetric)
    if version == 1:
        conversion.convert_gptq_v2_to_v1_format_module(module, config)
    names = ("qweight", "qzeros", "scales", "g_idx")
    stored = {name: getattr(module, name).numpy().copy() for name in names}
    if version == 1:
        conversion.convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
    half = module.dequantize_weight().numpy()
    module.scales = module.scales.float()
    setting = np.array([bits, group, version], np.int32)
    return stored | {
        "setting": setting,
        "float16": half,
        "float32": module.dequantize_weight().numpy(),
    }


def awq(group, symmetric, rng) -> dict[str, np.ndarray]:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    codes, scales, zeros = grid(4, group, symmetric, 0, rng)
    size = INPUTS if group == -1 else group
    layer = linear(codes, scales, zeros, np.arange(INPUTS) // size)
    wide = torch.from_numpy(scales.T.astype(np.float32)).contiguous()
    module = WQLinear_GEMM.from_linear(
        layer, 4, size, scales=wide, zeros=torch.from_numpy(zeros.T).contiguous()
    )
    stored = {name: getattr(module, name).numpy() for name in ("qweight", "qzeros", "scales")}
    dense = {
        str(s.dtype).removeprefix("torch."): dequantize_gemm(
            module.qweight, module.qzeros, s, 4, size
        ).numpy()
        for s in (module.scales, module.scales.float())
    }
    return stored | {"setting": np.array(group, np.int32)} | dense


if __name__ == "__main__":
    main()
