"""What every optimizer promises, those included that join later: conf/optimizer is the list.

So does AdamW in each of conf/outer and conf/averaging.
"""

import functools
from pathlib import Path

import hydra
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from omegaconf import OmegaConf

from algorithms.optimizers.evaluation import eval_params
from experiments.checkpoints.state import StateKeeper
from experiments.configuration import CONF
from experiments.papers.lookup import Run, compose
from experiments.training.building import build_optimizer

OPTIMIZERS = [
    (group, path.stem)
    for group in ("optimizer", "outer", "averaging")
    for path in sorted(Path(CONF, group).glob("*.yaml"))
    if path.stem != "none"
]
STEPS = 3
NO_NUMBERS = {"prodigy": "optax's estimate of the distance is 0/0 until a gradient is not zero"}


class Layer(nnx.Module):
    """A matrix with its bias and, as a mixture has them, one for each of three experts."""

    def __init__(self, rngs):
        self.q = nnx.Linear(8, 12, rngs=rngs)
        self.experts = nnx.Linear(1, 1, use_bias=False, rngs=rngs)
        self.experts.kernel.set_value(jax.random.normal(rngs.params(), (3, 6, 4)))


class Model(nnx.Module):
    """Few parameters, each of a kind of its own and named as a decoder's are."""

    def __init__(self, rngs):
        self.stem = nnx.Dict(embed=nnx.Embed(10, 8, rngs=rngs))
        self.blocks = nnx.List([Layer(rngs)])
        self.tail = nnx.Dict(head=nnx.Linear(8, 10, use_bias=False, rngs=rngs))


def instantiated(group, name):
    chosen = OmegaConf.load(Path(CONF, group, f"{name}.yaml"))
    return hydra.utils.instantiate(OmegaConf.create({"steps": 20, "chosen": chosen}).chosen)


@pytest.fixture(scope="module", params=OPTIMIZERS, ids="-".join)
def optimizer(request):
    group, _ = request.param
    made = instantiated(*request.param)
    if group != "optimizer":
        made = made(instantiated("optimizer", "adamw"))
    return optax.with_extra_args_support(made)


@pytest.fixture(scope="module")
def params():
    """An nnx state: a mixture's experts, vectors and embeddings among the leaves."""
    return nnx.state(Model(nnx.Rngs(0)), nnx.Param)


def gradients(params, step):
    """Of a quadratic around random numbers: what moves by them has somewhere to go."""
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    aims = [jnp.asarray(rng.normal(size=(5, *x.shape)), x.dtype)[step % 5] for x in leaves]
    return jax.tree.unflatten(structure, [x - a for x, a in zip(leaves, aims, strict=True)])


def stepped(optimizer, params, state, step):
    def value(p):
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(p))

    updates, state = optimizer.update(
        gradients(params, step), state, params, value=value(params), loss=value(params),
        value_fn=value, grad=gradients(params, step),
        grad_fn=lambda p, _=None: gradients(p, step), obj_fn=value,
    )  # fmt: skip
    return optax.apply_updates(params, updates), state


@functools.lru_cache(maxsize=2)  # an optimizer's programs serve all of its tests
def compiled(optimizer):
    def step(params, state, n):
        return stepped(optimizer, params, state, n)

    return jax.jit(optimizer.init), jax.jit(step), step


def run(optimizer, params, *, jitted=True, steps=STEPS):
    init, step, eager = compiled(optimizer)
    if not jitted:
        init, step = optimizer.init, eager
    state = init(params)
    for n in range(steps):
        params, state = step(params, state, n % 5)  # as many programs
    return params, state


def same(found, expected, tolerance=0.0):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(numbers(a), numbers(b), rtol=tolerance, atol=tolerance)


def numbers(leaf):
    """A key's too."""
    key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if key else leaf, np.float64)


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(lambda: tree))


@pytest.mark.some(11)
def test_it_is_the_same_jitted_as_eager(optimizer, params):
    with jax.disable_jit(False):
        same(run(optimizer, params)[0], run(optimizer, params, jitted=False)[0], 2e-5)


@pytest.mark.parametrize("name", [name for group, name in OPTIMIZERS if group == "optimizer"])
def test_it_follows_a_schedule(name, params):
    """As the trainer builds it: every learning rate is a function of the step."""
    built = build_optimizer(compose(Run("train", (f"optimizer={name}", "schedule=cosine"))))
    after, _ = jax.eval_shape(lambda p: stepped(built, p, built.init(p), 0), params)
    assert shapes(after) == shapes(params)


@pytest.mark.some(15)
def test_it_takes_plain_pytrees_as_it_takes_nnx(optimizer, params):
    same(run(optimizer, nnx.to_pure_dict(params))[0], run(optimizer, params)[0])


@pytest.mark.some(15)
def test_structure_and_dtypes_are_kept(optimizer, params):
    """So that a training loop compiles once, and bfloat16 stays bfloat16."""
    for dtype in (jnp.float32, jnp.bfloat16):
        cast = jax.tree.map(lambda x: x.astype(dtype), params)  # noqa: B023
        state = jax.jit(optimizer.init)(cast)
        after, later = jax.eval_shape(lambda p, s: stepped(optimizer, p, s, 0), cast, state)
        assert shapes(after) == shapes(cast)
        assert shapes(later) == shapes(state)
        weak = [x.weak_type for x in jax.tree.leaves(later)]
        assert weak == [getattr(x, "weak_type", False) for x in jax.tree.leaves(state)]


@pytest.mark.some(15)
def test_masked_leaves_are_left_alone(optimizer, params):
    """Of every second leaf: the others move as they do alone."""
    half = jax.tree.unflatten(
        jax.tree.structure(params), [n % 2 == 0 for n in range(len(jax.tree.leaves(params)))]
    )
    masked = optax.with_extra_args_support(
        optax.chain(
            optax.masked(optimizer, half),
            optax.masked(optax.set_to_zero(), jax.tree.map(lambda x: not x, half)),
        )
    )
    found, _ = run(masked, params)
    whole = zip(*(jax.tree.leaves(t) for t in (found, params, half)), strict=True)
    for after, before, moves in whole:
        assert bool(jnp.any(after != before)) == moves


def test_its_state_comes_back_from_a_checkpoint(optimizer, params, tmp_path):
    trained, state = run(optimizer, params)
    with StateKeeper(tmp_path) as keeper:
        keeper.save(1, {"params": trained, "state": state})
        init, step, _ = compiled(optimizer)
        template = {"params": params, "state": init(params)}
        restored = keeper.latest(template).state
    again = step(restored["params"], restored["state"], STEPS)
    same(again, step(trained, state, STEPS))


@pytest.mark.some(15)
def test_gradients_of_zero_give_numbers(optimizer, params, request):
    _, name = request.node.callspec.params["optimizer"]
    if name in NO_NUMBERS:
        pytest.skip(NO_NUMBERS[name])
    state = jax.jit(optimizer.init)(params)
    zeros = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(
            zeros, state, params, value=jnp.zeros(()), loss=jnp.zeros(()), grad=zeros,
            value_fn=lambda p: jnp.zeros(()), grad_fn=lambda p, _=None: zeros,
            obj_fn=lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p)),
        )  # fmt: skip
        return optax.apply_updates(params, updates), state

    for _ in range(2):
        params, state = step(params, state)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(params))


def test_it_goes_downhill(optimizer, params):
    """By the distance to where the gradients point, of everything that it moves."""

    def distance(params):
        return sum(
            float(sum(jnp.sum(x**2) for x in jax.tree.leaves(gradients(params, n))))
            for n in range(5)
        )

    assert distance(run(optimizer, params, steps=20)[0]) < distance(params)


def test_what_it_evaluates_is_like_what_it_trains(optimizer, params):
    trained, state = run(optimizer, params)
    evaluated = jax.jit(eval_params)(state, trained)
    assert shapes(evaluated) == shapes(trained)
    assert jax.tree.structure(evaluated) == jax.tree.structure(trained)
