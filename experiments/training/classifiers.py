"""Trained classifiers as files: parameters by path in safetensors, sizes in its metadata."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.checkpoints import shards
from experiments.errors import UserError
from experiments.untrusted import DAMAGE, explained, parse_json, require_file
from models.mlp import MLPClassifier

FILE = "classifier.safetensors"


def save(model: MLPClassifier, folder: Path) -> Path:
    """Write a classifier, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        ".".join(map(str, path)): np.asarray(variable[...])
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    shards.save(folder / FILE, arrays, {"planish": json.dumps(model.sizes)})
    return folder / FILE


def trained(path: str) -> Callable[..., MLPClassifier]:
    """What conf/model/classifier names: makes the classifier that was saved.

    Raises UserError if it cannot be read.
    """
    at = require_file(Path(path).expanduser())
    try:
        sizes = parse_json(shards.read_metadata(at)["planish"])
        made = nnx.eval_shape(lambda: MLPClassifier(**sizes, rngs=nnx.Rngs(0)))
        found = {name: entry.open() for name, entry in shards.read_header(at).items()}
        for place, variable in nnx.to_flat_state(nnx.state(made)):
            x = found.pop(".".join(map(str, place)))
            if x.shape != variable.get_value().shape:
                raise ValueError(f"{place} has shape {x.shape}")
            variable.set_value(jnp.array(x))
    except (UserError, *DAMAGE) as error:
        raise UserError(
            f"{at} is no classifier that planish saved: {explained(error)}; give the path of a "
            f"run's checkpoint/{FILE}."
        ) from error
    graph, state = nnx.split(made)

    def build(*, rngs: Any) -> MLPClassifier:
        return nnx.merge(graph, state, copy=True)

    return build
