"""The leaves of a pytree as they are stored: arrays by path, and what each one is.

Orbax stores neither empty arrays nor every small dtype: the former are made again from what is said
of them, the latter are stored as bytes.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # gives NumPy the names of the small dtypes
import numpy as np

from experiments.errors import UserError

PYTHON_SCALARS = (bool, int, float, complex)


class Leaf(NamedTuple):
    """One leaf as it is stored."""

    kind: str  # what it must be compared with, "bfloat16[3,4]" or "key<fry>[]" or "Python int"
    data: np.ndarray
    key: str | None  # of a key: the name of its generator


def flat(tree: Any) -> dict[str, Any]:
    """Leaves by path, such as "['opt'][0].mu['w']"."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in pairs}


def _kind(name: str, leaf: Any) -> str:
    if isinstance(leaf, PYTHON_SCALARS) and not isinstance(leaf, np.generic):
        return f"Python {type(leaf).__name__}"
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        raise ValueError(
            f"The leaf {name} of the state is a {type(leaf).__name__}, not an array or a number: "
            "put it into `extra`."
        )
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def stored(name: str, leaf: Any) -> Leaf:
    """A leaf as it is stored, in memory of its own; raises ValueError for what is no array."""
    kind, generator = _kind(name, leaf), None
    if kind.startswith("key<"):
        leaf, generator = jax.random.key_data(leaf), str(jax.random.key_impl(leaf))
    data = np.array(leaf)  # a copy: the loop may overwrite or donate its own
    if data.dtype.kind not in "biufcV" or data.dtype.names or not data.dtype.isnative:
        raise ValueError(
            f"The leaf {name} of the state has dtype {data.dtype}, which is not stored: give it "
            "one that JAX has."
        )
    return Leaf(kind, data, generator)


def describe(leaf: Leaf) -> dict[str, Any]:
    """What JSON keeps of a leaf."""
    described = {"kind": leaf.kind, "dtype": leaf.data.dtype.name, "shape": list(leaf.data.shape)}
    return described if leaf.key is None else {**described, "key": leaf.key}


def storable(x: np.ndarray) -> np.ndarray:
    """x in a dtype that Orbax surely stores: its bytes, unless the dtype is a common one."""
    common = x.dtype.isbuiltin == 1 or x.dtype == jnp.bfloat16
    return x if common else x.view(np.uint8)


def targets(described: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays like the stored ones, without memory of their own."""
    filled = {name: d for name, d in described.items() if 0 not in d["shape"]}
    scalars = {name: np.zeros((), _dtype(d["dtype"])) for name, d in filled.items()}
    return {
        name: np.broadcast_to(storable(scalars[name]), d["shape"]) for name, d in filled.items()
    }


def leaf(described: Mapping[str, Any], stored: np.ndarray | None) -> Leaf:
    """A leaf from what was said of it and what `storable` made of its data; None: it was empty."""
    dtype = _dtype(described["dtype"])
    data = np.zeros(described["shape"], dtype) if stored is None else np.asarray(stored).view(dtype)
    return Leaf(described["kind"], data, described.get("key"))


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def digest(facts: Mapping[str, Any], leaves: Mapping[str, Leaf]) -> str:
    """SHA-256 of the facts but for the digest, and of every leaf's bytes."""
    total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(leaves):
        total.update(np.ascontiguousarray(leaves[name].data).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def fitted(template: Any, leaves: Mapping[str, Leaf], where: str) -> Any:
    """The leaves as a tree like `template`; raises UserError at the first that does not fit."""
    wanted = {name: _kind(name, leaf) for name, leaf in flat(template).items()}
    for name in sorted(wanted.keys() | leaves.keys()):
        expected = wanted.get(name, "nothing")
        found = leaves[name].kind if name in leaves else "nothing"
        if expected != found:
            raise UserError(
                f"The state in {where} does not fit: at {name} the run expects {expected} and "
                f"finds {found}. Use the settings that it was saved with, or another folder."
            )
    like = flat(template)
    values = [_like(leaf, leaves[name]) for name, leaf in like.items()]
    return jax.tree.unflatten(jax.tree.structure(template), values)


def _like(template: Any, leaf: Leaf) -> Any:
    """A stored leaf as the kind of object that the template has in its place."""
    if isinstance(template, np.ndarray):
        return leaf.data
    if isinstance(template, (np.generic, *PYTHON_SCALARS)):
        return leaf.data[()] if isinstance(template, np.generic) else leaf.data.item()
    x = jnp.asarray(leaf.data) if leaf.key is None else jax.random.wrap_key_data(
        jnp.asarray(leaf.data), impl=leaf.key
    )  # fmt: skip
    if getattr(template, "weak_type", False) and x.ndim == 0:
        x = jnp.asarray(leaf.data.item())  # promotes as before: 1.0 times bfloat16 stays bfloat16
    committed = getattr(template, "committed", True)
    sharding = getattr(template, "sharding", None) if committed else None
    return x if sharding is None else jax.device_put(x, sharding)
