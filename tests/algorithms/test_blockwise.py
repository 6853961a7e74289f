import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms import blockwise, surgery
from algorithms.blockwise import BlockwiseMethod, learn_block
from algorithms.formats import integer
from algorithms.quantization.autoround import autoround
from algorithms.tensors import DenseTensor
from algorithms.walk import NotFiniteError
from tests.algorithms.learning import PATHS, block, flows, output_error, through, weight

METHOD = autoround(format=integer(bits=2, group_size=8), steps=30, batch=2)


def learn(method=METHOD, seed=0, key=0):
    inputs = flows(seed)
    return learn_block(
        block(seed), inputs, through(block(seed), inputs), dict.fromkeys(PATHS, method),
        jax.random.key(key),
    )  # fmt: skip


def test_the_loss_goes_down_and_is_that_of_what_is_stored():
    tensors, loss = learn()
    assert loss.last < 0.8 * loss.first
    plain = {path: METHOD.compress(weight(path)) for path in PATHS}
    np.testing.assert_allclose(loss.first, output_error(plain), rtol=1e-4)
    np.testing.assert_allclose(loss.last, output_error(tensors), rtol=1e-4)


def test_the_best_step_is_kept():
    """Of steps too long to settle, the last is worse than the first, which is plain rounding."""
    wild = autoround(format=integer(bits=4, group_size=8), steps=10, batch=6, learning_rate=0.4)
    kept, last = (learn(wild._replace(keep_best=best))[1] for best in (True, False))
    assert kept.first == last.first and kept.last <= kept.first < last.last


def test_the_block_and_its_activations_are_left_as_they_are():
    model, inputs = block(), flows()
    targets = through(model, inputs)
    learn_block(model, inputs, targets, dict.fromkeys(PATHS, METHOD), jax.random.key(0))
    for path in PATHS:
        np.testing.assert_array_equal(
            surgery.linear_at(model, path).kernel[...],
            surgery.linear_at(block(), path).kernel[...],
        )


def test_blocks_of_one_shape_compile_once():
    learn()
    count = blockwise._learn._cache_size()
    learn(seed=1)
    assert blockwise._learn._cache_size() == count


def test_the_same_key_gives_the_same_bytes_and_another_key_others():
    first, again, other = (learn(key=key)[0] for key in (0, 0, 1))
    leaves = [jax.tree.leaves(tensors) for tensors in (first, again, other)]
    assert all((a == b).all() for a, b in zip(leaves[0], leaves[1], strict=True))
    assert any((a != b).any() for a, b in zip(leaves[0], leaves[2], strict=True))


def test_windows_that_lose_nothing_do_not_decide_which_step_is_best():
    """By its loss alone, a step on windows of zeros would be the best, whatever its parameters."""
    inputs = flows()
    inputs[1] = inputs[1]._replace(residual=0 * inputs[1].residual)
    targets = through(block(), inputs)
    wild = autoround(format=integer(bits=4, group_size=8), steps=10, batch=1, learning_rate=0.4)
    methods = dict.fromkeys(PATHS, wild)
    _, loss = learn_block(block(), inputs, targets, methods, jax.random.key(0))
    assert loss.last <= loss.first


def test_layers_that_are_not_named_stay_as_they_are():
    inputs = flows()
    targets = through(block(), inputs)
    tensors, loss = learn_block(block(), inputs, targets, {"mlp.down": METHOD}, jax.random.key(0))
    assert set(tensors) == {"mlp.down"}
    np.testing.assert_allclose(loss.last, output_error(tensors), rtol=1e-4)


def free(rate, keep_best=True):
    """Not compressed at all: the weight itself is learned, by plain gradient descent."""
    return BlockwiseMethod(
        lambda w: jnp.zeros_like(w), lambda w, p: w + p, lambda w, p: DenseTensor(w + p),
        optax.sgd(rate), 20, 2, keep_best,
    )  # fmt: skip


def halved(seed=0):
    """Targets that the block does not give: so there is something to learn."""
    return [flow._replace(residual=flow.residual / 2) for flow in through(block(seed), flows(seed))]


@pytest.mark.parametrize("keep_best", [False, True])
def test_a_learning_rate_that_diverges_is_named(keep_best):
    methods = dict.fromkeys(PATHS, free(1e9, keep_best))
    with pytest.raises(NotFiniteError, match=r"Learning attention.q, .* of 20: the learning rate"):
        learn_block(block(), flows(), halved(), methods, jax.random.key(0))


def test_activations_that_are_not_finite_are_named():
    inputs = flows()
    inputs[1] = inputs[1]._replace(residual=inputs[1].residual.at[0, 3, 2].set(jnp.inf))
    methods = dict.fromkeys(PATHS, METHOD)
    with pytest.raises(NotFiniteError, match="the activations hold NaN or infinity"):
        learn_block(block(), inputs, halved(), methods, jax.random.key(0))


def test_a_block_is_learned_on_one_schedule():
    methods = {"mlp.up": METHOD, "mlp.down": METHOD._replace(steps=7)}
    with pytest.raises(ValueError, match="steps must be the same .* 7 and 30"):
        learn_block(block(), flows(), halved(), methods, jax.random.key(0))


def test_each_weight_has_the_optimizer_of_its_own_method():
    still = free(0.0)
    methods = {"mlp.up": free(1e-2), "mlp.down": still}
    tensors, _ = learn_block(block(), flows(), halved(), methods, jax.random.key(0))
    for path, moved in (("mlp.up", True), ("mlp.down", False)):
        assert bool((tensors[path].dequantize() != weight(path)).any()) is moved


@pytest.mark.parametrize("count, batch", [(6, 2), (7, 3), (2, 5)])
def test_passes_show_every_window_once(count, batch):
    picks = np.asarray(blockwise._batches(jax.random.key(0), count, 9, batch))
    size = min(batch, count)
    assert picks.shape == (9, size) and 0 <= picks.min() and picks.max() < count
    each = count // size
    for start in range(0, 9 - each, each):
        assert len(np.unique(picks[start : start + each])) == each * size
    assert (picks[:each] != picks[each : 2 * each]).any() or count == 2


def test_a_block_of_zeros_costs_nothing():
    model, inputs = block(), flows()
    for path in PATHS:
        linear = surgery.linear_at(model, path)
        surgery.set_weight(linear, jnp.zeros((linear.out_features, linear.in_features)))
    tensors, loss = learn_block(
        model, inputs, through(model, inputs), dict.fromkeys(PATHS, METHOD), jax.random.key(0)
    )
    assert loss == (0, 0)
    assert not any(tensor.dequantize().any() for tensor in tensors.values())
