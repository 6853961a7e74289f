"""Weights of exported folders by compressed-tensors' own decompression, as it was until 0.14:
`python run_sparse.py FOLDER...`, in an environment with requirements-sparse.txt.

Beside each folder goes FOLDER.npz. transformers 4.57 does not load those that are not 2:4: it lays
weights out without memory first, which the library's compressor of the others refuses.
"""

import json
import sys
from pathlib import Path

import numpy as np
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import SparsityCompressionConfig


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        said = json.loads((folder / "config.json").read_text())["quantization_config"]
        said = said["sparsity_config"]
        config = SparsityCompressionConfig.load_from_registry(said["format"], **said)
        compressor = BaseCompressor.load_from_registry(said["format"], config=config)
        found = dict(compressor.decompress(str(folder)))
        np.savez_compressed(f"{folder}.npz", **{n: x.float().numpy() for n, x in found.items()})


if __name__ == "__main__":
    main()
