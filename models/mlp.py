"""A multilayer perceptron that classifies: for experiments on small data."""

from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from models.predictions import Predictions


class MLPClassifier(nnx.Module):
    """Linear layers with a rectifier between them; the last one gives a logit for each class."""

    def __init__(self, inputs: int, widths: Sequence[int], classes: int, *, rngs: nnx.Rngs):
        sizes = [inputs, *widths, classes]
        self.layers = nnx.List(
            [nnx.Linear(i, o, rngs=rngs) for i, o in zip(sizes, sizes[1:], strict=False)]
        )

    @property
    def sizes(self) -> dict[str, int | list[int]]:
        """The arguments that it was made with."""
        first, *others = (layer.kernel.get_value().shape for layer in self.layers)
        *widths, classes = (first[1], *(shape[1] for shape in others))
        return {"inputs": first[0], "widths": widths, "classes": classes}

    def __call__(self, x: Float[Array, "B i"]) -> Float[Array, "B c"]:
        *hidden, last = self.layers
        for layer in hidden:
            x = nnx.relu(layer(x))
        return last(x)

    def predictions(self, x: Float[Array, "B i"], features: Sequence[int] = ()) -> Predictions:
        """features: hidden layers whose activations are wanted too, by number."""
        *hidden, last = self.layers
        found = []
        for layer in hidden:
            x = nnx.relu(layer(x))
            found.append(x)
        return Predictions(last(x), features=tuple(found[n] for n in features))
