"""Small data with classes, for experiments that take seconds: conf/data/digits, conf/data/mnist1d.

Each has `examples(seed)`: what to train on and what to evaluate by, drawn apart by the seed.
"""

import csv
import dataclasses
import gzip
import hashlib
import importlib

import numpy as np
from jaxtyping import Float, Int

from algorithms.training import Batch
from experiments.checkpoints.packages import fetch_member
from experiments.errors import UserError
from experiments.training.data import Examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits:
    """1797 handwritten digits of 8 × 8 pixels (UCI Optical Recognition, Alpaydin and Kaynak, 1998),
    as scikit-learn's package has them. Pixels are from 0 to 1.
    """

    train: int | None = None  # examples to train on; None: all that are not held out
    heldout: int = 597
    package: str
    version: str
    member: str
    sha256: str
    size: int | None = None

    def examples(self, seed: int = 0) -> Examples:
        """Raises UserError if the package cannot be fetched or has too few examples."""
        path = fetch_member(self.package, self.version, self.member, self.sha256, size=self.size)
        with gzip.open(path, "rt") as file:
            table = np.array(list(csv.reader(file)), np.float32)
        return split(table[:, :-1] / 16, table[:, -1].astype(np.int32), self.train, self.heldout,
                     "digits", seed)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class MNIST1D:
    """MNIST-1D: ten classes of signals of 40 numbers, made by a procedure (Greydanus and Kobak,
    ICML 2024, arXiv:2011.14439), by its authors' package.
    """

    train: int | None = None
    heldout: int = 1000
    samples: int = 5000

    def examples(self, seed: int = 0) -> Examples:
        """Raises UserError where the package is not installed."""
        try:
            made = importlib.import_module("mnist1d.data")
        except ImportError as error:
            raise UserError(
                "data=mnist1d is made by the package mnist1d, which is not installed: "
                "`pip install mnist1d`."
            ) from error
        arguments = made.get_dataset_args()
        arguments.num_samples = self.samples
        found = made.make_dataset(arguments)  # by its own fixed seed
        x = np.concatenate([found["x"], found["x_test"]]).astype(np.float32)
        y = np.concatenate([found["y"], found["y_test"]]).astype(np.int32)
        return split(x, y, self.train, self.heldout, "mnist1d", seed)


def split(
    x: Float[np.ndarray, "n i"], y: Int[np.ndarray, " n"], train: int | None, heldout: int,
    name: str, seed: int,
) -> Examples:  # fmt: skip
    """Held-out examples and those to train on, drawn without replacement. The former do not depend
    on how many of the latter are asked for.
    """
    available = len(y) - heldout
    wanted = available if train is None else train
    if not 0 < heldout < len(y) or not 0 < wanted <= available:
        raise UserError(
            f"data: {name} has {len(y)} examples, which do not give train={train} and "
            f"heldout={heldout}: ask for fewer."
        )
    order = np.random.default_rng(seed).permutation(len(y))
    held, taught = order[:heldout], order[heldout : heldout + wanted]
    content = hashlib.sha256(x[order].tobytes() + y[order].tobytes() + bytes(str(wanted), "ascii"))
    return Examples(Batch(x[taught], y[taught]), Batch(x[held], y[held]), name, content.hexdigest())
