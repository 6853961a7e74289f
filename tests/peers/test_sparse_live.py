"""Live checks of bit masks against compressed-tensors 0.14, the last that has them.

PLANISH_SPARSE_PYTHON names a Python with requirements-sparse.txt.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.pruning.magnitude import magnitude
from experiments.checkpoints.families import FAMILIES
from experiments.checkpoints.folder import FolderWriter
from experiments.checkpoints.layouts.compressed_tensors import CompressedTensors
from experiments.checkpoints.planish import part_of
from experiments.checkpoints.sources import open_source, shapes
from tests.experiments.checkpoints.layouts.test_bitmasks import GOLDEN
from tests.peers import exports
from tests.peers.test_live import run

pytestmark = pytest.mark.peers
METHODS = {"any": magnitude(sparsity=0.6), "two_of_four": magnitude(keep=2, block=4)}


def write(folder, method):
    """A random model, pruned in its blocks; what it holds, by our names."""
    made, rng = {}, np.random.default_rng(0)
    for name, shape in shapes(exports.CONFIG).items():
        x = exports._draw(rng, name.removesuffix(".weight"), shape).astype(np.float16)
        pruned = name.startswith("blocks.") and len(shape) == 2
        made[name] = method.compress(jnp.asarray(x, jnp.float32), None) if pruned else x
    writer = FolderWriter(folder, exports.CONFIG, CompressedTensors("bitmask"))
    for part in dict.fromkeys(map(part_of, made)):
        writer.write(part, {name: x for name, x in made.items() if part_of(name) == part})
    writer.finish(exports.CONFIG, exports.tokenizer(exports.CONFIG.vocabulary), {})
    return made


def test_the_committed_layers_are_what_the_library_makes(sparse, tmp_path):
    run(sparse, "make_sparse.py", str(tmp_path))
    for name in ("sparse.safetensors", "sparse.json"):
        assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes(), name


def test_the_library_makes_our_weights(sparse, tmp_path):
    made = {name: write(tmp_path / name, method) for name, method in METHODS.items()}
    run(sparse, "run_sparse.py", *(str(tmp_path / name) for name in made))
    for name, tensors in made.items():
        theirs, source = np.load(f"{tmp_path / name}.npz"), open_source(tmp_path / name)
        assert len(theirs.files) == len(tensors)
        for ours, tensor in tensors.items():
            (place,) = FAMILIES["llama"].places(exports.CONFIG, ours)
            dense = tensor if isinstance(tensor, np.ndarray) else tensor.dequantize()
            np.testing.assert_array_equal(theirs[place.name], np.asarray(dense, np.float32), ours)
            np.testing.assert_array_equal(source.read(ours), dense, ours)
