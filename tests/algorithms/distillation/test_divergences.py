"""Divergences against ports of official code, their theory, and hard labels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.distillation import divergences as d
from algorithms.distillation.masking import masked_mean, mean_of_sequences
from tests.algorithms.distillation import divergences_official as official

ALL = {
    "forward_kl": d.forward_kl,
    "reverse_kl": d.reverse_kl,
    "jsd": functools.partial(d.jsd, beta=0.3),
    "total_variation": d.total_variation,
    "skewed_forward_kl": d.skewed_forward_kl,
    "skewed_reverse_kl": d.skewed_reverse_kl,
}
WITHOUT_LOGITS = ["forward_kl", "reverse_kl", "jsd"]


@pytest.fixture(params=ALL)
def make(request):
    return ALL[request.param]


def logits(seed=0, shape=(2, 5, 11), spread=2.0):
    """A student's and a teacher's, and a mask."""
    rng = np.random.default_rng(seed)
    mask = rng.random(shape[:-1]) < 0.7
    mask.flat[0] = True
    both = (jnp.asarray(spread * rng.normal(size=shape)) for _ in range(2))
    return *both, jnp.asarray(mask)


def port(function, *arrays, **settings):
    return function(*map(np.asarray, arrays), **settings)


@pytest.mark.parametrize("name, theirs", [
    ("reverse_kl", official.reverse_kl),
    ("jsd", functools.partial(official.js_distance, lam=0.7)),
    ("total_variation", official.tv_distance),
    ("skewed_reverse_kl", official.skewed_reverse_kl),
])  # fmt: skip
def test_equals_the_code_of_distillm(x64, name, theirs):
    for seed in range(5):
        arrays = logits(seed)
        np.testing.assert_allclose(ALL[name]()(*arrays), port(theirs, *arrays), rtol=1e-12)


@pytest.mark.parametrize("name", ["forward_kl", "skewed_forward_kl"])
def test_is_the_cross_entropy_of_distillm_less_the_teachers_entropy(x64, name):
    for seed in range(5):
        s, t, mask = logits(seed)
        theirs = port(getattr(official, name), s, t, mask) - port(official.entropy, t, mask)
        np.testing.assert_allclose(ALL[name]()(s, t, mask), theirs, rtol=1e-11)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_equals_the_code_of_trl(x64, beta, temperature):
    s, t, mask = logits()
    settings = dict(temperature=temperature, rescale=False)
    ends = {0.0: d.forward_kl, 1.0: d.reverse_kl}
    ours = ends.get(beta, functools.partial(d.jsd, beta=beta))(**settings)
    theirs = port(official.generalized_jsd, s, t, mask, beta=beta, temperature=temperature)
    np.testing.assert_allclose(ours(s, t, mask), theirs, rtol=1e-12)


def test_is_positive_but_for_the_teacher_itself_whatever_is_added_to_all_logits(x64, make):
    s, t, _ = logits()
    shift = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 5, 1)))
    loss = make(temperature=1.7).per_token
    assert (loss(s, t) > 0.01).all()
    np.testing.assert_allclose(loss(s + shift[0], t + shift[1]), loss(s, t), rtol=1e-10)
    np.testing.assert_allclose(loss(t + shift[0], t), 0, atol=1e-14)


@pytest.mark.parametrize("loss", [d.jsd(), d.total_variation()])
def test_is_symmetric(x64, loss):
    s, t, _ = logits()
    np.testing.assert_allclose(loss(s, t), loss(t, s), rtol=1e-12)


def test_others_are_not_symmetric():
    s, t, _ = logits()
    for loss in (d.forward_kl(), d.jsd(beta=0.3), d.skewed_forward_kl()):
        assert abs(loss(s, t) / loss(t, s) - 1) > 1e-3


def test_jsd_goes_to_the_kls_at_its_ends(x64):
    s, t, _ = logits()
    b = 1e-7
    forward, reverse = d.forward_kl()(s, t), d.reverse_kl()(s, t)
    np.testing.assert_allclose(d.jsd(beta=b)(s, t) / b, forward, rtol=1e-5)
    np.testing.assert_allclose(d.jsd(beta=1 - b)(s, t) / b, reverse, rtol=1e-5)


def test_skewed_kls_go_to_the_kls(x64):
    s, t, _ = logits()
    for skewed, plain in ((d.skewed_forward_kl, d.forward_kl),
                          (d.skewed_reverse_kl, d.reverse_kl)):  # fmt: skip
        np.testing.assert_allclose(skewed(skew=1e-9)(s, t), plain()(s, t), rtol=1e-6)


def test_stays_below_its_bound_however_far_the_two_are():
    s, t, _ = logits(spread=60.0)
    bounds = [
        (d.jsd(), np.log(2)), (d.total_variation(), 1), (d.skewed_forward_kl(), -np.log(0.1)),
        (d.skewed_reverse_kl(skew=0.2), -np.log(0.2)),
    ]  # fmt: skip
    for loss, bound in bounds:
        assert 0.5 * bound < loss.per_token(s, t).max() <= bound + 1e-5
    assert d.forward_kl().per_token(s, t).max() > 10


def test_total_variation_is_at_most_what_pinskers_inequality_says(x64):
    for spread in (0.01, 0.3, 1.0, 3.0):
        s, t, _ = logits(spread=spread)
        bound = np.sqrt(d.forward_kl().per_token(s, t) / 2)
        assert (d.total_variation().per_token(s, t) <= bound).all()


def test_rescaled_at_high_temperatures_it_compares_centred_logits(x64):
    """Hinton et al., Eq. 4. JSD(β) is β (1 - β) of a KL there."""
    s, t, _ = logits()
    apart = (t - t.mean(-1, keepdims=True)) - (s - s.mean(-1, keepdims=True))
    squares, sizes = (apart**2).mean() / 2, np.abs(apart).mean() / 2
    of = {"jsd": 0.3 * 0.7 * squares, "total_variation": sizes, "skewed_forward_kl": 0.81 * squares,
          "skewed_reverse_kl": 0.81 * squares}  # fmt: skip
    for name, make in ALL.items():
        found = make(temperature=1e4)(s, t)
        np.testing.assert_allclose(found, of.get(name, squares), rtol=1e-3, err_msg=name)


def test_without_rescaling_it_falls_with_the_temperature(x64):
    s, t, _ = logits()
    settings = dict(temperature=100.0)
    for make, factor in ((d.forward_kl, 1e4), (d.jsd, 1e4), (d.total_variation, 1e2)):
        plain = make(**settings, rescale=False)(s, t)
        np.testing.assert_allclose(make(**settings)(s, t) / plain, factor)


def test_slopes_are_those_of_finite_differences(x64, make):
    s, t, mask = logits(shape=(1, 3, 5))
    loss = functools.partial(make(temperature=1.3), teacher=t, mask=mask)
    found, step = jax.grad(lambda s: loss(s))(s), 1e-6
    for at in np.ndindex(s.shape):
        e = np.zeros_like(s)
        e[at] = step
        np.testing.assert_allclose(found[at], (loss(s + e) - loss(s - e)) / (2 * step), atol=1e-8)


def test_a_certain_teacher_is_a_label(x64):
    s, _, mask = logits()
    labels = np.random.default_rng(2).integers(11, size=s.shape[:-1])
    log_q = official.log_softmax(np.asarray(s))
    expected = -np.take_along_axis(log_q, labels[..., None], -1)[..., 0]
    found = d.forward_kl()(s, 1000.0 * jnp.eye(11)[labels], mask)
    np.testing.assert_allclose(found, expected[np.asarray(mask)].mean(), rtol=1e-12)


@pytest.mark.parametrize("name", WITHOUT_LOGITS)
@pytest.mark.parametrize("rescale", [True, False])
def test_without_logits_it_is_the_same_and_so_are_its_slopes(x64, name, rescale):
    rng = np.random.default_rng(3)
    h_s, w_s, h_t, w_t = (jnp.asarray(rng.normal(size=shape)) for shape in
                          ((2, 5, 4), (11, 4), (2, 5, 6), (11, 6)))  # fmt: skip
    mask, loss = logits()[2], ALL[name](temperature=2.0, rescale=rescale)

    def dense(h_s, w_s):
        return loss(h_s @ w_s.T, h_t @ w_t.T, mask)

    def linear(h_s, w_s):
        return loss.linear(h_s, w_s, h_t, w_t, mask)

    both = (jax.value_and_grad(f, (0, 1))(h_s, w_s) for f in (linear, dense))
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13)


def test_what_no_kernel_computes_says_so():
    h, w = jnp.ones((3, 4)), jnp.ones((5, 4))
    with pytest.raises(ValueError, match="needs logits: forward_kl, reverse_kl and jsd"):
        d.total_variation().linear(h, w, h, w)


def test_the_teacher_is_not_differentiated(make):
    s, t, _ = logits()
    assert not jnp.any(jax.grad(lambda t: make()(s, t))(t))


def test_bfloat16_logits_give_float32_losses(make):
    s, t, mask = logits()
    s, t = (x.astype(jnp.bfloat16) for x in (s, t))
    found = make()(s, t, mask)
    assert found.dtype == jnp.float32
    wide = make()(s.astype(jnp.float32), t.astype(jnp.float32), mask)
    np.testing.assert_allclose(found, wide, rtol=1e-6)


def test_forward_covers_two_modes_and_reverse_seeks_one():
    """Of students that have one bump: where the nearest one lies, between or on a mode."""
    x = np.arange(-30.0, 71.0)
    teacher = np.logaddexp(-((x - 8) ** 2) / 18, -((x - 32) ** 2) / 18)
    middle, width = np.meshgrid(np.arange(5.0, 36.0), np.arange(1.0, 16.0), indexing="ij")
    students = -((x - middle[..., None]) ** 2) / (2 * width[..., None] ** 2)

    def nearest(loss):
        both = jnp.asarray(students), jnp.broadcast_to(teacher, students.shape)
        found = loss.per_token(*both)
        at = np.unravel_index(np.argmin(found), found.shape)
        return middle[at], width[at]

    assert nearest(d.forward_kl()) == (20, 12)  # √(9 + 12²) is 12.4: the moments of both
    assert nearest(d.reverse_kl()) in [(8, 3), (32, 3)]


def test_a_teachers_distributions_teach_more_than_labels_drawn_from_them():
    """A linear student of few examples: the KL on others, of the KL and of hard labels."""
    rng = np.random.default_rng(4)
    x, w = rng.normal(size=(1040, 8)), rng.normal(size=(8, 5)) / 2
    teacher = jnp.asarray(x @ w, jnp.float32)
    x = jnp.asarray(x, jnp.float32)
    drawn = jax.random.categorical(jax.random.key(0), teacher[:40])
    few, targets = x[:40], {"soft": teacher[:40], "hard": 30.0 * jax.nn.one_hot(drawn, 5)}

    def trained(target):
        loss = d.forward_kl()
        step = jax.grad(lambda w: loss(few @ w, target))
        return jax.lax.fori_loop(0, 500, lambda _, w: w - 0.5 * step(w), jnp.zeros((8, 5)))

    found = {n: d.forward_kl()(x[40:] @ trained(t), teacher[40:]) for n, t in targets.items()}
    assert found["soft"] < 0.1 * found["hard"]


def test_means_are_over_what_the_mask_keeps():
    values = jnp.asarray([[1.0, 2.0, jnp.nan], [4.0, jnp.nan, jnp.nan]])
    mask = jnp.asarray([[True, True, False], [True, False, False]])
    assert masked_mean(values, mask) == pytest.approx(7 / 3)
    assert mean_of_sequences(values, mask) == pytest.approx((1.5 + 4) / 2)
    weights = jnp.asarray([[3.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert masked_mean(values, weights) == mean_of_sequences(values, weights) == 1.25
    assert masked_mean(values, mask & False) == mean_of_sequences(values, mask & False) == 0
    assert masked_mean(values[:, :1]) == mean_of_sequences(values[:, :1]) == 2.5


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: d.forward_kl(temperature=0.0), "temperature=0.0 must be positive"),
        (lambda: d.total_variation(temperature=-1.0), "temperature=-1.0 must be positive"),
        (lambda: d.jsd(beta=0.0), "beta=0.0 must lie between 0 and 1"),
        (lambda: d.skewed_forward_kl(skew=1.0), "skew=1.0 must lie between 0 and 1"),
        (lambda: d.skewed_reverse_kl(skew=0.0), "skew=0.0 must lie between 0 and 1"),
    ],
)
def test_bad_settings_are_named(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
