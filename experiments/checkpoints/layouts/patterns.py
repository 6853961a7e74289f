"""Patterns of layers' names in a quantization_config, which anybody may have written."""

import functools
import re


@functools.lru_cache(maxsize=4096)
def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern that is matched in reasonable time, whoever wrote it; raises ValueError."""
    bare = re.sub(r"\\.", "_", pattern)
    tame = len(re.findall(r"[*+{]", bare)) <= 4 and not re.search(r"[)][*+?{]|[(][?][^:=!]", bare)
    try:
        if tame:
            return re.compile(pattern)
        error: object = "it repeats too much"
    except (re.error, OverflowError, RecursionError) as caught:
        error = caught
    raise ValueError(f"{pattern!r} of the quantization_config is no pattern that is read: {error}.")
