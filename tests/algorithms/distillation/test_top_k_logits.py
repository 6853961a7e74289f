"""Kept logits against a port of DistillKit, their theory, and fewer of them kept exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.distillation import compressed_logits, divergences, top_k_logits
from algorithms.distillation.top_k_logits import VALUES
from tests.algorithms.distillation import top_k_official as official
from tests.algorithms.distillation.divergences_official import log_softmax

V, KS = 60, (1, 2, 5, 12, 30, 59, 60)


def logits(seed=0, rows=(2, 3), vocabulary=V):
    """A teacher's, heavy in the tail as language models', and a student's."""
    rng = np.random.default_rng(seed)
    ranks = -1.5 * np.log(1 + np.arange(vocabulary)) + 0.1 * rng.normal(size=(*rows, vocabulary))
    teacher = 7 + rng.permuted(ranks, axis=-1)
    return jnp.asarray(teacher), jnp.asarray(teacher + rng.normal(size=teacher.shape))


def codec(k, **settings):
    return top_k_logits.top_k_logits(k=k, **{"values": "float32", **settings})


@pytest.mark.parametrize("vocabulary", [60, 1 << 16, 128256])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.some(5)
def test_its_size_is_what_its_arrays_hold(values, vocabulary):
    method = top_k_logits.top_k_logits(k=50, values=values)
    kept = jax.jit(method.encode)(logits(rows=(1, 2), vocabulary=vocabulary)[0])
    held = sum(x.nbytes for x in jax.tree.leaves(kept))
    assert method.bytes_per_token(vocabulary) * 2 == held
    codes = 2 * 50 + (14 if vocabulary > 1 << 16 else 0)  # 2 bits, of 56 entries
    per_token = {"float32": 200, "uint8": 50 + 4, "polynomial": 2 * 16 + 4 * 6}.get(values, 100)
    assert method.bytes_per_token(vocabulary) == codes + per_token + 4


def test_recommended_settings_take_the_300_bytes_of_distillkit():
    """k = 128, 16 exact, six terms: DistillKit's, and what the others sum to."""
    method = top_k_logits.top_k_logits(k=128, values="polynomial", exact=16)
    for vocabulary in (1 << 16, 262144):
        theirs = official.total_bits(vocabulary, 128, 16, 16, 6, 32) / 8
        assert method.bytes_per_token(vocabulary) == theirs + 4
    assert method.bytes_per_token(128256) == 348  # DistillKit has 328: 17 bits an entry, ours 18
    assert 348 / (2 * 128256) < 0.0015


@pytest.mark.parametrize("vocabulary", [60, 1 << 16, (1 << 16) + 1, 128256, 1 << 20])
def test_entries_survive(vocabulary):
    entries = np.random.default_rng(0).integers(vocabulary, size=(2, 3, 37))
    entries.flat[:2] = 0, vocabulary - 1
    packed = compressed_logits.pack_entries(jnp.asarray(entries, jnp.int32), vocabulary)
    np.testing.assert_array_equal(compressed_logits.unpack_entries(packed, vocabulary), entries)


def test_what_is_decoded_is_the_teacher_where_it_was_kept_and_sums_to_what_was_left(x64):
    t, _ = logits()
    p = np.exp(log_softmax(np.asarray(t)))
    for k in KS:
        kept = codec(k).encode(t)
        decoded = np.asarray(jax.nn.softmax(codec(k).decode(kept, V)))
        least = np.sort(p, -1)[..., -k][..., None]
        top = p >= least
        np.testing.assert_allclose(decoded[top], p[top], rtol=3e-6)
        others = np.where(top, 0, p).sum(-1, keepdims=True) / max(V - k, 1)
        np.testing.assert_allclose(decoded, np.where(top, p, others), rtol=3e-6)
        renormalized = jax.nn.softmax(codec(k, tail="renormalized").decode(kept, V))
        np.testing.assert_allclose(
            renormalized, np.where(top, p, 0) / np.where(top, p, 0).sum(-1, keepdims=True),
            rtol=3e-6,
        )  # fmt: skip


def test_the_kl_from_the_teacher_falls_with_k_to_0():
    t, _ = logits()
    forward, reverse = divergences.forward_kl().per_token, divergences.reverse_kl().per_token
    uniform, renormalized = [], []
    for k in KS:
        kept = codec(k).encode(t)
        uniform.append(forward(codec(k).decode(kept, V), t))
        renormalized.append(reverse(codec(k, tail="renormalized").decode(kept, V), t))
    for found in map(np.array, (uniform, renormalized)):
        assert (np.diff(found[:-1], axis=0) < 0).all()
        np.testing.assert_allclose(found[-1], 0, atol=1e-6)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.some(2)
def test_every_kind_of_values_falls_too_but_for_what_it_rounds(values):
    t, _ = logits()
    found = []
    for k in (10, 20, 40, 60):
        method = codec(k, values=values, exact=4)
        found.append(divergences.forward_kl()(method.decode(method.encode(t), V), t))
    assert found[0] > found[1] > found[2] > found[3]
    bound = {"float32": 1e-6, "float16": 1e-6, "bfloat16": 1e-4, "uint8": 1e-4, "polynomial": 0.02}
    assert found[-1] < bound[values]


def test_the_kl_of_buckets_is_at_most_the_whole_one_and_reaches_it(x64):
    t, s = logits()
    whole = divergences.forward_kl().per_token(s, t)
    found = np.array([codec(k).per_token(s, codec(k).encode(t)) for k in KS])
    assert (np.diff(found[:-1], axis=0) > 0).all() and (found > 0).all()
    for reached in found[-2:]:  # a bucket of one entry is the entry
        np.testing.assert_allclose(reached, whole, rtol=1e-5)


@pytest.mark.parametrize("k", KS)
def test_without_decoding_it_is_the_kl_of_what_is_decoded_if_the_student_is_flat_there_too(x64, k):
    """And always, where it is renormalized."""
    t, s = logits()
    forward = divergences.forward_kl().per_token
    away, kept = codec(k, tail="renormalized"), codec(k).encode(t)
    expected = forward(s, away.decode(kept, V).astype(s.dtype))
    np.testing.assert_allclose(away.per_token(s, kept), expected, atol=1e-6)
    flat = codec(k).decode(codec(k).encode(t), V) * jnp.linspace(0.5, 1, 6).reshape(2, 3, 1)
    expected = forward(flat, codec(k).decode(kept, V))
    np.testing.assert_allclose(codec(k).per_token(flat, kept), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tail, missing", [("uniform", "symmetric_uniform"),
                                           ("renormalized", "zero")])  # fmt: skip
def test_equals_the_code_of_distillkit(x64, tail, missing):
    t, s = logits()
    for k in (1, 5, 30):
        method = codec(k, tail=tail)
        found = method.per_token(s, method.encode(t))
        for row in np.ndindex(found.shape):
            ids = np.argsort(-np.asarray(t[row]))[:k]
            log_p = log_softmax(np.asarray(t[row]))[ids]
            theirs = official.sparse_kl(np.asarray(s[row]), ids, log_p, missing=missing)
            np.testing.assert_allclose(found[row], theirs, atol=1e-6)  # values are float32


def test_the_polynomial_is_the_one_of_distillkit(x64):
    t, _ = logits(vocabulary=400)
    kept = top_k_logits.encode(t, k=128, values="polynomial", exact=16)
    found = np.asarray(top_k_logits.kept_values(kept))
    ordered = -np.sort(-np.asarray(t), -1)[..., :128]
    for row in np.ndindex(found.shape[:2]):
        values = ordered[row] - ordered[row][0]
        np.testing.assert_allclose(found[row][16:], official.polynomial(values[16:]), atol=1e-4)
        np.testing.assert_allclose(found[row][:16], values[:16], rtol=2**-8)


def test_a_polynomial_beats_fewer_exact_values_in_as_many_bytes():
    """DistillKit's claim of its settings, against the largest 32 in bfloat16."""
    t, _ = logits(rows=(4, 4), vocabulary=4000)
    polynomial = top_k_logits.top_k_logits(k=50, values="polynomial", exact=2)
    plain = top_k_logits.top_k_logits(k=32, values="bfloat16")
    assert polynomial.bytes_per_token(4000) == plain.bytes_per_token(4000)
    lost = [divergences.forward_kl()(m.decode(m.encode(t), 4000), t) for m in (polynomial, plain)]
    assert lost[0] < lost[1]


def test_slopes_are_those_of_finite_differences(x64):
    t, s = logits(rows=(1,), vocabulary=7)
    for tail in top_k_logits.TAILS:
        method = codec(3, tail=tail)
        kept, step = method.encode(t), 1e-6
        found = jax.grad(lambda s: method.per_token(s, kept).sum())(s)  # noqa: B023
        for v in range(7):
            e = step * jax.nn.one_hot(v, 7)
            rise = method.per_token(s + e, kept) - method.per_token(s - e, kept)
            np.testing.assert_allclose(found[0, v], rise[0] / (2 * step), atol=1e-7)


def test_at_k_equal_to_the_vocabulary_slopes_are_finite():
    t, s = logits()
    method = codec(V)
    slope = jax.grad(lambda s: method.per_token(s, method.encode(t)).sum())(s)
    whole = jax.grad(lambda s: divergences.forward_kl().per_token(s, t).sum())(s)
    np.testing.assert_allclose(slope, whole, atol=1e-6)


@pytest.mark.parametrize("values", VALUES)
def test_equal_logits_and_one_kept_are_no_division_by_0(values):
    t = jnp.full((2, 9), 3.0)
    method = codec(8, values=values, exact=2)
    decoded = method.decode(method.encode(t), 9)
    np.testing.assert_allclose(jax.nn.softmax(decoded), 1 / 9, rtol=1e-5)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(k=0), "k=0 must be at least 1"),
        (dict(values="int3"), "values='int3' must be one of float32"),
        (dict(tail="cut"), "tail='cut' must be uniform or renormalized"),
        (dict(k=20, values="polynomial", exact=15), "exact=15 must leave a polynomial of 6 terms"),
    ],
)
def test_bad_settings_are_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        top_k_logits.top_k_logits(**settings)


def test_more_than_the_vocabulary_cannot_be_kept():
    with pytest.raises(ValueError, match="k=70 must be at most the vocabulary"):
        codec(70).encode(logits()[0])
    with pytest.raises(ValueError, match="vocabulary=16777217 must be at most 16777216"):
        compressed_logits.pack_entries(jnp.zeros((1, 1), jnp.int32), (1 << 24) + 1)
