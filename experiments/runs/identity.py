"""Which run a configuration describes: a hash of its content, by which a command finds its run.

Left out is what changes where a run happens or what it is also written as, but not what it
computes, or counts where it is used (`bits`, `tasks`): EXCLUDED. So are steps of a recipe that are
null, and seeds: runs that differ in seeds alone are repetitions of one experiment, told apart by
their folder. A path to an input counts by the content it leads to, so a model that moves stays the
same model and a file that changes does not; a model that a run makes counts by that run's identity,
and a soup by what its members have in common and what each has of its own, seeds included. An
evaluation on tasks reads no data of ours.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.checkpoints.packages import file_digest
from experiments.checkpoints.sources import open_source

EXCLUDED = frozenset(
    {"runs", "again", "dry_run", "hardware", "logger", "launcher", "hydra", "bits", "export",
     "tasks", "save_every", "keep", "processes"}
)  # fmt: skip
SEEDS = frozenset({"seed", "seeds"})  # at any depth
FOLDERS = frozenset({"include_path"})  # at any depth: every file counts, by its path within
INPUTS = frozenset({"path", "calibration_path", "heldout_path", "checkpoint"})  # at any depth

MADE, SOUP = "experiments.made.model", "experiments.made.soup"
NAMED = "hydra.utils."  # get_method and the like


def identity(command: str, config: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of a resolved config less what does not count.

    Raises UserError if an input that the config names cannot be read.
    """
    unread = {"data"} if command == "evaluate" and "tasks" in config["evaluation"] else set()
    left_out = EXCLUDED | unread  # tasks bring their own questions
    kept = {key: value for key, value in config.items() if key not in left_out and _set(value)}
    content = {"command": command, "config": _content(kept)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _set(value: Any) -> bool:
    """Whether a group says anything: a step that is left out is none, in every version."""
    return value is not None and value != [] and value != {}


def _content(value: Any) -> Any:
    if isinstance(value, Mapping) and value.get("_target_") in (MADE, SOUP):
        from experiments.papers.lookup import Run, identity_of  # which asks for identities itself

        made = {"made": identity_of(Run(value["command"], tuple(value["overrides"])))}
        return made | ({"members": value["members"]} if value["_target_"] == SOUP else {})
    if isinstance(value, Mapping) and str(value.get("_target_")).startswith(NAMED):
        return dict(value)  # its path is a name in Python
    if isinstance(value, Mapping):
        return {key: _entry(key, inner) for key, inner in value.items() if key not in SEEDS}
    return [_content(inner) for inner in value] if isinstance(value, list) else value


def _entry(key: str, value: Any) -> Any:
    if key in FOLDERS and value:
        return _folder_digests(Path(value).expanduser())
    return _input_digest(value) if key in INPUTS and value else _content(value)


def _folder_digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path.relative_to(folder)): file_digest(path) for path in files}


def _input_digest(path: str) -> str:
    """SHA-256 of a text file, or what identifies a model: names and places left out."""
    at = Path(path).expanduser()
    return file_digest(at) if at.is_file() else open_source(at).digest()


def seeds_label(seeds: Mapping[str, int]) -> str:
    """How a run's folder names its seeds: "seed-0", or each one where they differ."""
    if len(set(seeds.values())) == 1:
        return f"seed-{next(iter(seeds.values()))}"
    return "-".join(f"{name}-{value}" for name, value in seeds.items())
