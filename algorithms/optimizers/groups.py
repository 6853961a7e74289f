"""Which parameter gets which optimizer: the first group whose pattern matches its path.

Paths are those of the model, with dots ("blocks.3.attention.q.kernel"), for pytrees of any kind.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import optax


def path_name(path: tuple[Any, ...]) -> str:
    """The dotted name of a leaf; an nnx variable's own last step (`.value`) is left out."""
    names = [
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    ]
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and names[-1] == "value":
        names.pop()
    return ".".join(names)


def named(params: Any) -> dict[str, Any]:
    """The leaves of a pytree by their dotted names."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def compiled(pattern: str, option: str) -> re.Pattern[str]:
    """A pattern for whole paths; raises ValueError, with the option's name, for what is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{option}={pattern!r} is no regular expression: {error}.") from error


def assignment(params: Any, match: Mapping[str, str]) -> dict[str, str]:
    """The group of each leaf. Raises ValueError for a leaf that no pattern matches."""
    return {name: _group(name, match) for name in named(params)}


def _group(name: str, match: Mapping[str, str]) -> str:
    for group, pattern in match.items():
        if re.fullmatch(pattern, name):
            return group
    raise ValueError(
        f"No pattern of match={dict(match)} matches the parameter {name}: end with a group that "
        "matches '.*'."
    )


def grouped(
    *, match: Mapping[str, str], **optimizers: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """One optimizer for each group of parameters.

    match: for each group, in order, the regular expression that the whole path of a parameter
    matches; a parameter belongs to the first. Raises ValueError for groups without an optimizer,
    optimizers without a group, what is no regular expression, and, at `init`, a parameter of none.
    """
    if match.keys() != optimizers.keys():
        raise ValueError(
            f"match names the groups {', '.join(match)}, and there are optimizers for "
            f"{', '.join(optimizers)}: give each group both."
        )
    for group, pattern in match.items():
        compiled(pattern, f"match.{group}")

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: _group(path_name(path), match), params
        )

    return optax.with_extra_args_support(optax.partition(optimizers, labels))
