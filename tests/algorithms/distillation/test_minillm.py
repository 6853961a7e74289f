"""MiniLLM against a port of the official code, the policy gradient theorem, and naive slopes.

The deviations are those of the module.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.distillation import minillm as m
from tests.algorithms.distillation import minillm_official as official

B, T, V = 4, 6, 7
MASK = jnp.arange(T) < jnp.asarray([6, 3, 5, 1])[:, None]
OFFICIAL = dict(teacher_share=0.2, reward_scale=0.5, discount=0.95, ratio_clip=0.2)


def case(seed=0):
    """Logits of the student that sampled, of the one that is trained, of the teacher; tokens."""
    rng = np.random.default_rng(seed)
    old, teacher = (rng.normal(size=(B, T, V)) * 1.5 for _ in range(2))
    now = old + 0.3 * rng.normal(size=old.shape)
    tokens = rng.integers(V, size=(B, T))
    return *map(jnp.asarray, (old, now, teacher)), jnp.asarray(tokens, jnp.int32)


@pytest.mark.parametrize("clip", [100.0, 0.8])
@pytest.mark.parametrize("share", [0.2, 0.0])
@pytest.mark.some(2)
def test_equals_the_official_code(x64, share, clip):
    """Rewards, weights, advantages and the two losses, of masked and unequal sequences."""
    for seed in range(10):
        old, now, teacher, tokens = case(seed)
        np_old, np_now, np_teacher, ids, mask = map(np.asarray, (old, now, teacher, tokens, MASK))
        log_q, log_p = (
            official.get_log_probs(np_old, ids, mask),
            official.reward_fn(np_teacher, ids, mask),
        )
        reward = official.rewards(log_q, log_p, scaling=0.5, clip=clip)
        w = official.weights(log_q, log_p, share or None)
        advantage = official.advantages(reward, mask, 0.95)
        now_log_q = official.get_log_probs(np_now, ids, mask)
        policy = official.pg_loss(now_log_q, log_q, advantage, mask, w, cliprange=0.2)
        single = official.reg_loss(np_now, np_teacher, mask)

        method = m.minillm(**{**OFFICIAL, "teacher_share": share}, reward_clip=clip)
        rollout = method.score(*(m.log_probabilities(x, tokens) for x in (old, teacher)), MASK)
        np.testing.assert_allclose(rollout.rewards, reward, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(rollout.weights, w, rtol=1e-10)
        ours = m.whiten(m.normalized_return(rollout.rewards, MASK, 0.95))
        np.testing.assert_allclose(ours, advantage, rtol=1e-9)
        found = method.loss(now, teacher, tokens, MASK, rollout)
        np.testing.assert_allclose(found, policy + single, rtol=1e-10)
        alone = m.minillm(**{**OFFICIAL, "teacher_share": share}, reward_clip=clip,
                          single_step=False)  # fmt: skip
        found = alone.loss(now, teacher, tokens, MASK, rollout)
        np.testing.assert_allclose(found, policy, rtol=1e-9, atol=1e-12)


def test_ratios_beyond_the_clip_have_no_slope_where_they_would_gain(x64):
    log_q, rewards = jnp.zeros((1, 4)), jnp.zeros((1, 4))
    rollout = m.Rollout(log_q, rewards, jnp.asarray([[1.5, 1.5, 0.5, 0.5]]))
    advantage, mask = jnp.asarray([[1.0, -1.0, 1.0, -1.0]]), jnp.ones((1, 4), bool)
    slope = jax.grad(lambda x: m.policy_loss(x, rollout, advantage, mask, 0.2))(log_q)
    np.testing.assert_allclose(slope, [[0, 1.5 / 4, -0.5 / 4, 0]])


# A language of three tokens and texts of two, all of which can be written down.
TEXTS = np.array(list(itertools.product(range(3), repeat=2)))


def texts(params):
    """log q of the tokens of each text, [text, 2], and the logits that they are of."""
    first, second = params
    logits = jnp.stack([jnp.broadcast_to(first, (9, 3)), second[TEXTS[:, 0]]], 1)
    return m.log_probabilities(logits, jnp.asarray(TEXTS)), logits


def models():
    rng = np.random.default_rng(3)
    return [[jnp.asarray(rng.normal(size=s)) for s in ((3,), (3, 3))] for _ in range(2)]


def sequence_kl(student, teacher):
    log_q, log_p = texts(student)[0].sum(1), texts(teacher)[0].sum(1)
    return jnp.sum(jnp.exp(log_q) * (log_q - log_p))


def expected_slope(student, teacher, advantage, *, single_step):
    """Of policy_loss for the advantages [text, 2], over all texts by their chance."""
    old = jax.lax.stop_gradient(texts(student)[0])
    chance, ones = jnp.exp(old.sum(1)), jnp.ones((9, 2))

    def total(student):
        log_q, logits = texts(student)
        each = jax.vmap(
            lambda q, old, a: m.policy_loss(
                q[None], m.Rollout(old[None], a[None], ones[:1]), a[None], ones[:1] > 0, 1e9
            )
        )(log_q, old, advantage)
        loss = 2 * chance @ each  # a sum over the two tokens, where the loss is a mean
        if single_step:
            kl = m.reverse_kl().per_token(logits, texts(teacher)[1])
            loss += jnp.sum(jax.lax.stop_gradient(chance)[:, None] * kl)
        return loss

    return jax.grad(total)(student)


@pytest.mark.parametrize("single_step", [False, True])
def test_the_expected_slope_is_that_of_the_reverse_kl_of_texts(x64, single_step):
    """Eq. 3, and Eq. 4 with R_{t+1} beside the exact single step (deviation 1 has R_t)."""
    student, teacher = models()
    rewards = texts(teacher)[0] - texts(student)[0]
    returns = m.reward_to_go(rewards, 1.0)
    advantage = returns - rewards if single_step else returns
    found = expected_slope(student, teacher, advantage, single_step=single_step)
    expected = jax.grad(sequence_kl)(student, teacher)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_rewards_of_single_tokens_alone_would_not_be_that_slope(x64):
    """The trivial policy: every token by its own reward, blind for what it leads to."""
    student, teacher = models()
    rewards = texts(teacher)[0] - texts(student)[0]
    found = expected_slope(student, teacher, rewards, single_step=False)
    expected = jax.grad(sequence_kl)(student, teacher)
    assert jnp.abs(found[0] - expected[0]).max() > 0.01


def test_weights_make_samples_of_the_mixture_stand_for_the_students(x64):
    """Of one token, where they are no approximation: Σ q̃ w f = Σ q f, and w ≤ 1 / (1 - α)."""
    old, _, teacher, _ = case()
    log_q, log_p = jax.nn.log_softmax(old), jax.nn.log_softmax(teacher)
    for share in (0.0, 0.2, 0.9):
        w = m.importance_weights(log_q, log_p, share)
        mixture = (1 - share) * jnp.exp(log_q) + share * jnp.exp(log_p)
        np.testing.assert_allclose(mixture * w, jnp.exp(log_q), rtol=1e-12)
        assert w.max() <= 1 / (1 - share) + 1e-12


def test_sampling_is_of_the_mixture_and_keeps_both_caches(x64):
    old, _, teacher, _ = case()

    def model(logits):
        def decode(tokens, cache, count):
            return logits[:, 0], cache + count

        return decode

    method = m.minillm(teacher_share=0.3)
    decode = method.sampler(model(old), model(teacher))
    tokens, zero, one = jnp.zeros((B, 1), jnp.int32), jnp.zeros(B), jnp.ones(B, jnp.int32)
    found, caches = decode(tokens, (zero, zero + 5), one)
    expected = 0.7 * jax.nn.softmax(old[:, 0]) + 0.3 * jax.nn.softmax(teacher[:, 0])
    np.testing.assert_allclose(jax.nn.softmax(found), expected, rtol=1e-12)
    np.testing.assert_array_equal(jnp.stack(caches), jnp.stack([zero + 1, zero + 6]))


def test_discounted_returns_are_what_follows(x64):
    rewards = jnp.asarray([[1.0, 2.0, 4.0]])
    np.testing.assert_allclose(m.reward_to_go(rewards, 0.5), [[3.0, 4.0, 4.0]])
    mask = jnp.asarray([[True, True, False]])
    np.testing.assert_allclose(m.normalized_return(rewards * mask, mask, 1.0), [[1.5, 2.0, 0.0]])


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(teacher_share=1.0), "teacher_share=1.0 must be at least 0 and below 1"),
        (dict(reward_scale=0.0), "reward_scale=0.0 must be positive"),
        (dict(ratio_clip=-1.0), "ratio_clip=-1.0 must be positive"),
        (dict(discount=1.1), "discount=1.1 must be from 0 to 1"),
    ],
)
def test_bad_settings_are_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        m.minillm(**settings)
