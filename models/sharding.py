"""How a decoder's parameters lie on a mesh of devices, by the wiring that it declares.

A site that a norm feeds is read by layers split by their outputs, each device computing some of the
channels; a site that such layers feed is read by layers split by their inputs, whose results are
summed (Shoeybi et al., Megatron-LM, arXiv:1909.08053). So activations cross devices once for each
such pair. Along the other axis, parameters are split for storage alone and gathered where they are
used (Rajbhandari et al., ZeRO, arXiv:1910.02054). What that does not divide, is on every device.

Mesh axes: "data" and "fsdp" share a batch's windows; "fsdp" also splits parameters; "model" splits
the layers' work.
"""

import functools

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.config import DecoderConfig
from models.decoder import sites

AXES = ("data", "fsdp", "model")
BATCH = PartitionSpec(("data", "fsdp"))


@functools.cache
def split_by_inputs(config: DecoderConfig, layer: int) -> frozenset[str]:
    """The linear layers of a block that read what other linear layers produce, by path."""
    readers = {path for site in sites(config, layer) for path in site.readers}
    found = set[str]()
    for site in sites(config, layer):
        if site.producer in readers:
            found.update(site.readers)
    return frozenset(found)


def partition(config: DecoderConfig, path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """Of one parameter by its dotted path in the model: "blocks.0.attention.q.kernel"."""
    *module, field = path.split(".")
    if field == "embedding" and "embed" in module:
        return PartitionSpec("model", "fsdp")  # the vocabulary, as of the head
    if module[:1] == ["blocks"]:
        inside, layer = ".".join(module[2:]), int(module[1])
        by_inputs = inside in split_by_inputs(config, layer)
        linear = any(inside in site.readers for site in sites(config, layer))
    else:
        by_inputs, linear = False, module[-1:] == ["head"]
    if not linear:
        return PartitionSpec()
    batch = (None,) * (len(shape) - 2)  # a mixture's experts
    if field == "bias":
        return PartitionSpec() if by_inputs else PartitionSpec("model")
    return PartitionSpec(*batch, *(("model", "fsdp") if by_inputs else ("fsdp", "model")))


def fitting(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...]) -> NamedSharding:
    """Without the axes that do not divide the shape."""
    kept = [
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for axis, size in zip((*spec, *(None,) * (len(shape) - len(spec))), shape, strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*kept))


def require_divisible(config: DecoderConfig, mesh: Mesh) -> None:
    """Raise ValueError unless the mesh divides heads and feed-forward channels."""
    n = mesh.shape["model"]
    own = [config.layer(layer) for layer in range(config.layers)]
    found = [("heads", config.heads), *(("kv_heads", each.kv_heads) for each in own),
             *(("feed_forward", each.feed_forward) for each in own)]  # fmt: skip
    for name, size in found:
        if size % n:
            raise ValueError(
                f"mesh.model={n} must divide the model's {name}={size}: choose a divisor of it."
            )
