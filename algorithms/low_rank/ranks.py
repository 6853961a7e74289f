"""How many ranks stay of a weight: as many as a fraction of its parameters pays for."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ratio:
    """k (o + i) <= ratio o i, with k the largest such multiple of `rank_multiple`."""

    ratio: float = 0.8
    rank_multiple: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(
                f"ratio={self.ratio} must be between 0 and 1: of its parameters, what is left."
            )
        if self.rank_multiple < 1:
            raise ValueError(f"rank_multiple={self.rank_multiple} must be positive.")

    def rank(self, shape: tuple[int, ...]) -> int:
        """k of a weight [o, i]; raises ValueError if none is left."""
        o, i = shape
        k = int(o * i * self.ratio / (o + i)) // self.rank_multiple * self.rank_multiple
        if k < 1:
            raise ValueError(
                f"ratio={self.ratio} leaves no rank of a weight [{o}, {i}] that is a multiple of "
                f"rank_multiple={self.rank_multiple}: raise ratio, or leave such layers out."
            )
        return k
