"""Steps and rules: what each layer gets, and the sentence for every mistake."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import hessian
from algorithms.tensors import QuantizedInput, QuantizedTensor
from experiments import compress
from experiments.checkpoints.planish import Checkpoint
from experiments.errors import UserError
from experiments.recipe_builder import build_recipe
from tests.experiments.checkpoints.synthetic import CONFIG

GROUPS = "algorithm.format.group_size=32"
ROUND = "{_target_: algorithms.quantization.rtn.rtn, format: {_target_: algorithms.formats.fp8}}"


def recipe(config, *overrides):
    return build_recipe(config("algorithm=gptq", GROUPS, *overrides), CONFIG)


def rules(*each):
    return f"rules=[{', '.join(each)}]"


def test_without_rules_every_layer_has_the_algorithm_and_the_ends_stay_dense(config):
    found = recipe(config)
    blocks = [found.block(CONFIG, layer).values() for layer in (0, 1)]
    assert len(set().union(*blocks)) == 1
    assert found.method("embed") is None and found.method("head") is None


def test_the_first_rule_that_matches_decides(config):
    found = recipe(config, rules(
        "{match: 'blocks.0.mlp.down', algorithm: {format: {bits: 8}}}",
        "{match: '.*mlp.down', algorithm: null}",
        f"{{match: 'embed', algorithm: {ROUND}}}",
    ))  # fmt: skip
    assert found.method("blocks.1.mlp.down") is None
    assert found.method("embed") is not None
    default, eight = found.method("blocks.1.mlp.up"), found.method("blocks.0.mlp.down")
    w, stats = jnp.ones((4, 32)), default.init(32)
    assert eight.compress(w, stats).bits == 8 and default.compress(w, stats).bits == 4


def test_one_object_for_one_configuration_so_that_it_compiles_once(config):
    rule = "{match: 'blocks.[01].mlp.down', algorithm: {format: {bits: 8}}}"
    found = recipe(config, rules(rule))
    assert found.method("blocks.0.mlp.down") is found.method("blocks.1.mlp.down")


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ("{match: '.*mlp.dwon', algorithm: null}", "match='.*mlp.dwon' decides no layer"),
        ("{match: 'mlp.down', algorithm: null}", "patterns match whole paths such as blocks.0."),
        ("{match: '(', algorithm: null}", "is no pattern"),
        ("{algorithm: null}", "should be a mapping with match"),
        ("{match: '.*', algoritm: null}", "no setting algoritm; did you mean algorithm"),
        ("{match: '.*', algorithm: {format: {bitz: 3}}}", "has no setting bitz"),
        ("{match: 'embed', algorithm: {damping: 0.1}}", "embed can be compressed by a method wit"),
        ("{match: '.*', algorithm: {format: {bits: 17}}}", "bits=17 must be from 2 to 8"),
    ],
)
def test_every_mistake_in_a_rule_is_a_sentence(config, rule, sentence):
    with pytest.raises(UserError, match=sentence):
        recipe(config, rules(rule))


def test_a_rule_has_its_own_pruning(config):
    asked = config("algorithm@pruning=wanda", "pruning.sparsity=0.25",
                   "rules=[{match: '.*down', pruning: {sparsity: 0.75}},"
                   " {match: '.*up', pruning: null}]")  # fmt: skip
    recipe = build_recipe(asked, CONFIG)
    w = jax.random.normal(jax.random.key(0), (32, 64))
    x = jax.random.normal(jax.random.key(1), (50, 64))
    for path, zeros in [("gate", 0.25), ("down", 0.75)]:
        method = recipe.method(f"blocks.0.mlp.{path}")
        found = method.compress(w, method.observe(method.init(64), x))
        assert (found.dequantize() == 0).mean() == pytest.approx(zeros, abs=0.03)
    assert recipe.method("blocks.0.mlp.up").observe is hessian.observe


def test_only_what_takes_one_layer_at_a_time_is_pruned_before(config):
    asked = config("algorithm@pruning=wanda", "algorithm=autoround")
    with pytest.raises(UserError, match="pruning goes before an algorithm that takes one layer"):
        build_recipe(asked, CONFIG)


def test_a_rule_whose_pruning_names_no_method_is_a_mistake(config):
    """There is none that its settings could lie over."""
    with pytest.raises(UserError, match=r"both have to be such: \{'sparsity': 0.4\}, .*gptq") as e:
        recipe(config, rules("{match: '.*mlp.up', pruning: {sparsity: 0.4}}"))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("value", ["1", "0", "blocks", "null"])
@pytest.mark.some(2)
def test_an_order_that_there_is_not_is_refused(config, tmp_path, value):
    """1 is no true: the walk asks for that very object."""
    shown = {"null": "None", "blocks": "'blocks'"}.get(value, value)
    with pytest.raises(UserError, match=f"walk: sequential={shown} must be true, false or block"):
        compress.run(config("algorithm=wanda", f"walk.sequential={value}"))
    assert not (tmp_path / "runs").exists()


def test_a_rule_hidden_by_one_before_it_is_a_mistake(config):
    with pytest.raises(UserError, match=r"rules\[1\].*decides no layer"):
        recipe(config, rules("{match: '.*', algorithm: {format: {bits: 3}}}",
                             "{match: '.*mlp.up', algorithm: null}"))  # fmt: skip


def test_a_mixed_recipe_is_written_and_evaluated(config):
    """Bits by layer, a dense layer, a compressed embedding, rounded activations."""
    done = compress.run(config("algorithm=gptq", GROUPS, "activations=int8_token", rules(
        "{match: 'blocks.0.mlp.down', algorithm: {format: {bits: 8}}}",
        "{match: 'blocks.1.attention.o', algorithm: null}",
        "{match: '.*attention.q', activations: null}",
        f"{{match: embed, algorithm: {ROUND}, activations: null}}",
    )))  # fmt: skip
    checkpoint = Checkpoint(done.checkpoint)
    down = checkpoint.tensor("blocks.0.mlp.down.weight")
    assert isinstance(down, QuantizedInput) and down.weight.bits == 8
    assert isinstance(checkpoint.tensor("blocks.1.attention.q.weight"), QuantizedTensor)
    assert isinstance(checkpoint.tensor("blocks.1.attention.o.weight"), np.ndarray)
    assert isinstance(checkpoint.tensor("embed.weight"), QuantizedTensor)
    assert np.isfinite(done.record["metrics"]["perplexity"]["value"])
    assert [step.get("rule") for step in checkpoint.description["recipe"]][2:] == [
        "blocks.0.mlp.down", "blocks.1.attention.o", ".*attention.q", "embed",
    ]  # fmt: skip
