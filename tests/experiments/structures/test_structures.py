"""Smaller models of the same architecture: what they compute, and what cannot be made."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.checkpoints.cut import of_sizes
from experiments.checkpoints.dimensions import axes
from experiments.checkpoints.families import FAMILIES as FOLDERS
from experiments.checkpoints.huggingface import read_config
from experiments.checkpoints.loading import load_model
from experiments.errors import UserError
from experiments.evaluation.perplexity import perplexity
from experiments.streaming import embed_windows
from experiments.structures.depth import perplexities, shortened_llama, shortgpt, taylors
from experiments.structures.experts import hc_smoe, reap
from experiments.structures.gradients import block_gradients
from experiments.structures.slicing import slicegpt
from experiments.structures.width import llm_pruner, minitron
from models.config import Mixing
from tests.experiments.checkpoints.test_rotated import FAMILIES, PLAIN, InMemory, change, logits

WINDOWS = np.random.default_rng(1).integers(0, 53, (4, 10))
MIXTURE = change(experts=Mixing(count=5, chosen=2, feed_forward=24))
OTHERS = {
    "opt, learned positions": change(
        norm="layer", positions="learned", gated=False, activation="relu", qkv_bias=True,
        output_bias=True, mlp_bias=True, tied_embeddings=True,
    ),
    "gemma, norms around": change(post_norms=True, windows=(4, None), local_theta=1e3),
    "olmoe, norms over whole q and k": change(qk_norm=True, qk_norm_whole=True),
}  # fmt: skip
EVERY = FAMILIES | OTHERS
GPT2 = {
    "norm": "layer", "positions": "learned", "gated": False, "activation": "gelu_tanh",
    "qkv_bias": True, "output_bias": True, "mlp_bias": True, "tied_embeddings": True,
}  # fmt: skip


def zeroed(source, cut):
    """The original with what went in the way of nothing: readers of those channels are zero."""
    copy = InMemory(source.config)
    copy.tensors = {name: x.copy() for name, x in source.tensors.items()}
    for layer, units in cut.kept.within.items():
        for path, dimension in (("attention.o", "heads"), ("mlp.down", "feed_forward")):
            if dimension in units:
                w = copy.tensors[f"blocks.{layer}.{path}.weight"]
                by_unit = w.reshape(len(w), getattr(source.config, dimension), -1)
                gone = np.setdiff1d(np.arange(by_unit.shape[1]), units[dimension])
                by_unit[:, gone] = 0
    return copy


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.some("every bias")
def test_a_cut_model_is_the_original_with_those_channels_zeroed(family):
    source = InMemory(EVERY[family])
    sizes = {"heads": 2, "kv_heads": 1, "feed_forward": 40}
    if family.startswith("olmoe, norms"):  # which are over fewer heads then
        del sizes["heads"], sizes["kv_heads"]
    if all(map(source.config.mixes, range(2))):
        del sizes["feed_forward"]
    cut = minitron(**sizes)(source, WINDOWS)
    assert all(getattr(cut.config, name) == size for name, size in sizes.items())
    np.testing.assert_allclose(logits(cut), logits(zeroed(source, cut)), rtol=2e-5, atol=2e-5)


def test_what_goes_together_is_found_in_the_architecture():
    found = axes(EVERY["opt, learned positions"])
    assert found["positions.weight"] == (None, "hidden")
    assert found["blocks.1.attention.q.bias"] == ("heads",)
    assert found["blocks.1.attention.v.weight"] == ("kv_heads", "hidden")
    assert found["blocks.0.mlp.up.bias"] == ("feed_forward",)
    assert found["blocks.0.mlp.down.bias"] == ("hidden",)
    found = axes(EVERY["qwen2_moe, a shared expert"])
    assert found["blocks.0.mlp.up.weight"] == ("feed_forward", "hidden")
    assert found["blocks.1.mlp.router.weight"] == ("experts", "hidden")
    assert found["blocks.1.mlp.experts.down.weight"] == ("experts", "hidden", None)
    assert found["blocks.1.mlp.shared.up.weight"] == (None, "hidden")
    assert axes(PLAIN)["embed.weight"] == axes(PLAIN)["head.weight"] == (None, "hidden")


NOTHING = {
    "shortgpt": shortgpt(layers=0),
    "shortened_llama": shortened_llama(fraction=0.0),
    "minitron": minitron(hidden=48, heads=4, kv_heads=2, feed_forward=64),
    "llm_pruner": llm_pruner(),
}


@pytest.mark.parametrize("name", NOTHING)
def test_where_nothing_goes_every_bit_stays(name):
    source = InMemory(FAMILIES["smollm2, tied"])
    cut = NOTHING[name](source, WINDOWS)
    assert cut.config == source.config and cut.names() == source.names()
    for each in source.names():
        assert np.asarray(cut.read(each)).tobytes() == source.tensors[each].tobytes(), each
    assert cut.removed()["removed"] == {}
    if name == "minitron":
        np.testing.assert_array_equal(logits(cut), logits(source))


def test_of_a_mixture_too():
    source = InMemory(MIXTURE)
    name = "blocks.1.mlp.experts.down.weight"
    for structure in (reap, hc_smoe):
        cut = structure(fraction=0.1)(source, WINDOWS)
        assert cut.config == source.config
        assert cut.read(name).tobytes() == source.tensors[name].tobytes()


@pytest.mark.parametrize("family", ["llama", "every bias", "smollm2, tied"])
@pytest.mark.some(1)
def test_dead_hidden_channels_go_and_leave_the_logits(family):
    """The norms' mean is over fewer channels, and their constant is smaller."""
    source, dead = InMemory(dataclasses.replace(FAMILIES[family], norm_epsilon=0.1)), [3, 17, 40]
    for name, each in axes(source.config).items():
        writes = name == "embed.weight" or any(p in name for p in ("attention.o", "mlp.down"))
        for axis, dimension in enumerate(each):
            if dimension == "hidden" and writes and (axis == 0 or name == "embed.weight"):
                np.moveaxis(source.tensors[name], axis, 0)[dead] = 0
    cut = minitron(hidden=45)(source, WINDOWS)
    assert cut.removed()["removed"] == {"hidden": "3, 17, 40"}
    np.testing.assert_allclose(logits(cut), logits(source), rtol=1e-4, atol=1e-5)


THREE = change(layers=3)


def without(source, layer):
    return shortgpt(layers=[layer])(source)


def test_blocks_that_change_nothing_go_first():
    source = InMemory(THREE)
    for name in ("attention.o", "mlp.down"):
        source.tensors[f"blocks.1.{name}.weight"][:] = 0
    cut = shortgpt(layers=1)(source, WINDOWS)
    assert cut.kept.layers == (0, 2) and cut.config.layers == 2
    np.testing.assert_allclose(logits(cut), logits(source), rtol=1e-5, atol=1e-5)
    assert cut.removed()["scores"][1] < 1e-6


def test_blocks_are_read_under_their_new_number_when_they_are_asked_for():
    source = InMemory(THREE)
    cut = shortgpt(layers=1)(source, WINDOWS)
    assert source.reads == []
    layer = cut.kept.layers[1]
    source.reads.clear()
    cut.read("blocks.1.mlp.up.weight")
    assert source.reads == [f"blocks.{layer}.mlp.up.weight"]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"windows": (4, None, 8)}, {"windows": (4, 8)}),
        ({"unrotated": (1, 2)}, {"unrotated": (1,)}),
        (
            {"experts": dataclasses.replace(MIXTURE.experts, layers=(0, 2))},
            {"experts": dataclasses.replace(MIXTURE.experts, layers=(0, 1))},
        ),
        ({"experts": dataclasses.replace(MIXTURE.experts, layers=(1,))}, {"experts": None}),
    ],
)
def test_blocks_keep_settings_of_their_own(settings, expected):
    source = InMemory(dataclasses.replace(THREE, **settings))
    cut = without(source, 1)
    assert cut.config == dataclasses.replace(source.config, layers=2, **expected)
    assert load_model(cut).blocks[1].attention.layer == source.config.layer(2)


def test_where_blocks_differ_those_that_stay_decide_the_shape():
    source = InMemory(dataclasses.replace(THREE, windows=(4, None, None)))
    for name in ("attention.o", "mlp.down"):
        source.tensors[f"blocks.0.{name}.weight"][:] = 0
    assert shortgpt(layers=1)(source, WINDOWS).config.windows == (None, None)


def test_a_blocks_perplexity_is_that_of_the_model_without_it():
    source = InMemory(THREE)
    found = perplexities(source, WINDOWS, 2)
    expected = [perplexity(without(source, n), WINDOWS).value for n in range(3)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    kept = shortened_llama(layers=1, keep_first=2)(source, WINDOWS, chunk=2).kept
    assert kept.layers == (0, 1)


@pytest.mark.parametrize("family", ["smollm2, tied", "qwen2_moe, a shared expert"])
@pytest.mark.some(1)
def test_taylor_terms_are_what_small_changes_do_to_the_loss(family):
    """Matrices of a block times 1 ± ε: the loss' slope is Σ W ∂L/∂W."""
    source = InMemory(FAMILIES[family])
    found = {b.layer: b for b in block_gradients(source, WINDOWS, chunk=2)}
    names = [n for n in ("attention.k", "mlp.down", "mlp.router", "mlp.shared.up", "mlp_norm")
             if f"blocks.1.{n}.weight" in source.tensors]  # fmt: skip
    before, sides = dict(source.tensors), []
    for sign in (1, -1):
        for name in names:
            key = f"blocks.1.{name}.weight"
            source.tensors[key] = before[key] * np.float32(1 + sign * 3e-3)
        sides.append(perplexity(source, WINDOWS).loss)
    block, weights = found[1], [f"{name}.weight" for name in names]
    slope = float(sum(jnp.sum(block.arrays[n] * block.gradients[n]) for n in weights))
    assert abs(slope) > 0.05
    assert abs(slope - (sides[0] - sides[1]) / 6e-3) < 2e-3 + 0.02 * abs(slope)
    assert (taylors(source, WINDOWS, 2) > 0).all()


def test_llm_pruner_takes_what_the_loss_does_not_see():
    """Channels without a way out have no gradient behind, and a norm of zero has none before."""
    source = InMemory(PLAIN)
    source.tensors["blocks.0.mlp.down.weight"][:, [2, 9, 30]] = 0
    source.tensors["blocks.0.mlp.up.weight"][[2, 9, 30]] = 0
    source.tensors["blocks.1.attention.o.weight"][:, 16:32] = 0  # head 1, of key-value head 0
    cut = llm_pruner(feed_forward=61, heads=2)(source, WINDOWS)
    said = cut.removed()
    assert said["removed"]["blocks.0"]["feed_forward"] == "2, 9, 30"
    assert said["removed"]["blocks.1"]["heads"].startswith("1")
    assert said["heads"] == [4, 2] and "kv_heads" not in said
    assert said["parameters"][1] == sum(x.size for x in map(cut.read, cut.names()))


def test_the_experts_that_add_nothing_go():
    source = InMemory(MIXTURE)
    source.tensors["blocks.0.mlp.experts.down.weight"][[1, 4]] = 0
    cut = reap(experts=3)(source, WINDOWS)
    assert cut.removed()["removed"]["blocks.0"] == {"experts": "1, 4"}
    kept = cut.kept.within[1]["experts"]
    for path in ("mlp.router", "mlp.experts.gate"):
        name = f"blocks.1.{path}.weight"
        np.testing.assert_array_equal(cut.read(name), source.tensors[name][kept])
    assert cut.config.experts.count == 3
    assert load_model(cut).blocks[0].mlp.router.kernel.shape == (48, 3)


def test_experts_that_are_alike_become_one_and_nothing_is_lost():
    """With the same row of the router too, whichever is chosen gives the same; where both are, it
    counts twice, so every token is sent to one expert here.
    """
    one = dataclasses.replace(MIXTURE.experts, chosen=1, normalized=True)
    source = InMemory(dataclasses.replace(MIXTURE, experts=one))
    for layer in range(2):
        for path in ("router", "experts.gate", "experts.up", "experts.down"):
            x = source.tensors[f"blocks.{layer}.mlp.{path}.weight"]
            x[3], x[4] = x[0], x[1]
    cut = hc_smoe(experts=3)(source, WINDOWS)
    assert cut.removed()["merged"] == {f"blocks.{n}": ["0, 3", "1, 4"] for n in range(2)}
    assert cut.removed()["experts"] == [5, 3]
    np.testing.assert_allclose(logits(cut), logits(source), rtol=1e-4, atol=1e-5)


def test_clusters_are_of_what_every_expert_gives_for_every_token():
    """Against the experts' own formula, in the first block."""
    source = InMemory(MIXTURE)
    kept = hc_smoe(experts=4)(source, WINDOWS).kept
    block, (flow,) = load_model(source).blocks[0], embed_windows(source, WINDOWS, len(WINDOWS))
    *stages, _ = block.stages()
    for stage in stages:
        flow = stage(flow)
    rows, experts = flow.mixed.reshape(-1, 48), block.mlp.experts
    gate, up, down = (each.kernel[...] for each in (experts.gate, experts.up, experts.down))
    means = [((jax.nn.silu(rows @ gate[e]) * (rows @ up[e])) @ down[e]).mean(0) for e in range(5)]
    distances = np.linalg.norm(np.array(means)[:, None] - np.array(means), axis=-1)
    nearest = np.unravel_index(np.argmin(distances + 9 * np.eye(5)), (5, 5))
    joined = ", ".join(map(str, sorted(nearest))) if abs(np.diff(nearest)) > 1 else None
    assert kept.scores["merged"]["blocks.0"] == [joined or f"{min(nearest)}-{max(nearest)}"]
    np.testing.assert_allclose(kept.merged[0].sum(1), 1)


@pytest.mark.parametrize("family", ["smollm2, tied", "every bias", "olmoe, experts"])
@pytest.mark.some(1)
def test_with_all_directions_kept_the_logits_stay(family):
    source = InMemory(FAMILIES[family])
    sliced = slicegpt(fraction=0)(source, WINDOWS)
    np.testing.assert_allclose(logits(sliced), logits(source), rtol=1e-4, atol=1e-4)


def test_directions_that_the_stream_never_takes_cost_nothing():
    """All that is written lies in 20 directions of 48: a norm's mean goes on to be over 48."""
    source = InMemory(dataclasses.replace(PLAIN, norm_epsilon=0.1))
    basis, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(48, 20)))
    projection = (basis @ basis.T).astype(np.float32)
    for name, x in source.tensors.items():
        if name == "embed.weight":
            source.tensors[name] = x @ projection
        elif "attention.o" in name or "mlp.down" in name:
            source.tensors[name] = projection @ x
    sliced = slicegpt(hidden=20)(source, WINDOWS)
    assert sliced.config.hidden == 20
    np.testing.assert_allclose(logits(sliced), logits(source), rtol=1e-3, atol=1e-3)
    assert sliced.removed()["parameters"][0] == sum(x.size for x in source.tensors.values())


@pytest.mark.parametrize(
    "structure, model, sentence",
    [
        (shortgpt(layers=2), PLAIN, "2 of 2 blocks cannot go, of which 0 are to stay"),
        (shortgpt(layers=[0, 1]), PLAIN, "must name blocks from 0 to 1, each once, and not all"),
        (shortgpt(layers=[5]), PLAIN, "must name blocks from 0 to 1"),
        (shortened_llama(layers=1, keep_last=2), PLAIN, "1 of 2 blocks cannot go, of which 2 are"),
        (minitron(feed_forward=0), PLAIN, "structure.feed_forward=0 must be from 1 to the 64"),
        (minitron(hidden=49), PLAIN, "structure.hidden=49 must be from 1 to the 48"),
        (minitron(heads=3), PLAIN, "each key-value head keeps equally many of the 2"),
        (llm_pruner(kv_heads=0), PLAIN, "heads=0 must be from 1"),
        (minitron(feed_forward=8), MIXTURE, "no block has that dimension, as experts have widths"),
        (reap(), PLAIN, "family llama has no mixture of experts"),
        (hc_smoe(), PLAIN, "family llama has no mixture of experts"),
        (hc_smoe(experts=6), MIXTURE, "6 of 5 experts cannot stay, as each token passes through 2"),
        (reap(experts=1), MIXTURE, "1 of 5 experts cannot stay, as each token passes through 2"),
        (slicegpt(hidden=49), PLAIN, "49 of 48 hidden channels cannot stay"),
        (slicegpt(fraction=0.9), PLAIN, "0 of 48 hidden channels cannot stay"),
        (slicegpt(), OTHERS["opt, learned positions"], "structure=slicegpt: .*structure=none"),
    ],
)
def test_what_makes_no_model_is_a_sentence_before_anything_is_read(structure, model, sentence):
    source = InMemory(model)
    with pytest.raises(UserError, match=sentence):
        structure(source, WINDOWS)
    assert source.reads == []


@pytest.mark.parametrize(
    "make, settings, sentence",
    [
        (shortgpt, {"fraction": 1.0}, "fraction=1.0 must be from 0 to less than 1"),
        (shortened_llama, {"score": "loss"}, "score='loss' must be perplexity or taylor"),
        (shortened_llama, {"keep_first": -1}, "keep_first=-1 and keep_last=0 must not be negative"),
        (minitron, {"over_sequence": "max"}, "over_sequence='max' must be mean or l2"),
        (llm_pruner, {"taylor": "second"}, "taylor='second' must be"),
        (reap, {"fraction": -0.1}, "fraction=-0.1 must be"),
        (reap, {"score": "norm"}, "score='norm' must be reap or frequency"),
        (slicegpt, {"multiple": 0}, "multiple=0 must be positive"),
    ],
)
def test_bad_settings_are_sentences(make, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**settings)


def test_scores_need_windows():
    cut = shortgpt(layers=1)(InMemory(PLAIN))
    with pytest.raises(UserError, match="is found on calibration windows, and got none"):
        cut.read("embed.weight")


@pytest.mark.parametrize(
    "family, settings, sizes, sentence",
    [
        ("llama", {}, {"hidden": 36, "heads": 2, "feed_forward": 40}, None),
        ("qwen3", {"qk_norm": True}, {"heads": 2, "kv_heads": 1}, None),
        ("mixtral", {"experts": dataclasses.replace(MIXTURE.experts, normalized=True,
                                                    feed_forward=64)}, {"experts": 3}, None),
        ("gpt2", {**GPT2, "kv_heads": 4}, {"heads": 2, "kv_heads": 2}, "no setting for head_size"),
    ],
)  # fmt: skip
def test_others_read_the_shape_or_it_is_refused(family, settings, sizes, sentence, tmp_path):
    """Of a family whose heads fill the residual stream, none can go alone."""
    config = of_sizes(change(family=family, head_size=12, **settings), sizes)
    if sentence is not None:
        with pytest.raises(ValueError, match=sentence):
            FOLDERS[family].write(config)
    else:
        assert read_config(FOLDERS[family].write(config), tmp_path) == config


def test_activations_that_are_not_finite_are_named():
    source = InMemory(PLAIN)
    source.tensors["blocks.1.attention_norm.weight"][:] = 1e38
    cut = shortgpt(layers=1)(source, WINDOWS)
    with pytest.raises(UserError, match="Block 1: The activations at its output hold NaN"):
        cut.read("embed.weight")


def test_structures_with_the_same_settings_are_one():
    assert hash(minitron(heads=2)) == hash(minitron(heads=2)) and minitron(heads=2) == minitron(
        heads=2
    )
