"""Small data with classes: splits that do not overlap, and what is refused."""

import numpy as np
import pytest

from experiments.data.examples import MNIST1D, split
from experiments.errors import UserError

X = np.arange(20, dtype=np.float32).reshape(10, 2)
Y = np.arange(10, dtype=np.int32) % 3


def test_a_split_is_by_seed_and_does_not_overlap():
    found = split(X, Y, None, 4, "data", 0)
    taught, held = found.train.inputs[:, 0], found.heldout.inputs[:, 0]
    assert len(taught) == 6 and len(held) == 4
    assert set(taught) | set(held) == set(X[:, 0])
    assert (found.train.targets == (taught / 2).astype(int) % 3).all()
    again, other = split(X, Y, None, 4, "data", 0), split(X, Y, None, 4, "data", 1)
    assert (again.train.inputs == found.train.inputs).all() and again.digest == found.digest
    assert (other.train.inputs != found.train.inputs).any()


def test_fewer_examples_are_held_out_from_the_same_test():
    whole, few = split(X, Y, None, 4, "data", 0), split(X, Y, 2, 4, "data", 0)
    assert (whole.heldout.inputs == few.heldout.inputs).all()
    assert (few.train.inputs == whole.train.inputs[:2]).all()
    assert whole.digest != few.digest


@pytest.mark.parametrize("train, heldout", [(7, 4), (0, 4), (None, 10), (None, 0)])
def test_what_the_data_do_not_give_is_refused(train, heldout):
    with pytest.raises(UserError, match="data: data has 10 examples, which do not give"):
        split(X, Y, train, heldout, "data", 0)


def test_signals_are_the_same_each_time():
    one, other = MNIST1D(samples=100, heldout=20).examples(), MNIST1D(samples=100, heldout=20)
    assert one.train.inputs.shape == (80, 40)
    assert one.digest == other.examples().digest
    assert sorted(np.unique(one.train.targets)) == list(range(10))
