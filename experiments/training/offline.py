"""A teacher's logits, computed once and kept as a codec makes them (`algorithms.distillation`).

    <run>/taught/train-00000.npz   so many windows each; a part appears whole or not at all

An interrupted run goes on with the parts that are there. With the same windows and settings, the
parts have the same bytes.
"""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from algorithms.distillation.compressed_logits import LogitCodec, bytes_of_token
from algorithms.training import Batch
from experiments import progress
from experiments.checkpoints.leaves import storable
from experiments.files import kept_so_far
from experiments.training.data import chunks
from experiments.training.loop import Job, filled

FOLDER = "taught"
WINDOWS = 16  # in a part


def with_stored_logits(job: Job, folder: Path) -> tuple[Job, dict[str, Any]]:
    """The job with a teacher's stored logits in place of the teacher; what a record says of them.

    A job whose objective wants none stays as it is.
    """
    codec = getattr(job.objective, "codec", None)
    if codec is None or job.teacher_graph is None:
        return job, {}
    examples = job.examples
    both = (examples.train, examples.heldout)
    with progress.steps("teach", sum(-(-len(x.inputs) // WINDOWS) for x in both)) as tell:
        stored = {
            name: _stored(job, codec, part, folder / FOLDER, name, tell)
            for name, part in (("train", examples.train), ("heldout", examples.heldout))
        }
    taught = dataclasses.replace(
        examples,
        train=examples.train._replace(taught=stored["train"]),
        heldout=examples.heldout._replace(taught=stored["heldout"]),
    )
    size = sum(x.nbytes for x in jax.tree.leaves(stored))
    token = jax.tree.map(lambda x: x[:1, :1], stored["train"])
    facts = {"bytes": size, "bytes_per_token": bytes_of_token(token)}
    found = dataclasses.replace(job, examples=taught, teacher=None, teacher_graph=None)
    return found, {"teacher_logits": facts}


def _stored(job: Job, codec: LogitCodec, data: Batch, folder: Path, name: str, tell: Any) -> Any:
    """Every window's, in order: a pytree of arrays [n, T, …]."""
    found = []
    folder.mkdir(parents=True, exist_ok=True)
    encode = functools.partial(_encoded, job.teacher, graph=job.teacher_graph, codec=codec)
    for n, part in enumerate(chunks(data, WINDOWS)):
        whole = filled(part, WINDOWS)  # so that one program serves
        key = jax.random.fold_in(jax.random.key(job.seed), n)
        shapes = jax.eval_shape(encode, whole.inputs, key)
        path = folder / f"{name}-{n:05}.npz"
        kept = _read(path, shapes) or _written(path, encode(whole.inputs, key))
        found.append(jax.tree.map(lambda x: x[: len(part.inputs)], kept))  # noqa: B023
        tell("")
    return jax.tree.map(lambda *xs: np.concatenate(xs), *found)


@functools.partial(jax.jit, static_argnames=("graph", "codec"))
def _encoded(teacher: Any, inputs: Any, key: Any, *, graph: Any, codec: LogitCodec):
    """[B, T, …]; logits are there for one window at a time."""
    model: Any = nnx.merge(graph, teacher)

    def one(pair: Any) -> Any:
        tokens, own = pair
        logits = model.predictions(tokens[None]).logits
        return codec.encode(logits, own) if codec.seeded else codec.encode(logits)

    return jax.lax.map(one, (inputs, jax.random.split(key, len(inputs))))


def _written(path: Path, tree: Any) -> Any:
    leaves = [np.asarray(x) for x in jax.tree.leaves(tree)]
    partial = path.with_name(f".{path.name}")
    with kept_so_far(path, "the teacher's logits to "):
        with partial.open("wb") as file:
            np.savez(file, *map(storable, leaves))
        os.replace(partial, path)
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _read(path: Path, shapes: Any) -> Any | None:
    """What was written before; None where nothing was, or not this."""
    if not path.exists():
        return None
    expected, structure = jax.tree.flatten(shapes)
    with np.load(path, allow_pickle=False) as stored:
        raw = [stored[f"arr_{n}"] for n in range(len(stored.files))]
    leaves = [x.view(s.dtype) for x, s in zip(raw, expected, strict=True)]
    assert all(x.shape == s.shape for x, s in zip(leaves, expected, strict=True)), path
    return jax.tree.unflatten(structure, leaves)
