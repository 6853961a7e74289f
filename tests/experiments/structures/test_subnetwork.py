"""Sub-networks cut out of a decoder compute what its masked weights do."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from algorithms.search import once_for_all
from experiments.checkpoints.loading import load_model, outline
from experiments.errors import UserError
from experiments.structures.subnetwork import subnetwork
from experiments.structures.supernet import places_of, space_of
from models.config import Mixing
from tests.experiments.checkpoints.test_rotated import InMemory, change, forward, logits
from tests.experiments.structures.test_structures import EVERY

ALL = {"layers": 1, "hidden": 24, "kv_heads": 1, "feed_forward": 40}
CASES = {
    "every dimension": ("llama", ALL),
    "query heads of every group": ("smollm2, tied", {"heads": 2, "layers": 1}),
    "norms around, windows": ("gemma, norms around", {"layers": 1, "feed_forward": 8}),
    "norms of q and k": ("qwen3, norms of q and k", ALL),
    "mean and biases": ("opt, learned positions", {"layers": 1, "kv_heads": 1, "feed_forward": 8}),
    "multipliers": ("granite, multipliers", ALL),
    "experts": ("olmoe, experts", {"layers": 1, "hidden": 24, "kv_heads": 1}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.some("every dimension", "mean and biases")
def test_a_cut_network_is_the_masked_one(case):
    family, sizes = CASES[case]
    source = InMemory(dataclasses.replace(EVERY[family], norm_epsilon=0.05))
    config, model = source.config, load_model(source)
    there = {d: getattr(config, d) for d in sizes}
    space = space_of(config, {d: [n, there[d]] for d, n in sizes.items()}, "elastic")
    masked = once_for_all.subnetwork(model, sizes, space, places_of(outline(source), config))
    cut = subnetwork(**sizes)(source)
    assert all(getattr(cut.config, d) == n for d, n in sizes.items())
    np.testing.assert_allclose(logits(cut), forward(*nnx.split(masked)), rtol=3e-5, atol=3e-5)
    assert not np.allclose(logits(cut), logits(source), atol=1e-2)


def test_the_first_units_stay():
    source = InMemory(EVERY["llama"])
    cut = subnetwork(**ALL)(source)
    assert cut.kept.layers == (0,) and cut.kept.everywhere["hidden"].tolist() == list(range(24))
    assert {d: u.tolist() for d, u in cut.kept.within[0].items()} == {
        "heads": [0, 1], "kv_heads": [0], "feed_forward": list(range(40))}  # fmt: skip
    assert cut.removed()["removed"]["layers"] == "1"
    name = "blocks.0.mlp.up.weight"
    assert cut.read(name).tobytes() == source.tensors[name][:40, :24].tobytes()
    same = subnetwork()(source)
    assert same.config == source.config and same.removed()["removed"] == {}


@pytest.mark.parametrize(
    "sizes, sentence",
    [
        ({"layers": 3}, "structure.layers=3 must be from 1 to the 2 blocks"),
        ({"feed_forward": 65}, "structure.feed_forward=65 must be from 1 to the 64"),
        ({"heads": 3}, "heads must be kv_heads times 1 to 2"),
    ],
)
def test_sizes_that_are_not_there_are_refused(sizes, sentence):
    with pytest.raises(UserError, match=sentence):
        subnetwork(**sizes)(InMemory(EVERY["llama"]))


@pytest.mark.parametrize(
    "config, choices, sentence",
    [
        (EVERY["opt, learned positions"], {"hidden": [24, 48]}, "elastic.hidden: a norm that"),
        (EVERY["olmoe, norms over whole q and k"], {"kv_heads": [1, 2]}, "over all heads"),
        (
            change(experts=Mixing(count=5, chosen=2, feed_forward=24)),
            {"feed_forward": [8, 64]},
            "elastic.feed_forward: no block has that dimension",
        ),
        (EVERY["llama"], {"layers": [1, 3]}, r"elastic: layers=\[1, 3\] must be different sizes"),
    ],
)
def test_networks_that_have_no_such_smaller_ones_are_refused(config, choices, sentence):
    with pytest.raises(UserError, match=sentence):
        space_of(config, choices, "elastic")
