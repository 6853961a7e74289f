"""Many devices and many processes come to what one comes to, to rounding."""

import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx

from algorithms.optimizers.groups import named
from experiments.errors import UserError
from experiments.training import metrics
from experiments.training.parallel import Devices
from models.config import DecoderConfig, Mixing
from models.decoder import Decoder
from models.sharding import partition, split_by_inputs
from tests.experiments import tiny
from tests.experiments.training import small

FLAGS = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count="
SETTINGS = ["batch=8", "evaluation_batch=8", "optimizer=muon", "model.vocabulary=256"]


def curve(folder):
    """Every number of a run's metrics, in order."""
    (path,) = folder.glob(f"train/*/seed-0/{metrics.FILE}")
    found = []
    for line in metrics.read(path):
        means = line.get("train") or line["heldout"]
        found += [means["loss"], line.get("gradient_norm", 0.0)]
    return np.array(found)


def trained(folder, name, devices, *more):
    arguments = [*small.overrides(folder), *SETTINGS, f"runs={folder / name}", *more]
    done = tiny.command("experiments.train", *arguments, cwd=folder, XLA_FLAGS=f"{FLAGS}{devices}")
    assert done.returncode == 0, done.stderr
    return curve(folder / name)


def test_eight_devices_have_the_curve_of_one(tmp_path):
    one = trained(tmp_path, "one", 1)
    by_data = trained(tmp_path, "data", 8, "mesh.data=8")
    all_axes = trained(
        tmp_path, "all", 8, "mesh.data=2", "mesh.fsdp=2", "mesh.model=2", "remat=true"
    )
    np.testing.assert_allclose(by_data, one, rtol=2e-4)
    np.testing.assert_allclose(all_axes, one, rtol=2e-4)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def together(folder, port, *more):
    """Two processes with two devices each; the first one writes."""
    arguments = [*small.overrides(folder), *SETTINGS, f"runs={folder / 'two'}", *more]
    environment = {**os.environ, "PYTHONPATH": str(tiny.ROOT), "XLA_FLAGS": f"{FLAGS}2"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "experiments.train", *arguments, "mesh.data=2", "mesh.fsdp=2",
             f"processes.coordinator=127.0.0.1:{port}", "processes.count=2",
             f"processes.number={number}"],
            cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip


def test_two_processes_killed_and_resumed_have_the_curve_of_one(tmp_path):
    one = trained(tmp_path, "one", 1, "steps=30", "save_every=5")
    more = ["steps=30", "save_every=5"]
    first = together(tmp_path, free_port(), *more)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(tmp_path.glob("two/train/*/seed-0/state/5")):
        assert all(process.poll() is None for process in first), first[0].communicate()[1]
        time.sleep(0.02)
    for process in first:
        process.kill()
        process.communicate()
    second = together(tmp_path, free_port(), *more)
    said = [process.communicate(timeout=150)[1] for process in second]
    assert [process.returncode for process in second] == [0, 0], said
    np.testing.assert_allclose(curve(tmp_path / "two"), one, rtol=2e-4)


@pytest.mark.parametrize(
    "sizes, batch, sentence",
    [
        ({"data": 3}, 6, "are 3 devices, and there are 1"),
        ({"model": 2}, 4, "are 2 devices, and there are 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, batch, sentence):
    with pytest.raises(UserError, match=sentence):
        Devices(**sizes).mesh(None, batch)


def test_a_mesh_that_does_not_divide_is_refused(tmp_path):
    """By a process with eight devices, in one sentence."""
    for more, sentence in (
        (["mesh.data=8", "batch=12", "evaluation_batch=8"], "must divide the windows"),
        (["mesh.model=8", "batch=8"], "mesh.model=8 must divide the model's heads=2"),
    ):
        done = tiny.command(
            "experiments.train", *small.overrides(tmp_path), *more, cwd=tmp_path,
            XLA_FLAGS=f"{FLAGS}8",
        )  # fmt: skip
        assert done.returncode == 1
        assert sentence in " ".join(done.stderr.split())
        assert "Traceback" not in done.stderr


def test_layers_are_split_as_the_sites_say():
    config = DecoderConfig(
        vocabulary=24, hidden=16, layers=2, heads=2, kv_heads=1, head_size=8, feed_forward=20,
        context=16, qkv_bias=True, experts=Mixing(count=3, chosen=1, feed_forward=6, layers=(1,)),
    )  # fmt: skip
    assert split_by_inputs(config, 0) == {"attention.o", "mlp.down"}
    params = nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), nnx.Param)
    specs = {name: partition(config, name, x.shape) for name, x in named(params).items()}
    spec = jax.sharding.PartitionSpec
    assert specs["blocks.0.attention.q.kernel"] == spec("fsdp", "model")
    assert specs["blocks.0.attention.o.kernel"] == spec("model", "fsdp")
    assert specs["blocks.0.attention.q.bias"] == spec("model")
    assert specs["blocks.0.mlp.gate.kernel"] == spec("fsdp", "model")
    assert specs["blocks.0.mlp.down.kernel"] == spec("model", "fsdp")
    assert specs["blocks.1.mlp.experts.down.kernel"] == spec(None, "model", "fsdp")
    assert specs["stem.embed.embedding"] == spec("model", "fsdp")
    assert specs["tail.head.kernel"] == spec("fsdp", "model")
    assert specs["blocks.0.attention_norm.scale"] == spec()
