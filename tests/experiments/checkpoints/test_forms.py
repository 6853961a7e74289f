"""Every compressed tensor comes back from a checkpoint as it went in, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import formats, tensors
from algorithms.activations import quantized_inputs
from algorithms.low_rank.eora import eora
from algorithms.low_rank.svd_llm import svd_llm
from algorithms.pruning.oats import oats
from algorithms.pruning.sparsegpt import sparsegpt
from algorithms.pruning.wanda import wanda
from algorithms.quantization.aqlm import aqlm
from algorithms.quantization.gptq import gptq
from algorithms.quantization.qtip import qtip
from algorithms.quantization.quip_sharp import quip_sharp
from algorithms.quantization.rtn import rtn
from algorithms.tensors import DenseTensor, ExpertsTensor
from experiments.checkpoints import forms
from experiments.checkpoints.planish import CheckpointWriter
from tests.algorithms.test_formats import ALL

STATIC = quantized_inputs(format=formats.fp8(rows=None), dynamic=False)
METHODS = {
    **{name: rtn(format=format) for name, format in ALL.items()},
    "nvfp4 by gptq": gptq(format=formats.nvfp4()),
    "static activations": STATIC(rtn(format=formats.nvfp4())),
    "corrected": eora(rank=2)(quantized_inputs(format=formats.nvfp4())(gptq())),
    "quip_sharp": quip_sharp(bits=3),
    "qtip": qtip(bits=2, state_bits=8),
    "aqlm": aqlm(codebooks=1, codebook_bits=4, rounds=1),
    "wanda": wanda(),
    "factors in codes": svd_llm(rank_multiple=8, factors=rtn(format=formats.integer(group_size=8))),
    "oats": oats(iterations=2),
    "sparsegpt": sparsegpt(format=formats.integer(bits=3)),
    "blocks": sparsegpt(keep=2, block=4, format=formats.nvfp4()),
}


@functools.cache
def compressed(method):
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(64, 128)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(256, 128)), jnp.float32)
    stats = None if method.observe is None else method.observe(method.init(128), x)
    key = (jax.random.key(0),) if method.seeded else ()
    return method.compress(w, stats, *key), x


@pytest.mark.parametrize("name", METHODS)
def test_a_tensor_comes_back_as_it_was(name, tmp_path):
    tensor, x = compressed(METHODS[name])
    writer = CheckpointWriter(tmp_path / "c")
    writer.write("blocks.0", {"blocks.0.mlp.up.weight": tensor})
    again = CheckpointWriter(tmp_path / "c")  # which compares digests
    assert set(again.parts) == {"blocks.0"} and not again.damaged
    found = again.read("blocks.0").tensor("blocks.0.mlp.up.weight")
    assert jax.tree.structure(found) == jax.tree.structure(tensor)
    for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(tensor), strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        assert np.asarray(mine).tobytes() == np.asarray(other).tobytes()
    np.testing.assert_array_equal(found.matmul(x[:3]), tensor.matmul(x[:3]))
    assert found.storage_bits() == tensor.storage_bits()


@pytest.mark.parametrize(
    "name", ["aqlm", "static activations", "qtip", "wanda", "factors in codes", "oats"]
)
@pytest.mark.some("qtip", "wanda", "factors in codes", "oats")
def test_weights_of_experts_come_back_too(name, tmp_path):
    tensor, x = compressed(METHODS[name])
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), tensor)
    writer = CheckpointWriter(tmp_path / "c")
    writer.write("blocks.0", {"blocks.0.mlp.experts.up.weight": ExpertsTensor(stacked)})
    again = CheckpointWriter(tmp_path / "c")
    found = again.read("blocks.0").tensor("blocks.0.mlp.experts.up.weight")
    assert isinstance(found, ExpertsTensor) and found.shape == (2, *tensor.shape)
    for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(stacked), strict=True):
        assert np.asarray(mine).tobytes() == np.asarray(other).tobytes()
    rows = found.grouped_matmul(x[:3], jnp.array([1, 2]))
    np.testing.assert_allclose(rows, tensor.matmul(x[:3]), rtol=2e-4, atol=2e-4)


def test_every_form_is_among_them():
    seen = set()

    def visit(tensor):
        seen.add(type(tensor).__name__)
        for value in vars(tensor).values():
            if isinstance(value, tensors.CompressedTensor):
                visit(value)

    for method in METHODS.values():
        visit(compressed(method)[0])
    around = {DenseTensor.__name__, ExpertsTensor.__name__}
    assert seen | around == set(forms.FORMS) - {"CompressedTensor"}


def test_a_form_of_another_version_is_a_sentence():
    described = forms.describe(compressed(rtn())[0]) | {"class": "TernaryTensor"}
    with pytest.raises(ValueError, match="holds a TernaryTensor, which the version that wrote it"):
        forms.tensor(described, {})
