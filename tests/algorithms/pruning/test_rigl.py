"""RigL against a port of the official code, its theory, and training without moving masks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms.optimizers.evaluation import eval_params
from algorithms.pruning.masks import top
from algorithms.pruning.rigl import rigl
from algorithms.pruning.set import static
from tests.algorithms.pruning import rigl_official, sparse

SHAPES = {"a": (12, 20), "b": (7, 9)}


def made(inner=None, **settings):
    inner = optax.sgd(0.1, momentum=0.9) if inner is None else inner
    plain = dict(steps=16, every=3, stop=0.75, drop=0.3, sparsity=0.7, match=".*", seed=3)
    return rigl(inner, **{**plain, **settings})


def test_is_the_official_code():
    """Weights and masks over 16 steps. Of the five for masks, the last moves none: f is zero."""
    with jax.enable_x64(True):
        params = sparse.weights(SHAPES)
        start = made().init(params).masks.alive
        official = {
            name: rigl_official.Sparse(
                np.asarray(w), np.asarray(start[name]), begin=0, end=12, frequency=3, drop=0.3,
                anneal="cosine", lr=0.1, momentum=0.9,
            )
            for name, w in params.items()
        }  # fmt: skip
        moved = 0
        for found, alive, gradients, before, state in sparse.steps(made(), params, 16):
            for name, theirs in official.items():
                theirs.rigl(np.asarray(gradients[name]))
                np.testing.assert_array_equal(alive[name], theirs.mask == 1)
                np.testing.assert_allclose(found[name], theirs.mask * theirs.w, rtol=1e-12)
                trace = state.inner[0].trace[name]
                np.testing.assert_allclose(trace, theirs.accumulated, rtol=1e-12, atol=1e-15)
            moved += bool((before.masks.alive["a"] != alive["a"]).any())
        assert moved == 4


def test_the_number_of_weights_never_changes():
    params = sparse.weights(SHAPES)
    counts = rigl_official.erdos_renyi(SHAPES, 0.7)
    for found, alive, _, _, state in sparse.steps(made(optax.adam(0.1)), params, 10):
        for name, count in counts.items():
            assert int(alive[name].sum()) == count
            np.testing.assert_array_equal(jnp.where(alive[name], 0, found[name]), 0)
        evaluated = eval_params(state, found)
        jax.tree.map(np.testing.assert_array_equal, evaluated, found)


def test_grows_where_the_gradient_is_largest_and_drops_the_smallest():
    params = sparse.weights(SHAPES)
    for _, alive, gradients, before, _ in sparse.steps(made(every=4), params, 5):
        old = before.masks.alive
        for name, new in alive.items():
            born, kept = new & ~old[name], new & old[name]
            if not born.any():
                continue
            g = np.abs(gradients[name])
            assert g[born].min() >= g[~new].max()
            assert (kept | born).sum() == old[name].sum()


def test_what_is_born_has_neither_weight_nor_moments():
    params = sparse.weights(SHAPES)
    seen = 0
    for found, alive, _, before, state in sparse.steps(made(optax.adam(0.1)), params, 10):
        born = alive["a"] & ~before.masks.alive["a"]
        seen += int(born.sum())
        for moment in (state.inner[0].mu, state.inner[0].nu, found):
            np.testing.assert_array_equal(moment["a"][born], 0)
    assert seen > 10


def test_experts_are_matrices_of_their_own():
    params = sparse.weights({"experts": (3, 8, 10)})
    *_, (_, alive, *_) = sparse.steps(made(distribution="uniform"), params, 10)
    np.testing.assert_array_equal(alive["experts"].sum((1, 2)), [24] * 3)


def test_reaches_a_loss_that_fixed_masks_do_not():
    """Inputs of which five in forty matter: a mask drawn beforehand misses most of them."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(256, 40)), jnp.float32)
    w = jnp.zeros((40, 10)).at[:5].set(rng.normal(size=(5, 10)))

    def loss(params):
        return jnp.mean((x @ params["w"] - x @ w) ** 2)

    def trained(optimizer):
        params, state = sparse.begun(optimizer, {"w": jnp.full((40, 10), 1e-3)})

        @jax.jit
        def step(params, state):
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(150):
            params, state = step(params, state)
        return float(loss(params))

    plain = dict(sparsity=0.85, distribution="uniform", match=".*")
    moving = trained(rigl(optax.adam(0.03), steps=150, every=5, **plain))
    assert moving < 0.05 * trained(static(optax.adam(0.03), **plain))


def test_a_first_layer_may_stay_dense():
    params = sparse.weights(SHAPES)
    state = made(match="b").init(params)
    assert state.masks.alive["a"] == optax.MaskedNode()
    assert int(state.masks.alive["b"].sum()) == 63 - 44  # ⌊0.7 · 63⌋ of the only layer


def test_top_takes_so_many_and_the_first_of_equals():
    scores = jnp.array([[1.0, 3, 3, 3, 2], [0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(
        top(scores, jnp.array([2, 3])), [[0, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    )


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(sparsity=1.0), "sparsity=1.0 must be from 0 to below 1"),
        (dict(distribution="er"), "distribution='er' must be uniform or erk"),
        (dict(every=0), "every=0 must be at least 1"),
        (dict(drop=1.5), "drop=1.5 must be above 0 and at most 1"),
        (dict(stop=0.0), "stop=0.0 must be above 0 and at most 1"),
        (dict(match="("), "match='\\(' is no regular expression"),
        (dict(match="c"), "match='c' matches no matrix among a, b"),
    ],
)
def test_bad_settings_are_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        made(**settings).init(sparse.weights(SHAPES))
