"""Writes the golden models: `python make_goldens.py FOLDER [--seed N]`, in the peers' environment.

Each model is a folder with config.json, safetensors and expected.npz; manifest.json says what made
them. The committed ones have seed 0.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from families import families, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order
    torch.set_float32_matmul_precision("highest")
    transformers.utils.logging.disable_progress_bar()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    made = families()
    for index, (name, family) in enumerate(made.items()):
        save(family, arguments.folder / name, np.random.default_rng([arguments.seed, index]))
    manifest = {
        "seed": arguments.seed,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "models": {name: family.covers for name, family in made.items()},
    }
    path = arguments.folder / "manifest.json"
    path.write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main()
