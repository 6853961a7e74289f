"""What no decoder can be made of is refused, for configurations come from files of others."""

import dataclasses
import math

import pytest

from models.config import Mixing
from tests.experiments.checkpoints.synthetic import CONFIG


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": 0}, "layers=0 must be a positive whole number"),
        ({"vocabulary": 2**31}, "vocabulary=2147483648 must be"),
        ({"heads": True}, "heads=True must be"),
        ({"rope_theta": math.inf}, "rope_theta=inf must be a finite number"),
        ({"norm_epsilon": math.nan}, "norm_epsilon=nan must be a finite number"),
        ({"norm_epsilon": None}, "norm_epsilon"),
        ({"windows": (0, None)}, "windows"),
        ({"rotated": -2}, "rotated"),
    ],
)
def test_sizes_and_numbers(changes, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize("sizes", [(0, 0, 1), (2, 3, 1), (2, 1, 0), (2, 1, 2**40)])
def test_experts(sizes):
    count, chosen, feed_forward = sizes
    with pytest.raises(ValueError):
        Mixing(count=count, chosen=chosen, feed_forward=feed_forward)
