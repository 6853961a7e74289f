"""Where activations meet linear layers: the wiring that compression walks."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """One activation that one or more linear layers read.

    Statistics (a Hessian, a mean, a range) belong to the site, so all its readers share them.
    Paths are module paths inside one block, such as "attention.q".
    """

    name: str
    readers: tuple[str, ...]  # linear layers that multiply this activation
    producer: str  # the norm or linear layer whose output it is, up to elementwise operations
    absorbs_scale: bool  # the producer can take a diagonal scale on its output channels
    absorbs_rotation: bool  # the producer can take a rotation of its output channels
    experts: bool = False  # readers have a weight for each expert, the activation rows by expert
    others: tuple[str, ...] = ()  # linear layers that read it too and are never compressed
    per_head: bool = False  # the producer has one channel for several of the activation's: its
    # key-value heads serve groups of query heads, in order
