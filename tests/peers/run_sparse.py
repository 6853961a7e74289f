"""Loads folders with transformers and compressed-tensors as they were when both knew bit masks:
`python run_sparse.py FOLDER...`, in an environment with requirements-sparse.txt.

Beside each folder goes FOLDER.npz: each weight as the loader decompresses it, and logits of tokens.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.utils.quantization_config import CompressedTensorsConfig


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for folder in map(Path, sys.argv[1:]):
        raw = json.loads((folder / "config.json").read_text())
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float16, attn_implementation="eager",
            quantization_config=CompressedTensorsConfig(run_compressed=False),
        )  # fmt: skip
        state = {n: p.float().numpy() for n, p in model.named_parameters() if n.endswith("weight")}
        torch.nn.Module.float(model)
        tokens = np.random.default_rng(1).integers(0, raw["vocab_size"], (2, 17))
        logits = model.eval()(torch.from_numpy(tokens)).logits.numpy()
        np.savez_compressed(f"{folder}.npz", tokens=tokens.astype(np.int32), logits=logits, **state)


if __name__ == "__main__":
    main()
