"""What is evaluated and saved: the parameters that an optimizer's state makes of the trained ones.

Averaged, extrapolated or masked weights belong to the optimizer's state, so it alone can tell which
weights a model is to be judged by. A state that has a say is a NamedTuple with a method

    def eval_params(self, params): ...   # given leaves of optax.MaskedNode, leaves them out

and is found wherever it is: in chains, groups, masks and wrappers of any transformation. What is
further out acts first: of an average over a sparse model, the average is taken and then the mask.

A state that wants to begin elsewhere than at the given parameters, with some of them at zero, has a
method `start_params` of the same kind.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from optax.contrib import ScheduleFreeState, schedule_free_eval_params


def eval_params(state: optax.OptState, params: Any) -> Any:
    """The parameters to evaluate and save, in the structure and dtypes of the trained ones."""
    if isinstance(state, ScheduleFreeState):
        params = where_present(schedule_free_eval_params, state, state.z, params)
    elif hasattr(state, "eval_params"):
        params = state.eval_params(params)
    for member in reversed(_members(state)):
        params = eval_params(member, params)
    return params


def start_params(state: optax.OptState, params: Any) -> Any:
    """The parameters that training begins with, by a state that was made for the given ones."""
    if hasattr(state, "start_params"):
        params = state.start_params(params)
    for member in reversed(_members(state)):
        params = start_params(member, params)
    return params


def _members(state: Any) -> list[Any]:
    if isinstance(state, dict):
        return list(state.values())
    return list(state) if isinstance(state, tuple) else []


def where_present(function: Callable[[Any, Any], Any], state: Any, mine: Any, params: Any) -> Any:
    """function(state, params) for the leaves that `mine`, a part of the state, has; the rest stay.

    Under `optax.masked` a state has MaskedNode in place of what it does not see.
    """

    def absent(leaf: Any) -> bool:
        return isinstance(leaf, optax.MaskedNode)

    seen = jax.tree.map(lambda m, p: m if absent(m) else p, mine, params, is_leaf=absent)
    found = function(state, seen)

    def chosen(f: Any, p: Any) -> Any:
        return p if absent(f) else f.astype(p.dtype)

    return jax.tree.map(chosen, found, params, is_leaf=absent)
