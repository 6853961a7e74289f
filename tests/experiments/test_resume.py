"""Nothing is lost: whatever stops a run, earlier outputs stay, the sentence says what to do, and
the same command goes on to the same bytes."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import compress
from experiments.checkpoints import planish
from experiments.checkpoints.planish import CheckpointWriter
from experiments.errors import UserError
from experiments.runs import run as runs
from experiments.runs.journal import Journal
from tests.experiments import tiny

GPTQ = ["algorithm=gptq", "algorithm.format.group_size=32", "algorithm.format.bits=3"]
RTN = ["algorithm=rtn", "algorithm.format.group_size=32"]
FACTORS = ["algorithm=svd_llm", "algorithm@algorithm.factors=gptq", "algorithm.rank_multiple=8",
           "algorithm.factors.format.group_size=8"]  # fmt: skip
SCALED = ["scaling=awq", *GPTQ, "activations=int8_token", "correction=eora", "correction.rank=2",
          "rules=[{match: '.*attention.o', algorithm: null}]"]  # fmt: skip
LEARNED = ["scaling=smoothquant", "algorithm=autoround", "algorithm.steps=4", *GPTQ[1:]]
AIMED = ["calibration=gptaq", *SCALED]
TURNED_AIM = ["calibration=gptaq", "rotation=quarot", *GPTQ]
TURNED = ["rotation=quarot", *RTN, "activations=int4_token"]
CAP_DAC_OVERRIDE, PR_CAPBSET_DROP = 1, 24  # of linux/capability.h and linux/prctl.h


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """settings -> the files of a checkpoint that nobody disturbed."""
    folder, found = tmp_path_factory.mktemp("undisturbed"), {}

    def files(settings):
        key = " ".join(settings)
        if key not in found:
            found[key] = tiny.files(compress.run(tiny.config(folder, *settings)).checkpoint)
        return found[key]

    return files


def interrupt(monkeypatch, part, error, *, when="before"):
    """Have the writer raise `error` at a part."""
    original = CheckpointWriter.write

    def write(self, name, tensors):
        if name == part and when == "before":
            raise error
        original(self, name, tensors)
        if name == part:
            raise error

    monkeypatch.setattr(CheckpointWriter, "write", write)


@pytest.mark.parametrize(
    "settings, part, when",
    [
        (GPTQ, "blocks.0", "after"),
        (GPTQ, "blocks.1", "before"),
        (GPTQ, "embed", "after"),
        ([*GPTQ, "walk.sequential=false"], "blocks.1", "before"),
        (["algorithm=wanda", "walk.sequential=block"], "blocks.1", "before"),
        pytest.param(FACTORS, "blocks.1", "before", marks=pytest.mark.slow),
        (SCALED, "blocks.1", "before"),
        *(
            pytest.param(settings, "blocks.1", "before", marks=pytest.mark.slow)
            for settings in (RTN, LEARNED, TURNED, AIMED)  # all within those below
        ),
        (TURNED_AIM, "blocks.1", "before"),
        ([*LEARNED, "cache=fp8"], "blocks.1", "before"),
        ([*AIMED, "cache=int8"], "blocks.1", "before"),
    ],
)
@pytest.mark.some(4)
def test_an_interrupted_run_ends_with_the_same_bytes(
    config, undisturbed, monkeypatch, settings, part, when
):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt(patched, part, KeyboardInterrupt(), when=when)
        compress.run(config(*settings))
    at = runs.place("compress", compress.resolved(config(*settings)))
    assert not (at.folder / "checkpoint").exists() and not at.finished
    done = compress.run(config(*settings))
    assert tiny.files(done.checkpoint) == undisturbed(settings)
    assert len(done.record["attempts"]) == 2
    assert [layer["layer"] for layer in done.record["layers"]] == [0, 1]
    assert not list(done.folder.glob("*.partial"))


def test_blocks_that_were_finished_are_not_compressed_again(config, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt(patched, "embed", KeyboardInterrupt())
        compress.run(config(*GPTQ))
    done = compress.run(config(*GPTQ))
    assert [e["layer"] for e in Journal(done.folder).entries("layer")] == [0, 1]


def test_an_interrupted_evaluation_keeps_the_checkpoint(config, undisturbed, monkeypatch):

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(compress, "Checkpoint", interrupted)
        compress.run(config(*GPTQ))
    done = compress.run(config(*GPTQ))
    assert tiny.files(done.checkpoint) == undisturbed(GPTQ)
    assert len(done.record["layers"]) == 2 and done.record["seconds"]["compress"] > 0


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_block_is_named_and_compressed_again(
    config, undisturbed, monkeypatch, capfd, damage
):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt(patched, "embed", KeyboardInterrupt())
        compress.run(config(*GPTQ))
    at = runs.place("compress", compress.resolved(config(*GPTQ)))
    path = at.folder / "checkpoint.partial" / "parts" / "blocks.1.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 4
    path.write_bytes({"cut": content[:-9], "flip": content, "empty": b""}[damage])
    done = compress.run(config(*GPTQ))
    assert tiny.files(done.checkpoint) == undisturbed(GPTQ)
    assert "blocks.1 in" in capfd.readouterr().err
    assert "was damaged: it is compressed again" in done.record["warnings"][0]


def process(tmp_path, *settings, before="pass"):
    """The command in a process of its own; `before` is done there first."""
    environment = {**os.environ, "PYTHONPATH": str(tiny.ROOT)}
    go = f"import ctypes, os, resource, sys; {before}; python = sys.executable"
    go += "; os.execv(python, [python, '-m', *sys.argv[1:]])"
    command = [sys.executable, "-c", go, "experiments.compress", *tiny.overrides(tmp_path)]
    return subprocess.Popen(
        [*command, *settings, f"runs={tmp_path / 'runs'}"], env=environment, cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_a_killed_process_loses_nothing(tmp_path, config, undisturbed):
    """First once a block is done, then wherever it is; a real model is killed 50 times by
    `benchmark what=[interruptions]`."""
    running, first = process(tmp_path, *GPTQ), '"event": "layer"'
    while not any(first in path.read_text() for path in tmp_path.rglob("journal.jsonl")):
        assert running.poll() is None
        time.sleep(0.001)
    running.kill()
    running.communicate()
    for seconds in (0.5, 2.0):
        running = process(tmp_path, *GPTQ)
        with pytest.raises(subprocess.TimeoutExpired):
            running.communicate(timeout=seconds)
        running.kill()
        running.communicate()
    done = compress.run(config(*GPTQ))
    assert len(done.record["attempts"]) >= 2
    assert tiny.files(done.checkpoint) == undisturbed(GPTQ)


def test_two_identical_commands_at_once(tmp_path, config, undisturbed):
    """One of them runs; the other is refused, or finds the finished run."""
    both = [process(tmp_path, *GPTQ) for _ in range(2)]
    said = [running.communicate()[0] for running in both]
    codes = sorted(running.returncode for running in both)
    assert codes == [0, 1] or any("already run" in text for text in said)
    if codes == [0, 1]:
        (refusal,) = (text for text in said if "is alive" in text)
        assert "is being worked on by process" in refusal and "Traceback" not in refusal
    (checkpoint,) = tmp_path.glob("runs/compress/*/seed-0/checkpoint")
    assert tiny.files(checkpoint) == undisturbed(GPTQ)


def test_a_disk_that_fills_in_the_middle(tmp_path, config, undisturbed):
    """A limit on the size of a file stands for the quota: blocks fit it, the embedding does not."""
    settings = ["algorithm=gptq", "algorithm.format.group_size=null", "algorithm.format.bits=2",
                "walk.dense_dtype=float32"]  # fmt: skip
    sizes = {name: len(content) for name, content in undisturbed(settings).items()}
    limit = sizes["parts/embed.safetensors"] - 1
    assert max(size for name, size in sizes.items() if "blocks" in name) < limit
    running = process(
        tmp_path, *settings, "logger.tensorboard=false",
        before=f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))",
    )  # fmt: skip
    said = running.communicate()[0]
    assert running.returncode == 1 and "Traceback" not in said, said
    assert "Writing the checkpoint" in said and "run the same command again" in said
    done = compress.run(config(*settings))
    assert tiny.files(done.checkpoint) == undisturbed(settings)


def test_a_read_only_output_folder(tmp_path):
    (tmp_path / "runs").mkdir(mode=0o555)
    # root may write where permissions forbid it, unless it gave that right up
    drop = f"ctypes.CDLL(None).prctl({PR_CAPBSET_DROP}, {CAP_DAC_OVERRIDE}, 0, 0, 0)"
    running = process(tmp_path, *RTN, before=drop)
    said = running.communicate()[0]
    assert running.returncode == 1 and "Traceback" not in said, said
    assert "cannot be made (Permission denied): choose another place" in said
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_disk_error_is_one_sentence_and_nothing_earlier_is_lost(config, undisturbed, monkeypatch):
    original = planish.write_part

    def full(path, *given):
        if path.stem == "blocks.1":
            raise OSError(28, "No space left on device")
        return original(path, *given)

    with monkeypatch.context() as patched:
        patched.setattr(planish, "write_part", full)
        with pytest.raises(UserError, match="No space left on device.*run the same command again"):
            compress.run(config(*GPTQ))
    at = runs.place("compress", compress.resolved(config(*GPTQ)))
    assert Journal(at.folder).entries()[-1]["event"] == "failed"
    done = compress.run(config(*GPTQ))
    assert tiny.files(done.checkpoint) == undisturbed(GPTQ)
    assert np.isfinite(done.record["metrics"]["perplexity"]["value"])
