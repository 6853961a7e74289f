"""Sub-networks by masks, and the sandwich rule around an objective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from algorithms.distillation.divergences import forward_kl
from algorithms.objectives import CrossEntropy
from algorithms.search.once_for_all import Place, space, subnetwork, unit_masks
from algorithms.search.slimmable import Sandwich, sandwich
from algorithms.training import Batch
from models.mlp import MLPClassifier
from tests.algorithms.search import slimmable_official as official

INPUTS, WIDTH, CLASSES = 5, 8, 3
WIDTHS = (2, 4, 6, 8)
PLACES = (
    ("layers.0.kernel", Place((None, "feed_forward"))),
    ("layers.0.bias", Place(("feed_forward",))),
    ("layers.1.kernel", Place(("feed_forward", None))),
    ("layers.1.bias", Place((None,))),
)
SPACE = space({"feed_forward": WIDTH}, {"feed_forward": WIDTHS})
SIZES = {"layers": 3, "hidden": 8, "heads": 6, "kv_heads": 2, "feed_forward": 16}


def model():
    return MLPClassifier(INPUTS, [WIDTH], CLASSES, rngs=nnx.Rngs(0))


def batch(n=7):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(n, INPUTS)).astype(np.float32)
    return Batch(jnp.asarray(x), jnp.asarray(rng.integers(0, CLASSES, n)))


def objective(**rule):
    made = sandwich(feed_forward=WIDTHS, **{"distilled": forward_kl(), **rule})
    return Sandwich(objective=CrossEntropy(), rule=made, space=SPACE, places=PLACES)


def weights(of):
    layers = [(each.kernel[...], each.bias[...]) for each in of.layers]
    return [np.asarray(x, np.float64) for pair in layers for x in pair]


def total(wanted, params, graph, key, data):
    found = wanted(nnx.merge(graph, params), None, data, key, training=True)
    return found.loss / found.positions


GRADIENT = jax.jit(jax.value_and_grad(total, argnums=1), static_argnums=(0, 2))


@pytest.mark.parametrize("share", [1.0, 0.25, 0.0])
def test_a_step_is_the_official_one(share):
    """Its loss, less the entropy of the soft targets; and slopes by differences of it. share: of
    what the whole network says, beside the targets.
    """
    distilled = share > 0
    rule = {"distilled": forward_kl(), "share": share} if distilled else {"distilled": None}
    wanted = objective(**rule, random=2)
    key, data = jax.random.key(3), batch()
    graph, params = nnx.split(model())
    loss, grads = GRADIENT(wanted, params, graph, key, data)
    drawn = SPACE.drawn(jax.random.split(key)[1], 2)["feed_forward"]
    widths = [WIDTH, *map(int, drawn), WIDTHS[0]]
    x, y, w = np.asarray(data.inputs, np.float64), np.asarray(data.targets), weights(model())
    (whole, *soft), (_, *hard) = (
        official.losses(x, y, w, widths, taught) for taught in (True, False)
    )
    each = [share * (s - official.entropy(x, w, WIDTH)) + (1 - share) * h
            for s, h in zip(soft, hard, strict=True)]  # fmt: skip
    assert float(loss) == pytest.approx(whole + sum(each), rel=1e-5)
    if not distilled:  # else the soft targets would move too, which are held still
        for array, place in ((0, (1, 0)), (0, (1, 3)), (2, (1, 2)), (2, (5, 0))):
            moved = []
            for step in (1e-5, -1e-5):
                changed = [each.copy() for each in w]
                changed[array][place] += step
                moved.append(sum(official.losses(x, y, changed, widths, False)))
            kernel = grads["layers"][array // 2]["kernel"]
            assert float(kernel[...][place]) == pytest.approx(
                (moved[0] - moved[1]) / 2e-5, rel=1e-3, abs=1e-5
            )


def test_the_gradient_of_shared_weights_is_the_sum_over_networks():
    """The teacher is held still: a step of all is the step of each, added up."""
    graph, params = nnx.split(model())
    key, data = jax.random.key(0), batch()
    whole = GRADIENT(objective(random=0, smallest=False), params, graph, key, data)[1]
    both = GRADIENT(objective(random=0), params, graph, key, data)[1]
    taught = jax.nn.softmax(model()(data.inputs))

    def alone(params):
        said = subnetwork(nnx.merge(graph, params), SPACE.smallest(), SPACE, PLACES)
        log_q = jax.nn.log_softmax(said(data.inputs))
        return jnp.mean(jnp.sum(taught * (jnp.log(taught) - log_q), -1))

    small = jax.grad(alone)(params)
    jax.tree.map(
        lambda b, w, s: np.testing.assert_allclose(b, w + s, rtol=1e-4, atol=1e-6),
        both, whole, small,
    )  # fmt: skip
    outside = small["layers"][0]["kernel"][...][:, WIDTHS[0] :]
    assert not np.any(outside)  # what the smallest one lacks learns nothing from it


def test_every_draw_runs_the_same_program():
    graph, params = nnx.split(model())
    wanted, data, traces = objective(), batch(), []

    @jax.jit
    def step(key):
        traces.append(key)
        return total(wanted, params, graph, key, data)

    found = {float(step(jax.random.key(n))) for n in range(8)}
    assert len(traces) == 1 and len(found) > 3


def test_a_whole_network_alone_is_its_objective():
    """The trivial case: nothing beside it; and evaluated, the smallest is looked at."""
    data, key = batch(), jax.random.key(0)
    plain = CrossEntropy()(model(), None, data, key, training=True)
    alone = objective(random=0, smallest=False)(model(), None, data, key, training=True)
    assert float(alone.loss) == pytest.approx(float(plain.loss), rel=1e-6)
    seen = objective()(model(), None, data, key, training=False)
    assert float(seen.loss) == pytest.approx(float(plain.loss), rel=1e-6)
    z = official.logits(np.asarray(data.inputs, np.float64), weights(model()), WIDTHS[0])
    expected = -official.log_softmax(z)[np.arange(7), np.asarray(data.targets)].sum()
    assert float(seen.watched["smallest"]) == pytest.approx(expected, rel=1e-5)


def test_draws_are_choices_and_take_all_of_them():
    found = space(SIZES, {"layers": [3, 1], "kv_heads": [1, 2]})
    assert len(found) == 4 and len(list(found)) == 4
    drawn = found.drawn(jax.random.key(0), 200)
    pairs = {(int(a), int(b)) for a, b in zip(drawn["layers"], drawn["kv_heads"], strict=True)}
    assert pairs == {(1, 1), (1, 2), (3, 1), (3, 2)}
    assert found.smallest() == {"layers": 1, "kv_heads": 1}
    assert found.counts({"kv_heads": 1}) == {**SIZES, "kv_heads": 1, "heads": 3}


def test_heads_that_count_are_the_first_of_each_group():
    found = unit_masks({**SIZES, "heads": 4}, SIZES)
    assert found["heads"].tolist() == [True, True, False, True, True, False]
    found = unit_masks({**SIZES, "heads": 3, "kv_heads": 1}, SIZES)
    assert found["heads"].tolist() == [True] * 3 + [False] * 3
    assert found["kv_heads"].tolist() == [True, False]


@pytest.mark.parametrize(
    "choices, sentence",
    [
        ({"layers": None}, "layers are all null"),
        ({"layers": [1, 2]}, r"layers=\[1, 2\] leaves out 3"),
        ({"layers": [0, 3]}, r"layers=\[0, 3\] must be different sizes from 1 to the 3"),
        ({"layers": [3, 3]}, "must be different sizes"),
        ({"layers": []}, "must be different sizes"),
        ({"heads": [3, 6]}, "3 is no multiple: choose kv_heads"),
        ({"heads": [4, 6], "kv_heads": [1, 2]}, "give one of the two"),
    ],
)
def test_choices_that_a_network_does_not_have_are_refused(choices, sentence):
    with pytest.raises(ValueError, match=sentence):
        space(SIZES, choices)


@pytest.mark.parametrize(
    "rule, sentence",
    [
        ({"random": -1}, "random=-1 must not be negative"),
        ({"random": 0, "largest": False, "smallest": False}, "leave nothing to train"),
        ({"largest": False}, "set distilled=null"),
        ({"share": 0}, "share=0 must be above 0"),
    ],
)
def test_rules_that_train_nothing_are_refused(rule, sentence):
    with pytest.raises(ValueError, match=sentence):
        objective(**rule)
