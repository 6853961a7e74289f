"""Losses of activations against ports of official code, their theory, and the loss without them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.distillation import features, relations
from tests.algorithms.distillation import features_official as official

B, T, LENGTHS = 3, 6, (6, 4, 2)
MASK = jnp.arange(T) < jnp.array(LENGTHS)[:, None]


def hidden(seed, layers, width):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, T, width))) for _ in range(layers)]


def scores(seed, layers, heads=2):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, heads, T, T))) for _ in range(layers)]


def qkv(seed, heads, size):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, T, heads, size))) for _ in range(3)]


def regressors(pairs, student, teacher, key=0):
    found = features.init_regressors(jax.random.key(key), pairs, student, teacher)
    bias = np.random.default_rng(key).normal(size=(pairs, teacher))
    return tuple(r._replace(bias=jnp.asarray(b)) for r, b in zip(found, bias, strict=True))


def test_hints_equal_the_code_of_fitnets(x64):
    s, t, (r,) = hidden(0, 1, 4), hidden(1, 1, 7), regressors(1, 4, 7)
    fitted = np.asarray(s[0] @ r.kernel + r.bias).reshape(-1, 7)
    theirs = official.hint(fitted, np.asarray(t[0]).reshape(-1, 7))
    np.testing.assert_allclose(features.fitnets().loss((r,), s, t), theirs, rtol=1e-12)


def test_equals_the_code_of_tinybert(x64):
    """Two layers of six, and the embeddings."""
    s, t, r = hidden(0, 3, 4), hidden(1, 7, 8), regressors(3, 4, 8)
    a_s, a_t = scores(2, 2), scores(3, 6)
    pairs = features.layer_map(2, 6)
    fitted = [s[n] @ r[n].kernel + r[n].bias for n in range(3)]
    theirs = official.tinybert(fitted, t, a_s, a_t)
    chosen = [t[0], *(t[n + 1] for _, n in pairs)]
    loss = features.tinybert(hidden=0.7, attention=0.2).loss
    found = loss(r, s, chosen, a_s, [a_t[n] for _, n in pairs])
    np.testing.assert_allclose(found, 0.7 * theirs[0] + 0.2 * theirs[1], rtol=1e-12)


def test_scores_that_are_masked_do_not_count_where_tinyberts_are_zeros(x64):
    a_s, a_t = scores(2, 1), scores(3, 1)
    seen = np.broadcast_to((MASK[:, :, None] & MASK[:, None])[:, None], a_s[0].shape)
    ours = features.attention_error(a_s, a_t, MASK, False)
    masked = [[np.where(seen, a[0], -1e4)] for a in (a_s, a_t)]
    theirs = official.tinybert([], [], *masked)[1]
    np.testing.assert_allclose(ours * seen.mean(), theirs, rtol=1e-12)
    causal = features.attention_error(a_s, a_t, None, True)
    lower = np.tril(np.ones((T, T), bool))
    np.testing.assert_allclose(causal, ((a_s[0] - a_t[0]) ** 2)[..., lower].mean(), rtol=1e-12)


@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize("pairs", [("qk", "vv"), ("qq", "kk", "vv"), ("kv",)])
def test_equals_the_code_of_minilmv2(x64, pairs, heads):
    """Models of different widths and numbers of heads."""
    s, t = qkv(0, 2, 4), qkv(1, 4, 6)
    flat = ([np.asarray(x).reshape(B, T, -1) for x in z] for z in (s, t))
    named = {tuple("qkv".index(c) + 1 for c in r): 1.0 for r in pairs}
    theirs = official.minilm(*flat, LENGTHS, relations=named, heads=heads)
    found = relations.minilm(relations=pairs, heads=heads).loss(None, s, t, MASK)
    np.testing.assert_allclose(found, theirs, rtol=1e-10)


def test_relations_are_the_teachers_whatever_turns_its_channels(x64):
    """Values turned by a rotation keep their relations, of any width; hidden states do not."""
    t = qkv(1, 2, 4)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0][:4]  # 4 to 6 channels
    s = [x @ turn * (6 / 4) ** 0.25 for x in t]  # √d is another
    loss = relations.minilm(relations=("qk", "vv")).loss
    assert abs(loss(None, s, t, MASK)) < 1e-12
    assert loss(None, [1.1 * x for x in s], t, MASK) > 1e-3
    assert features.hidden_error(None, [x[..., :4] for x in s], t) > 0.1


def test_relations_of_a_decoder_do_not_see_later_tokens(x64):
    s, t = qkv(0, 2, 4), qkv(1, 2, 4)
    short = relations.minilm(causal=True).loss(None, *([x[:, :3] for x in z] for z in (s, t)))
    mask = jnp.broadcast_to(jnp.arange(T) < 3, (B, T))
    long = relations.minilm(causal=True).loss(None, s, t, mask)
    np.testing.assert_allclose(short, long, rtol=1e-12)
    assert abs(relations.minilm(causal=False).loss(None, s, t, mask) / long - 1) > 1e-3


def test_padding_may_be_anything():
    s, t, a_s, a_t = hidden(0, 2, 4), hidden(1, 2, 4), scores(2, 2), scores(3, 2)
    x, y = qkv(0, 2, 4), qkv(1, 2, 4)
    loss, related = features.tinybert(causal=True).loss, relations.minilm(causal=True).loss
    before = loss(None, s, t, a_s, a_t, MASK), related(None, x, y, MASK)
    pad = jnp.where(MASK, 0.0, 1e3)
    s, a_s = [h + pad[..., None] for h in s], [a + pad[:, None, :, None] for a in a_s]
    x = [z + pad[..., None, None] for z in x]
    after = loss(None, s, t, a_s, a_t, MASK), related(None, x, y, MASK)
    np.testing.assert_allclose(after, before, rtol=1e-6)


def test_nothing_is_lost_by_a_student_that_is_the_teacher():
    h, a, z = hidden(0, 2, 4), scores(2, 2), qkv(1, 2, 4)
    assert features.tinybert().loss(None, h, h, a, a, MASK) == 0
    assert relations.minilm(causal=True).loss(None, z, z, MASK) == 0


def test_the_teacher_is_not_differentiated():
    h, a, z = hidden(0, 2, 4), scores(2, 2), qkv(1, 2, 4)
    s = [x + 1 for x in h], [x * 2 for x in a], [x * 2 for x in z]
    found = jax.grad(lambda h, a: features.tinybert().loss(None, s[0], h, s[1], a), (0, 1))(h, a)
    found += (jax.grad(lambda z: relations.minilm().loss(None, s[2], z))(z),)
    assert not any(jnp.any(x) for x in jax.tree.leaves(found))


def test_regressors_keep_the_variance_and_learn_what_relates_the_two():
    """Steps downhill reach what least squares leaves; without regressors nothing could."""
    (s,) = hidden(0, 1, 4)
    t = [s @ jnp.asarray(np.random.default_rng(5).normal(size=(4, 7)), jnp.float32) + 2]
    method = features.fitnets()
    wide = method.init(jax.random.key(0), 3, 400, 300)
    assert float(jnp.var(wide[1].kernel)) == pytest.approx(1 / 400, rel=0.02)
    slope = jax.jit(jax.grad(lambda r: method.loss(r, [s], t)))
    r = method.init(jax.random.key(0), 1, 4, 7)
    start = method.loss(r, [s], t)
    for _ in range(300):
        r = jax.tree.map(lambda p, g: p - 0.3 * g, r, slope(r))
    assert method.loss(r, [s], t) < 1e-4 * start


def test_layers_are_paired_by_the_strategies():
    assert features.layer_map(4, 12) == ((0, 2), (1, 5), (2, 8), (3, 11))  # TinyBERT, N = 3 M
    assert features.layer_map(3, 7) == ((0, 1), (1, 3), (2, 6))
    assert features.layer_map(3, 3) == ((0, 0), (1, 1), (2, 2))
    assert features.layer_map(2, 5, strategy="top") == ((0, 3), (1, 4))
    assert features.layer_map(2, 5, strategy="last") == ((1, 4),)
    assert features.layer_map(5, 2, strategy="last") == ((4, 1),)  # FitNets are deeper


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: features.layer_map(3, 2), "student=3 must have from 1 to teacher=2 layers"),
        (lambda: features.layer_map(1, 2, strategy="odd"), "strategy='odd' must be uniform, top"),
        (lambda: relations.minilm(relations=("qx",)), r"relations=\('qx',\) must be pairs of q, k"),
        (lambda: relations.minilm(relations=()), r"relations=\(\) must be pairs"),
        (lambda: relations.minilm(heads=3).loss(None, qkv(0, 2, 4), qkv(1, 2, 4)),
         r"heads=3 must divide the widths \[8, 8\]"),
        (lambda: relations.minilm().loss(None, qkv(0, 2, 4), [*qkv(0, 4, 4)[:1], *qkv(1, 2, 4)]),
         r"heads=4 must divide the widths \[16, 8\]"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
