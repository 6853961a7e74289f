"""The order of batches: a function of seed and step, each example once in a pass."""

import numpy as np
import pytest

from algorithms.training import Batch
from experiments.data.windows import Windows
from experiments.errors import UserError
from experiments.training.data import Order, chunks, next_tokens


def test_each_pass_takes_every_example_once_in_a_new_order():
    order = Order(examples=12, batch=4, seed=0)
    passes = [np.concatenate([order.indices(3 * n + k) for k in range(3)]) for n in range(2)]
    assert all(sorted(each) == list(range(12)) for each in passes)
    assert list(passes[0]) != list(passes[1])


def test_a_batch_depends_on_seed_and_step_alone():
    one, other = Order(12, 4, seed=0), Order(12, 4, seed=1)
    steps = [one.indices(n) for n in range(7)]
    assert all((one.indices(n) == steps[n]).all() for n in reversed(range(7)))
    assert any((other.indices(n) != steps[n]).any() for n in range(7))


def test_what_does_not_fill_a_batch_waits_for_another_pass():
    order = Order(examples=11, batch=4, seed=0)
    taken = np.concatenate([order.indices(0), order.indices(1)])
    assert len(set(taken)) == 8
    assert len(order.indices(2)) == 4


def test_sizes_that_make_no_batch_are_refused():
    with pytest.raises(UserError, match="batch=13 must be from 1 to the 12 examples"):
        Order(12, 13, 0)
    with pytest.raises(UserError, match="batch=0 must be from 1"):
        Order(12, 0, 0)


def test_exhausted_data_are_found_before_the_first_step():
    Order(12, 4, 0, passes=2).require(6)
    Order(12, 4, 0).require(1000)
    with pytest.raises(UserError, match="steps=7 of batch=4 need more than passes=2 over 12"):
        Order(12, 4, 0, passes=2).require(7)


def test_each_token_but_the_first_is_predicted():
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    found = next_tokens(Windows(tokens, tokens[:1], "text", "digest"))
    assert (found.train.inputs == tokens[:, :-1]).all()
    assert (found.train.targets == tokens[:, 1:]).all()
    assert found.heldout.targets.shape == (1, 5)


def test_chunks_are_in_order_and_whole():
    data = Batch(np.arange(7), np.arange(7), None)
    assert [list(c.inputs) for c in chunks(data, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
