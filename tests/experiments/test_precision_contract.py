"""What every low precision promises, those included that join later: conf/precision is the list."""

from pathlib import Path

import hydra
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from omegaconf import OmegaConf

from algorithms import parametrization, training
from algorithms.objectives import CrossEntropy
from algorithms.training import Batch, Sums
from experiments.checkpoints.state import StateKeeper
from experiments.configuration import CONF
from models.config import DecoderConfig
from models.decoder import Decoder
from tests.experiments.test_optimizer_contract import same, shapes

PRECISIONS = sorted(path.stem for path in Path(CONF, "precision").glob("*.yaml"))
SMALL = DecoderConfig(
    vocabulary=24, hidden=16, layers=1, heads=2, kv_heads=1, head_size=8, feed_forward=20,
    context=16, qkv_bias=True,
)  # fmt: skip
OPTIMIZER, OBJECTIVE = optax.adam(1e-2), CrossEntropy()


def nothing(model, teacher, batch, key, *, training):
    """A loss without gradients."""
    return Sums(0 * jnp.sum(model.predictions(batch.inputs).logits), jnp.float32(1))


@pytest.fixture(scope="module", params=[name for name in PRECISIONS if name != "none"])
def precision(request):
    return hydra.utils.instantiate(OmegaConf.load(Path(CONF, "precision", f"{request.param}.yaml")))


@pytest.fixture(scope="module")
def parts(precision):
    """One for all tests of a precision: so are its programs."""
    model = Decoder(SMALL, rngs=nnx.Rngs(0))
    assert len(precision.apply(model, jax.random.key(0))) == 7
    return training.take_apart(model)


def batch(seed=0):
    tokens = np.random.default_rng(seed).integers(0, 24, size=(4, 13))
    return Batch(jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]))


def begun(parts):
    state = training.init(parts, OPTIMIZER, jax.random.key(1))
    return jax.tree.map(jnp.copy, state)


def stepped(parts, state, seed=0, objective=OBJECTIVE, **settings):
    return training.step(
        state, parts.fixed, None, batch(seed), graph=parts.graph, objective=objective,
        optimizer=OPTIMIZER, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("settings", [{}, dict(dtype="bfloat16"), dict(accumulate=2)])
@pytest.mark.some(4)
def test_it_learns_in_one_program_and_its_own_dtypes(parts, settings):
    state = begun(parts)
    first, losses, programs = shapes(state), [], set()
    for _ in range(6):
        state, metrics = stepped(parts, state, **settings)
        losses.append(float(metrics.means["loss"]))
        programs.add(training.step._cache_size())
    assert len(programs) == 1  # those of the first step
    assert shapes(state) == first
    assert not any(getattr(x, "weak_type", False) for x in jax.tree.leaves(state))
    assert losses[-1] < losses[0]


@pytest.mark.some(2)
def test_its_gradients_are_rounded_ones(parts):
    """Near those of the plain model, and others."""
    plain = training.take_apart(Decoder(SMALL, rngs=nnx.Rngs(0)))

    def gradients(parts):
        def loss(params):
            found, _ = training.sums(
                params, parts.buffers, batch(), jax.random.key(0), fixed=parts.fixed,
                teacher=None, graph=parts.graph, teacher_graph=None, objective=OBJECTIVE,
                dtype=None, training=True,
            )  # fmt: skip
            return found.loss

        return jax.tree.leaves(jax.jit(jax.grad(loss))(parts.params)["blocks"])

    found, expected = (jnp.concatenate([x.ravel() for x in gradients(p)]) for p in (parts, plain))
    apart = jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)
    assert 1e-3 < apart < 0.6


def test_its_state_comes_back_from_a_checkpoint(parts, tmp_path):
    state, _ = stepped(parts, begun(parts))
    with StateKeeper(tmp_path) as keeper:
        keeper.save(1, state)
        restored = keeper.latest(begun(parts)).state
    same(stepped(parts, restored, 1)[0].params, stepped(parts, state, 1)[0].params)


def test_gradients_of_zero_give_numbers(parts):
    state = begun(parts)
    for _ in range(2):
        state, metrics = stepped(parts, state, objective=nothing)
        assert int(metrics.bad) == -1
    state, metrics = stepped(parts, state)
    assert int(metrics.bad) == -1 and bool(jnp.isfinite(metrics.means["loss"]))


def test_what_is_saved_is_the_master_weight(parts):
    model = parts.merged(parts.params, parts.buffers)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert len(parametrization.finish(model)) == 7
    assert type(model.blocks[0].attention.q) is nnx.Linear
    same(nnx.to_pure_dict(nnx.state(model, nnx.Param)), before)
