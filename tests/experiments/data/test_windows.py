"""Windows: how many, which ones, of what, and what a user is told when there are too few."""

import numpy as np
import pytest
import tokenizers

from experiments.data.tokenizer import Tokenizer
from experiments.data.windows import Sizes, collect, cut, digest, halves, spread
from experiments.errors import UserError


def words(*vocabulary):
    """A tokenizer whose tokens are words between spaces; unknown words are token 0."""
    ids = {word: n for n, word in enumerate(("?", *vocabulary))}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="?"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(core=core, bos=0, add_bos=True)


@pytest.mark.parametrize(("available", "count"), [(128, 32), (128, 128), (40, 20), (40, 1), (7, 3)])
def test_spread_is_linspace_rounded_down(available, count):
    expected = np.linspace(0, available - 1, count).astype(int)
    np.testing.assert_array_equal(spread(available, count), expected)


def test_spread_knows_no_last_bit():
    """NumPy's linspace gives 14.999… for the eleventh of 23 indices over 0 … 30."""
    assert spread(31, 23)[11] == 15
    assert len(set(spread(31, 23).tolist())) == 23


@pytest.mark.parametrize("count", [0, 6])
def test_spread_refuses_more_than_there_are(count):
    with pytest.raises(ValueError, match=f"count={count} must be from 1 to available=5"):
        spread(5, count)


def test_halves_split_at_the_first_blank_line_after_the_middle():
    assert halves("aaaa\n\nbb\n\ncc") == ("aaaa\n\nbb", "cc")
    assert halves("aaaa") == ("aa", "aa")


def test_windows_are_consecutive_pieces_of_each_half_without_bos():
    text = "a b c a b c a\n\nb a c a b c a"
    found = cut(text, words("a", "b", "c"), 4, Sizes(context=3, calibration=2, heldout=2), "abc")
    np.testing.assert_array_equal(found.calibration, [[1, 2, 3], [1, 2, 3]])
    np.testing.assert_array_equal(found.heldout, [[2, 1, 3], [1, 2, 3]])
    assert found.calibration.dtype == found.heldout.dtype == np.int32
    assert found.name == "abc"


def test_fewer_windows_are_evenly_spread():
    tokens = np.arange(30, dtype=np.int32).reshape(10, 3)
    found = collect(tokens, tokens, Sizes(context=3, calibration=4, heldout=10), "numbers")
    np.testing.assert_array_equal(found.calibration[:, 0], [0, 9, 18, 27])
    np.testing.assert_array_equal(found.heldout, tokens)


def test_random_windows_are_drawn_by_the_seed_without_replacement():
    tokens = np.arange(60, dtype=np.int32).reshape(20, 3)
    sizes = Sizes(context=3, calibration=8, heldout=4, draw="random")
    found = [collect(tokens, tokens, sizes, "numbers", seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(found[0].calibration, found[1].calibration)
    assert found[0].digest == found[1].digest != found[2].digest
    assert (found[0].calibration != found[2].calibration).any()
    expected = np.sort(np.random.default_rng(1).choice(20, 8, replace=False))
    np.testing.assert_array_equal(found[2].calibration[:, 0], 3 * expected)
    for one in found:
        assert len(set(one.calibration[:, 0].tolist())) == 8
        np.testing.assert_array_equal(one.heldout[:, 0] // 3, spread(20, 4))  # even all the same


def test_the_seed_changes_nothing_that_is_not_drawn():
    tokens = np.arange(60, dtype=np.int32).reshape(20, 3)
    sizes = Sizes(context=3, calibration=8, heldout=4)
    assert (
        len({collect(tokens, tokens, sizes, "numbers", seed=seed).digest for seed in (0, 1)}) == 1
    )
    every = Sizes(context=3, calibration=20, heldout=4, draw="random")
    np.testing.assert_array_equal(collect(tokens, tokens, every, "n", seed=3).calibration, tokens)


def test_null_is_every_heldout_window():
    tokens = np.arange(30, dtype=np.int32).reshape(10, 3)
    sizes = Sizes(context=3, calibration=4, heldout=None)
    sizes.validate()
    np.testing.assert_array_equal(collect(tokens, tokens, sizes, "n").heldout, tokens)
    with pytest.raises(UserError, match="n holds 0 heldout windows of 3 tokens, fewer than one"):
        collect(tokens, tokens[:0], sizes, "n")


def test_the_digest_is_of_tokens_and_shapes():
    a, b = np.arange(6, dtype=np.int32).reshape(2, 3), np.ones((1, 3), np.int32)
    assert digest(a, b) == digest(a.copy(), b.copy())
    others = [(b, a), (a[:1], np.concatenate([a[1:], b])), (a + 1, b), (a, b + 1), (a[:1], b)]
    assert len({digest(a, b), *(digest(*pair) for pair in others)}) == 6


@pytest.mark.parametrize("text", ["", " \n\n \n"])
def test_refuses_a_text_that_is_empty(text):
    with pytest.raises(UserError, match="abc holds no text"):
        cut(text, words("a"), 2, Sizes(context=2, calibration=1, heldout=1), "abc")


@pytest.mark.parametrize("text", ["a", "a\n\n", "\n\na", "a a"])
def test_refuses_a_text_of_a_token_or_two(text):
    with pytest.raises(UserError, match="abc holds 0 calibration windows of 2 tokens"):
        cut(text, words("a"), 2, Sizes(context=2, calibration=1, heldout=1), "abc")


@pytest.mark.parametrize(
    ("calibration", "heldout", "sentence"),
    [
        (4, 1, r"abc holds 3 calibration windows of 2 tokens, fewer than data.calibration=4"),
        (1, 4, r"abc holds 3 heldout windows of 2 tokens, fewer than data.heldout=4"),
    ],
)
def test_refuses_a_text_that_is_too_short(calibration, heldout, sentence):
    sizes = Sizes(context=2, calibration=calibration, heldout=heldout)
    with pytest.raises(UserError, match=sentence):
        cut("a a a a a a a\n\na a a a a a a", words("a"), 2, sizes, "abc")


def test_refuses_tokens_outside_the_vocabulary():
    sizes = Sizes(context=1, calibration=1, heldout=1)
    sentence = "gives token 2 for abc, but the model's vocabulary ends at 1"
    with pytest.raises(UserError, match=sentence):
        cut("a b\n\na a", words("a", "b"), 2, sizes, "abc")


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        (dict(context=1), "data.context=1 is too small: ask for 2 at least"),
        (dict(calibration=0), "data.calibration=0 is too small"),
        (dict(heldout=-1), "data.heldout=-1 is too small"),
        (dict(draw="odd"), "data.draw=odd is unknown: choose even or random"),
        (dict(context=65), "data.context=65 is longer than the model allows: ask for 64 tokens"),
    ],
)
def test_refuses_sizes_that_make_no_sense(sizes, sentence):
    with pytest.raises(UserError, match=sentence):
        Sizes(**dict(context=8, calibration=1, heldout=1) | sizes).validate(longest=64)


def test_refuses_sizes_that_are_no_numbers():
    sizes = Sizes(context=8, calibration=1, heldout=1)
    object.__setattr__(sizes, "context", "8k")  # as a command line may have it
    with pytest.raises(UserError, match="data.context='8k' is not a whole number"):
        sizes.validate()
