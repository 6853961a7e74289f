"""A decoder as a network of many sub-networks: which of its parameters are of which dimension."""

from collections.abc import Mapping, Sequence

from flax import nnx

from algorithms.search.once_for_all import LAYERS, Place, Places, Space, space
from experiments.checkpoints.dimensions import axes, sizes
from experiments.checkpoints.sources import tensor_name
from experiments.errors import UserError
from models.config import DecoderConfig

DIMENSIONS = (LAYERS, "hidden", "heads", "kv_heads", "feed_forward")
type Choices = Mapping[str, Sequence[int] | None]  # by dimension; None: all units stay


def space_of(config: DecoderConfig, choices: Choices, where: str) -> Space:
    """The sub-networks of a decoder; where: of the settings, for messages.

    Raises UserError for what is no choice, and where a smaller network is not what is left when
    units of the decoder are zero.
    """
    there = {LAYERS: config.layers, **sizes(config)}
    try:
        found = space({d: there[d] for d in DIMENSIONS}, choices)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    for dimension, _ in found.choices:
        if dimension != LAYERS and not any(dimension in each for each in axes(config).values()):
            raise UserError(
                f"{where}.{dimension}: no block has that dimension, as experts have widths of "
                "their own: leave it out."
            )
    chosen = dict(found.choices)
    if "hidden" in chosen and config.norm != "rms":
        raise UserError(
            f"{where}.hidden: a norm that subtracts the mean sees channels that are left out: "
            "leave it out, or choose a model whose norms are of the kind rms."
        )
    if config.qk_norm_whole and {"heads", "kv_heads"} & chosen.keys():
        raise UserError(
            f"{where}: this model's norms of q and k are over all heads, so that none can be left "
            "out: choose layers or feed_forward."
        )
    if config.norms_after:
        raise UserError(f"{where}: an encoder's blocks have no residual stream to be left out of.")
    return found


def places_of(model: nnx.Module, config: DecoderConfig) -> Places:
    """Of every parameter, by its path; a kernel's last axes are a weight's, exchanged.

    Raises UserError for a model with parameters that its architecture does not have.
    """
    table, found = axes(config), []
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = ".".join(map(str, path))
        try:
            where = table[tensor_name(path)]
        except KeyError as error:
            raise UserError(
                f"elastic: {name} is no parameter of a dense decoder: choose parametrization=none, "
                "precision=none and a model that is not compressed."
            ) from error
        if path[-1] == "kernel":
            where = (*where[:-2], where[-1], where[-2])
        block = int(str(path[1])) if path[0] == "blocks" else None
        found.append((name, Place(where, block)))
    return tuple(found)
