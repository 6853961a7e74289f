"""Logits of folders by transformers: `python run_transformers_folder.py --tokens NPY FOLDER ...`.

Whatever a folder's quantization_config asks for must be installed. Computes in float16, which the
kernels of GPTQ and AWQ want, and writes logits.npy into each folder; the last line of stdout says
which class each folder's first linear layer has become.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--tokens", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    tokens = torch.from_numpy(np.load(arguments.tokens).astype(np.int64))
    classes = {}
    for folder in arguments.folders:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float16, device_map="cpu"
        )
        with torch.inference_mode():
            np.save(folder / "logits.npy", model(tokens).logits.float().numpy())
        classes[folder.name] = type(model.model.layers[0].mlp.up_proj).__name__
    print(json.dumps(classes))


if __name__ == "__main__":
    main()
