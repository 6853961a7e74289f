"""Tables that other searches measured: budgets change what is chosen, and not what is known."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments import records
from experiments.errors import UserError
from experiments.runs import run as runs
from experiments.runs.identity import identity
from experiments.searching.walks import Row


class Measured(NamedTuple):
    identity: str | None  # of the search that did; None: the one that asks
    rows: dict[int, list[Row]]
    seconds: float  # that it took


def seconds(record: Mapping[str, Any]) -> float:
    """What it took to fill a search's table, whichever search did."""
    return record["search"].get("seconds", record["seconds"]["search"])


def measured_before(at: runs.Place) -> Measured | None:
    """What a finished search beside this one measured, if it differs from it in budgets alone;
    nothing where again=true asks for a new measurement.
    """
    asked = _without_budgets(at.config)
    if at.config["again"] or asked is None:
        return None
    for path in sorted(at.folder.parents[1].glob(f"*/*/{records.FILE}")):
        if (found := _measured(path, asked, at.config)) is not None:
            return found
    return None


def _measured(path: Any, asked: str, config: Mapping[str, Any]) -> Measured | None:
    try:
        record = records.read(path)
        if record["command"] != "search" or _without_budgets(record["config"]) != asked:
            return None
    except UserError:  # a record that is damaged, or of a model that is no longer there
        return None
    if record["config"]["seeds"] != config["seeds"]:
        return None
    rows = defaultdict[int, list[Row]](list)
    for unit in record["search"]["units"]:
        rows[int(unit["unit"].split(".")[1])].append(
            {key: value for key, value in unit.items() if key != "chosen"}
        )
    wanted = {name for name, value in config["allocation"]["budgets"].items() if value is not None}
    costs = {"bytes", *next(iter(rows.values()))[0]}  # bytes are bits
    return Measured(record["identity"], rows, seconds(record)) if wanted <= costs else None


def _without_budgets(config: Mapping[str, Any]) -> str | None:
    allocation = config.get("allocation") or {}
    if "budgets" not in allocation:
        return None  # an allocation of another kind: what it measures is done at once
    return identity("search", {**config, "allocation": {**allocation, "budgets": {}}})
