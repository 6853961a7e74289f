"""What every parametrization promises, those included that join later: conf/parametrization is the
list. Each is put on a small model, dense and packed; what it does not take it refuses.
"""

import functools
import math
from pathlib import Path

import hydra
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from algorithms import parametrization, surgery, training
from algorithms.formats import integer
from algorithms.modules import CompressedLinear
from algorithms.objectives import CrossEntropy
from algorithms.tensors import SparseTensor
from algorithms.training import Batch
from experiments import compress, train
from experiments.checkpoints.loading import load_model, outline
from experiments.checkpoints.planish import Checkpoint
from experiments.configuration import CONF
from experiments.data.tokenizer import Tokenizer
from experiments.training import saving
from models.config import DecoderConfig
from models.decoder import Decoder
from tests.experiments import tiny

NAMES = sorted(
    path.stem for path in Path(CONF, "parametrization").glob("*.yaml") if path.stem != "none"
)
SMALL = DecoderConfig(
    vocabulary=53, hidden=32, layers=1, heads=2, kv_heads=1, head_size=16, feed_forward=48,
    context=16, output_bias=True,
)  # fmt: skip
GRID = integer(bits=4, group_size=16)  # of packed layers
TOLERANCE = 2e-5  # of logits, where sums are taken in another order


class Case:
    """A model before and after it is parametrized."""

    def __init__(self, name: str, packed: bool):
        with hydra.initialize_config_dir(CONF, version_base="1.3"):
            node = hydra.compose("train", [f"parametrization={name}"]).parametrization
        keys = {"rank": 4, "alpha": 4.0 if "rank" in node else 0.5}  # 0.5: a clip that clips
        node.update({key: value for key, value in keys.items() if key in node})
        for key in ("format", "activations"):
            if node.get(key) is not None and "group_size" in node[key]:
                node[key].group_size = 16
        if packed and node.get("format") is not None:
            node.format = None if "qlora" not in name else node.format
        self.method = hydra.utils.instantiate(node)
        sparse = name == "masked"
        self.base, self.packed = small(packed, sparse), packed
        self.model = small(packed, sparse)
        self.paths = self.method.apply(self.model, jax.random.key(1))
        self.parts = training.take_apart(self.model, self.method.learned or ".*")
        self.adapts = self.method.learned is not None


def small(packed: bool, sparse: bool = False) -> Decoder:
    """sparse: with negative weights gone."""
    model = Decoder(SMALL, rngs=nnx.Rngs(0))
    for path in parametrization.linear_layers(model) if packed or sparse else ():
        if path.startswith("blocks."):
            w = surgery.get_weight(surgery.linear_at(model, path))
            tensor = GRID.round(0.7 * w, GRID.fit(w))
            if sparse:
                kept = tensor if packed else w
                tensor = SparseTensor.of(kept, w > 0, int((w > 0).sum()), dtype="float32")
            surgery.compress_linear(model, path, tensor)
            if not packed:
                surgery.replace(model, path, surgery.linear(tensor.dequantize()))
    return model


@functools.cache
def made(name: str, packed: bool) -> Case | str:
    """Or the sentence that refuses it."""
    try:
        return Case(name, packed)
    except ValueError as error:
        return str(error)


@pytest.fixture(params=[(name, packed) for name in NAMES for packed in (False, True)],
                ids=lambda p: f"{p[0]}-{'packed' if p[1] else 'dense'}")  # fmt: skip
def case(request):
    found = made(*request.param)
    if isinstance(found, str):
        assert isinstance(made(request.param[0], not request.param[1]), Case), found
        assert "begin with" in found or "choose" in found
        pytest.skip(found)
    return found


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 53, (4, 16)))
BATCH = Batch(TOKENS[:, :-1], TOKENS[:, 1:])
OPTIMIZER = optax.sgd(0.05)


class Traced(CrossEntropy):
    """Which counts how often it is."""

    traced = [0]

    def __call__(self, *arguments, **more):
        self.traced[0] += 1
        return super().__call__(*arguments, **more)


LOSS = Traced()


@jax.jit
def _logits(graph_state):
    return nnx.merge(*graph_state)(TOKENS)


def logits(model):
    return np.asarray(_logits(nnx.split(model)))


def step(case, state, **more):
    return training.step(
        state, case.parts.fixed, None, BATCH, graph=case.parts.graph, objective=LOSS,
        optimizer=OPTIMIZER, **more,
    )[0]  # fmt: skip


def begun(case):
    """With learned weights twice as large, so that some lie beyond their grids."""
    state = training.init(case.parts, OPTIMIZER, jax.random.key(0))

    def larger(path, x):
        return jnp.array(2 * x if "kernel" in jax.tree_util.keystr(path) else x, copy=True)

    return jax.tree_util.tree_map_with_path(larger, state)


@functools.cache
def trained(case):
    """After three steps, with how often the step was traced from the second on."""
    state = step(case, begun(case))
    before = LOSS.traced[0]
    for _ in range(2):
        state = step(case, state)
    return state, LOSS.traced[0] - before


def aspects(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def dense(layer):
    if isinstance(layer, nnx.Linear):
        return surgery.get_weight(layer)
    return layer.tensor.dequantize() if isinstance(layer, CompressedLinear) else weight(layer)


def weight(layer):
    found = layer.finished()
    return found if isinstance(found, jax.Array) else found.dequantize()


def rounds_inputs(case):
    return any(getattr(surgery.find(case.model, p), "inputs", None) for p in case.paths)


@pytest.mark.some(8)
def test_it_begins_as_the_model_that_it_is_put_on(case):
    """A packed one's weights as they are; a dense one's to what rounding loses, if anything."""
    if not rounds_inputs(case) and case.packed:
        np.testing.assert_allclose(logits(case.model), logits(case.base), atol=TOLERANCE)
    for path in case.paths if not rounds_inputs(case) else ():
        old, new = (dense(surgery.find(model, path)) for model in (case.base, case.model))
        if case.packed:
            np.testing.assert_allclose(new, old, rtol=1e-6, atol=1e-8)
        else:
            assert float(jnp.linalg.norm(new - old) / jnp.linalg.norm(old)) < 0.5


@pytest.mark.some(8)
def test_everything_learned_is_reached_and_nothing_else_moves(case):
    state, _ = trained(case)
    start = jax.tree_util.tree_leaves_with_path(begun(case).params)
    for (path, before), after in zip(start, jax.tree.leaves(state.params), strict=True):
        assert bool(jnp.any(before != after)), jax.tree_util.keystr(path)
    if case.adapts:
        count = sum(x.size for x in jax.tree.leaves(case.parts.params))
        assert count < 0.5 * sum(x.size for x in jax.tree.leaves(nnx.state(case.base)))
        whole = case.parts.merged(state.params, state.buffers)
        for part in ("stem", "tail"):
            for old, new in zip(*(jax.tree.leaves(nnx.state(getattr(m, part)))
                                  for m in (case.base, whole)), strict=True):  # fmt: skip
                np.testing.assert_array_equal(old, new)


def test_steps_are_traced_once_and_keep_dtypes(case):
    state, again = trained(case)
    assert again == 0
    assert aspects(state.params) == aspects(case.parts.params)
    assert aspects(state.buffers) == aspects(case.parts.buffers)


@pytest.mark.some(8)
def test_it_computes_with_what_it_finishes_as(case, tmp_path):
    """Trained, finished, saved and read again: the same logits."""
    state, _ = trained(case)
    model = case.parts.merged(state.params, state.buffers)
    learning = logits(model)
    assert parametrization.finish(model) == sorted(case.paths)
    finished = logits(model)
    np.testing.assert_allclose(finished, learning, atol=TOLERANCE)
    assert not any(hasattr(m, "finished") for _, m in nnx.iter_modules(model))
    saving.save(model, tmp_path / "saved", tokenizer(), {}, check=lambda: None)
    again = load_model(Checkpoint(tmp_path / "saved"))
    outlined = nnx.state(outline(Checkpoint(tmp_path / "saved")))
    assert aspects(outlined) == aspects(nnx.state(again))  # which plans go by
    np.testing.assert_array_equal(logits(again), finished)


@functools.cache
def tokenizer() -> Tokenizer:
    from experiments.checkpoints.fresh import byte_tokenizer

    return byte_tokenizer()


@pytest.mark.some(6)
def test_it_takes_a_step_in_bfloat16(case):
    """What is rounded is rounded from its own dtype: losses are finite, dtypes stay."""
    state = step(case, begun(case), dtype="bfloat16")
    assert aspects(state.params) == aspects(case.parts.params)
    assert all(math.isfinite(float(jnp.sum(x))) for x in jax.tree.leaves(state.params))


def test_layers_that_are_learned_already_are_not_wrapped_again(case):
    with pytest.raises(ValueError, match="matches no linear layer"):
        case.method.apply(nnx.clone(case.model), jax.random.key(0))


@pytest.mark.parametrize("name", ["e2e_qp", "lsq"])
def test_a_packed_checkpoint_is_trained_by_command(name, config):
    """The plan knows the packed layers' parameters before anything is loaded."""
    packed = compress.run(config("algorithm=rtn", "algorithm.format.group_size=32")).checkpoint
    keep = [] if name == "e2e_qp" else ["parametrization.format=null"]
    done = train.run(
        config(
            f"model.path={packed}", f"parametrization={name}", *keep, "steps=2", "batch=2",
            "evaluation_batch=2", "hardware.rate=1e11", name="train",
        )
    )  # fmt: skip
    before, after = (load_model(Checkpoint(folder)) for folder in (packed, done.checkpoint))
    old, new = (m.blocks[0].mlp.up.tensor for m in (before, after))
    assert type(old) is type(new) and bool(jnp.any(old.scale != new.scale))
    if name == "e2e_qp":
        np.testing.assert_array_equal(old.packed, new.packed)
    assert done.record["training"]["steps"] == 2
    assert tiny.CONFIG == before.config


def test_what_pruning_left_is_trained_by_command(config):
    """The same bytes are stored, of other numbers; what is gone stays gone."""
    pruned = compress.run(config("algorithm=magnitude")).checkpoint
    done = train.run(
        config(
            f"model.path={pruned}", "parametrization=masked", "steps=2", "batch=2",
            "evaluation_batch=2", "hardware.rate=1e11", name="train",
        )
    )  # fmt: skip
    old, new = (Checkpoint(folder) for folder in (pruned, done.checkpoint))
    for name, said in old.description["tensors"].items():
        if said["kind"] == "compressed":
            assert new.description["tensors"][name] == said
            before, after = old.tensor(name), new.tensor(name)
            np.testing.assert_array_equal(after.mask, before.mask)
            assert bool(jnp.any(after.values != before.values))
