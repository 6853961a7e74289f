"""The state of a training run: bit for bit, through kills, damage and templates that do not fit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from experiments.checkpoints.leaves import flat
from experiments.checkpoints.state import StateKeeper
from experiments.errors import UserError

ROOT = Path(__file__).parents[3]
SMALL = ["int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float8_e4m3fn", "float8_e5m2"]


@pytest.fixture
def keeper(tmp_path):
    warnings: list[str] = []
    with StateKeeper(tmp_path / "state", warn=warnings.append) as found:
        found.warnings = warnings
        yield found


def state(seed=0):
    """A bit of everything: parameters, optimizer state, keys, numbers, odd dtypes and shapes."""
    rng = np.random.default_rng(seed)
    model = nnx.to_pure_dict(nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(seed))))
    return {
        "model": model,
        "optimizer": optax.adamw(1e-3).init(model),
        "keys": (jax.random.key(seed), jax.random.split(jax.random.key(seed, impl="rbg"), 3)),
        "bfloat16": jnp.asarray(rng.normal(size=(2, 3)), jnp.bfloat16),
        "nan": np.array([0x7FC00001, 0xFFC12345, 0x80000000], np.uint32).view(np.float32),
        "small": {name: np.ones(3, getattr(ml_dtypes, name)) for name in SMALL},
        "int4": jnp.array([-8, -3, 0, 7], jnp.int4),
        "empty": jnp.zeros((0, 3)),
        "numbers": [seed, True, 0.1, np.float64(0.1), jnp.asarray(2.0)],
        "a/b": {"c": jnp.arange(3)},
        "a": {"b/c": jnp.arange(4)},
    }


def content(tree):
    """What must not change: kind of object, dtype, shape, bits."""
    found = {}
    for name, leaf in flat(tree).items():
        key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        data = np.asarray(jax.random.key_data(leaf) if key else leaf)
        kind = type(leaf), getattr(leaf, "dtype", None), getattr(leaf, "weak_type", None)
        found[name] = (*kind, data.shape, data.tobytes())
    return found


def test_every_leaf_comes_back_bit_for_bit(keeper):
    extra = {"position": [3, 10**20], "name": "ä", "rate": 0.1}
    keeper.save(7, state(1), extra)
    found = keeper.latest(state(2))
    assert (found.step, found.extra) == (7, extra)
    assert jax.tree.structure(found.state) == jax.tree.structure(state())
    assert content(found.state) == content(state(1))


def test_a_template_may_be_of_shapes_alone(keeper):
    keeper.save(1, {"w": jnp.ones((2, 3), jnp.bfloat16), "key": jax.random.key(3)})
    template = jax.eval_shape(
        lambda: {"w": jnp.zeros((2, 3), jnp.bfloat16), "key": jax.random.key(0)}
    )
    found = keeper.latest(template).state
    assert found["w"].dtype == jnp.bfloat16 and bool((found["w"] == 1).all())
    assert jax.random.uniform(found["key"]) == jax.random.uniform(jax.random.key(3))


def test_what_was_saved_is_what_was_given_not_what_became_of_it(keeper):
    x, donated = np.zeros(100_000), jnp.zeros(100_000)
    keeper.save(1, {"x": x, "donated": donated})
    x[:] = 1
    jax.jit(lambda y: y + 1, donate_argnums=0)(donated)
    assert not keeper.latest({"x": x, "donated": jnp.ones(100_000)}).state["x"].any()


def test_the_newest_steps_are_kept_and_nothing_is_overwritten(keeper):
    assert keeper.latest({"n": 0}) is None
    for step in range(1, 5):
        keeper.save(step, {"n": step})
    assert keeper.latest({"n": 0}).state == {"n": 4}
    assert sorted(path.name for path in keeper.folder.iterdir()) == ["3", "4"]
    with pytest.raises(ValueError, match="step=4 must be greater than the last one saved, 4"):
        keeper.save(4, {"n": 5})


def shorten(folder):
    for path in (folder / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-7])


def flip(folder):
    for path in (folder / "state").rglob("d/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


def change_facts(folder):
    path = next(p for p in (folder / "facts").iterdir() if b"digest" in p.read_bytes())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"extra": {"position": 4}}))


def remove_facts(folder):
    for path in (folder / "facts").iterdir():
        path.unlink()


def other_values(folder):
    """Whole by every check of Orbax's own."""
    for path in (folder / "state").rglob("*"):
        if path.is_file():
            path.unlink()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", {"['w']": np.full(5000, 2.0)}, force=True)


@pytest.mark.parametrize("damage", [shorten, flip, change_facts, remove_facts, other_values])
def test_a_damaged_step_is_reported_and_the_one_before_it_used(keeper, damage, capfd):
    for step in (1, 2):
        w = np.random.default_rng(step).normal(size=5000)
        keeper.save(step, {"w": w}, {"position": step})
    keeper.wait()
    damage(keeper.folder / "2")
    found = keeper.latest({"w": np.zeros(5000)})
    assert (found.step, found.extra) == (1, {"position": 1})
    (sentence,) = keeper.warnings
    assert sentence.startswith(f"Step 2 in {keeper.folder} is damaged (")
    assert "moved to damaged-2, and step 1 is used instead." in sentence
    assert "\n" not in sentence and "Traceback" not in capfd.readouterr().err
    keeper.save(2, {"w": np.ones(5000)})
    assert keeper.latest({"w": np.zeros(5000)}).state["w"].all()


def test_a_run_is_not_begun_anew_in_silence(keeper):
    keeper.save(1, {"w": np.arange(5)})
    keeper.wait()
    remove_facts(keeper.folder / "1")
    for _ in range(2):  # at every start
        with pytest.raises(UserError, match="Every state in .* is damaged: delete the folder"):
            keeper.latest({"w": np.arange(5)})
    (sentence,) = keeper.warnings
    assert sentence.endswith("moved to damaged-1, and there is none before it.")


def test_a_lack_of_memory_is_no_damage(keeper, monkeypatch):
    keeper.save(1, {"w": np.arange(5)})
    keeper.wait()

    def restore(*arguments, **options):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(ocp.CheckpointManager, "restore", restore)
        with pytest.raises(MemoryError):
            keeper.latest({"w": np.arange(5)})
    assert keeper.latest({"w": np.arange(5)}).step == 1


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (dict(w=np.zeros((2, 4))), r"at \['w'\] the run expects float64\[2,4\] and finds"),
        (dict(w=jnp.zeros((2, 3))), r"expects float32\[2,3\] and finds float64\[2,3\]"),
        (dict(w=np.zeros((2, 3)), b=1), r"at \['b'\] the run expects Python int and finds nothing"),
        (dict(), r"at \['w'\] the run expects nothing and finds float64\[2,3\]"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_fit_is_a_sentence(keeper, template, sentence):
    keeper.save(1, {"w": np.zeros((2, 3))})
    with pytest.raises(UserError, match=sentence):
        keeper.latest(template)
    assert not keeper.warnings  # nothing is damaged


def test_a_key_of_another_generator_does_not_fit(keeper):
    keeper.save(1, {"key": jax.random.key(0)})
    with pytest.raises(UserError, match=r"expects key<rbg>\[\] and finds key<fry>\[\]"):
        keeper.latest({"key": jax.random.key(0, impl="rbg")})


def test_mistakes_are_sentences(tmp_path, keeper):
    with pytest.raises(ValueError, match=r"leaf \['name'\] of the state is a str, not an array"):
        keeper.save(1, {"name": "x"})
    with pytest.raises(ValueError, match="dtype object, which is not stored"):
        keeper.save(1, {"n": 10**30})
    with pytest.raises(UserError, match="keep=0 is too small"):
        StateKeeper(tmp_path, keep=0)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/state cannot hold the state of a run .Not a dir"):
        StateKeeper(tmp_path / "file" / "state")


def test_a_save_that_fails_says_so_and_keeps_what_there_was(keeper, monkeypatch):
    keeper.save(1, {"n": 1})
    keeper.wait()

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(ocp.CheckpointManager, "save", full)
        keeper.save(2, {"n": 2})
        with pytest.raises(UserError, match="Saving step 2 in .* failed .*No space left on device"):
            keeper.wait()
    assert keeper.latest({"n": 0}).step == 1


# A real loop: Adam on a small model, batches from a key and from a position in shuffled data.
LOOP = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
from experiments.checkpoints.state import StateKeeper

folder, last = sys.argv[1], int(sys.argv[2])
data = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
adam = optax.adam(1e-2)
key, first, second = jax.random.split(jax.random.key(0), 3)
params = {"in": jax.random.normal(first, (32, 256)) / 6, "out": jax.random.normal(second, (256, 32)) / 16}
params["out"] = params["out"].astype(jnp.bfloat16)
state = {"params": params, "optimizer": adam.init(params), "key": key}

@jax.jit
def train(state, batch):
    key, used = jax.random.split(state["key"])
    x = batch + 0.1 * jax.random.normal(used, batch.shape)
    def loss(p):
        return jnp.mean((jnp.tanh(x @ p["in"]) @ p["out"] - batch) ** 2)
    updates, optimizer = adam.update(jax.grad(loss)(state["params"]), state["optimizer"])
    return {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer, "key": key}

with StateKeeper(folder) as keeper:
    found = keeper.latest(state)
    step, position = 0, 0
    if found is not None:
        step, state, position = found.step, found.state, found.extra["position"]
    print("begun", step, flush=True)
    while step < last:
        state = train(state, data[position : position + 8])
        step, position = step + 1, (position + 8) % 64
        keeper.save(step, state, {"position": position})
        print(step, flush=True)
    print("done", flush=True)
"""  # noqa: E501
STEPS = 40


def start(folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", LOOP, str(folder), str(STEPS)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(folder):
    out, err = start(folder).communicate()
    assert out.endswith("done\n") and not err, err
    return int(out.split()[1])


def kill_after(folder, steps, seconds):
    """SIGKILL `seconds` after that many steps were taken: while one is computed or written."""
    process = start(folder)
    assert process.stdout is not None
    begun = int(process.stdout.readline().split()[1])
    for _ in range(steps):
        process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return begun


def files_of_newest(folder):
    with StateKeeper(folder) as keeper:
        assert keeper._manager.latest_step() == STEPS
        return keeper._read(STEPS)


def test_a_killed_loop_ends_with_the_same_bits(tmp_path):
    assert finish(tmp_path / "whole") == 0
    draw, begun = random.Random(time.time()), []
    for _ in range(4):
        moment = draw.randint(1, STEPS // 5), draw.uniform(0, 0.1)
        begun.append(kill_after(tmp_path / "killed", *moment))
    begun.append(finish(tmp_path / "killed"))
    assert begun[-1] > 0 and begun == sorted(begun)
    (expected, position), (found, position_found) = (
        files_of_newest(tmp_path / name) for name in ("whole", "killed")
    )
    assert position == position_found and expected.keys() == found.keys()
    for name, leaf in expected.items():
        assert leaf.data.tobytes() == found[name].data.tobytes(), name
    assert not list((tmp_path / "killed").glob("damaged-*"))
