"""What every sparse training promises, those included that join later, by conf/sparsity."""

from pathlib import Path

import hydra
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from omegaconf import OmegaConf

from algorithms.optimizers.evaluation import eval_params, start_params
from experiments.checkpoints.state import StateKeeper
from experiments.configuration import CONF
from models.decoder import Decoder
from tests.experiments.test_optimizer_contract import gradients, same, shapes
from tests.experiments.test_precision_contract import SMALL

SPARSITIES = sorted(path.stem for path in Path(CONF, "sparsity").glob("*.yaml"))
RUN = {"steps": 8, "seeds": {"method": 0}}


@pytest.fixture(scope="module", params=[name for name in SPARSITIES if name != "none"])
def optimizer(request):
    """Around AdamW, with masks that move every other step where they move."""
    own = OmegaConf.load(Path(CONF, "sparsity", f"{request.param}.yaml"))
    config = OmegaConf.create({**RUN, "sparsity": own})
    if "every" in config.sparsity:
        config.sparsity.every = 2
    return hydra.utils.instantiate(config.sparsity)(optax.adamw(3e-2))


@pytest.fixture(scope="module")
def params():
    return nnx.state(Decoder(SMALL, rngs=nnx.Rngs(0)), nnx.Param)


def stepped(optimizer, params, state, step):
    updates, state = optimizer.update(gradients(params, step), state, params)
    return optax.apply_updates(params, updates), state


def run(optimizer, params, steps=8):
    """The parameters and states from the first step on; one program serves them all."""

    @jax.jit
    def one(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    params, found = start_params(state, params), []
    for n in range(steps):
        found.append((params, state))
        params, state = one(params, state, gradients(params, n))
    assert one._cache_size() == 1
    return [*found, (params, state)]


@pytest.fixture(scope="module")
def course(optimizer, params):
    return run(optimizer, params)


def test_what_is_pruned_is_exactly_zero_at_each_step(course):
    for params, state in course:
        masks = state.masks
        masks.map(lambda m, p: np.testing.assert_array_equal(jnp.where(m, 0, p), 0), params)
        same(eval_params(state, params), params)
    alive = sum(int(m.sum()) for m in jax.tree.leaves(masks))
    assert alive < 0.25 * sum(m.size for m in jax.tree.leaves(masks))


def test_what_is_not_pruned_moves(course):
    params, state = course[-1]
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), params, course[0][0])
    assert all(jax.tree.leaves(changed))


def test_it_takes_plain_pytrees_as_it_takes_nnx(optimizer, params, course):
    plain, _ = run(optimizer, nnx.to_pure_dict(params), 3)[-1]
    same(plain, course[3][0])


def test_structure_and_dtypes_are_kept(optimizer, params):
    for dtype in (jnp.float32, jnp.bfloat16):
        cast = jax.tree.map(lambda x: x.astype(dtype), params)  # noqa: B023
        state = jax.jit(optimizer.init)(cast)
        after, later = jax.eval_shape(lambda p, s: stepped(optimizer, p, s, 0), cast, state)
        assert shapes(after) == shapes(cast)
        assert shapes(later) == shapes(state)
        weak = [x.weak_type for x in jax.tree.leaves(later)]
        assert weak == [getattr(x, "weak_type", False) for x in jax.tree.leaves(state)]


@pytest.mark.some(1)
def test_masked_leaves_are_left_alone(optimizer, params):
    """In two steps, of which one may be for the masks alone."""
    half = jax.tree.unflatten(
        jax.tree.structure(params), [n % 2 == 0 for n in range(len(jax.tree.leaves(params)))]
    )
    others = jax.tree.map(lambda x: not x, half)
    masked = optax.chain(optax.masked(optimizer, half), optax.masked(optax.set_to_zero(), others))
    state = jax.jit(masked.init)(params)
    step, found = jax.jit(lambda p, s: stepped(masked, p, s, 0)), params
    for _ in range(2):
        found, state = step(found, state)
    for after, before, moves in zip(*map(jax.tree.leaves, (found, params, half)), strict=True):
        assert bool(jnp.any(after != before)) == moves
    assert shapes(eval_params(state, found)) == shapes(params)


def test_its_state_comes_back_from_a_checkpoint(optimizer, params, course, tmp_path):
    trained, state = course[4]
    with StateKeeper(tmp_path) as keeper:
        keeper.save(1, {"params": trained, "state": state})
        template = {"params": params, "state": jax.jit(optimizer.init)(params)}
        restored = keeper.latest(template).state
    step = jax.jit(lambda p, s: stepped(optimizer, p, s, 4))
    same(step(restored["params"], restored["state"])[0], course[5][0])


def test_gradients_of_zero_give_numbers(optimizer, params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = jax.jit(optimizer.init)(zeros)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(zeros, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        zeros, state = step(zeros, state)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(zeros))
