"""Loads exported folders with transformers and compressed-tensors, and hands over what they give.

`python run_exports.py FOLDER...`, in the peers' environment: beside each folder goes FOLDER.npz,
with tokens, logits, each weight as the loader decompresses it, and what each linear layer was given
and gave ("in:…", "out:…"). That is in float32 on the weights that the loader made, which it rounds
to bfloat16 for FP4 and MX; "plain" are logits as the folder says that it be run.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig


def main() -> None:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    transformers.utils.logging.disable_progress_bar()
    for folder in map(Path, sys.argv[1:]):
        np.savez_compressed(f"{folder}.npz", **run(folder))


@torch.inference_mode()
def run(folder: Path, *, plain: bool = True) -> dict[str, np.ndarray]:
    raw = json.loads((folder / "config.json").read_text())
    if (said := raw.get("quantization_config")) is not None:
        check_schema(said)
    tokens = np.random.default_rng(1).integers(0, raw["vocab_size"], (2, 17))
    found = {"plain": as_it_says(folder, raw, tokens)} if plain else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    if said is not None:
        model.hf_quantizer.compressor.decompress_model(model)
    state = {name: p.float().numpy() for name, p in model.named_parameters()}
    state = {
        name: x
        for name, x in state.items()
        if name.endswith((".weight", ".bias", "k_scale", "v_scale"))
    }
    torch.nn.Module.float(model)  # its own refuses quantized models
    seen: dict[str, np.ndarray] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(partial(record, seen, name))
    logits = model.eval()(torch.from_numpy(tokens)).logits.numpy()
    return found | {"tokens": tokens.astype(np.int32), "logits": logits, **state, **seen}


def as_it_says(folder: Path, raw: dict, tokens: np.ndarray) -> np.ndarray:
    """Logits where nothing but the folder is given."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    logits = model.eval()(torch.from_numpy(tokens)).logits
    assert logits.dtype == getattr(torch, raw["torch_dtype"])
    return logits.float().numpy()


def record(seen: dict, name: str, _, given: tuple, gave: torch.Tensor) -> None:
    seen |= {f"in:{name}": given[0].numpy(), f"out:{name}": gave.numpy()}


def check_schema(said: dict) -> None:
    """The loader's own parser keeps what was said, word for word."""
    parsed = json.loads(QuantizationConfig.model_validate(said).model_dump_json())
    for name, group in said["config_groups"].items():
        for key, value in group.items():
            compare(value, parsed["config_groups"][name][key], f"{name}.{key}")
    for key in ("format", "ignore", "quantization_status", "quant_method", "kv_cache_scheme"):
        compare(said[key], parsed[key], key)


def compare(said, parsed, where: str) -> None:
    if isinstance(said, dict):
        for key, value in said.items():
            compare(value, parsed[key], f"{where}.{key}")
    else:
        assert said == parsed, f"{where}: {said!r} was read as {parsed!r}"


if __name__ == "__main__":
    main()
