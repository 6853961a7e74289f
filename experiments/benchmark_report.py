"""Tables of benchmarks, from their records."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.configuration import did_you_mean
from experiments.errors import UserError
from experiments.measurements import spectra
from experiments.report import Record, grid, with_interval
from experiments.statistics import estimate

PARTS = ("read", "forward", "statistics", "solve", "write")


def markdown(record: Record, what: str) -> str:
    """What a benchmark measured, as a table with the machine below it."""
    tables: dict[str, Callable[[Any], list[list[str]]]] = {
        "gptq": _gptq_rows,
        "perplexity": _perplexity_rows,
        "memory": _memory_rows,
        "interruptions": _interruption_rows,
        "estimates": _estimate_rows,
        "scale": _scale_rows,
        "hostile": _hostile_rows,
        "algorithm_costs": _algorithm_cost_rows,
        "repeatability": _repeatability_rows,
        "trainer": _trainer_rows,
        "optimizer_costs": _optimizer_cost_rows,
        "teacher_logits": _teacher_logits_rows,
        "widths": _widths_rows,
        "mathematics": _mathematics_rows,
        "spectrum": spectra.table,
    }
    if what not in tables:
        raise UserError(f"benchmark={what} has no table{did_you_mean(what, tables)}")
    header, *rows = tables[what](record["results"][what])
    device = record["device"]
    machine = f"{device['cores']} cores ({device['machine']}), jax {record['versions']['jax']}"
    return f"{grid([header, *rows], text_columns=0)}\n\n{machine}.\n"


def _gptq_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    header = ["calibration windows", "seconds", "compile", "llm-compressor, s", "times faster"]
    header += ["floor, s", "times floor", *PARTS]
    rows = []
    for row in results:
        peers = [result["seconds"] for result in row.get("llmcompressor", [])]
        rows.append(
            [
                str(row["calibration"]),
                f"{row['seconds']:.1f}",
                f"{row['compile_seconds']:.1f}",
                ", ".join(f"{seconds:.0f}" for seconds in peers) or "–",
                f"{row['times_faster']:.2f}" if peers else "–",
                f"{sum(row['floor_seconds'].values()):.1f}",
                f"{row['times_floor']:.2f}",
                *(f"{row['parts_with_compile'].get(part, 0.0):.1f}" for part in PARTS),
            ]
        )
    return [header, *rows]


def _perplexity_rows(row: dict[str, Any]) -> list[list[str]]:
    """Ours reads the weights as it goes; transformers loads them before its time begins."""
    theirs = row.get("transformers", [])
    header = ["seconds, reading included", "compile", "transformers, s", "its loading, s"]
    header += ["times faster", "loading counted"]
    cells = [f"{row['seconds']:.1f}", f"{row['compile_seconds']:.1f}"]
    cells += [
        ", ".join(f"{r[key]:.1f}" for r in theirs) or "–" for key in ("seconds", "load_seconds")
    ]
    for key in ("times_faster", "times_faster_with_loading"):
        cells.append(f"{row[key]:.2f}" if theirs else "–")
    return [header, cells]


def _memory_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [
        [str(row["blocks"]), f"{row['peak_memory'] / 1e9:.3f}", f"{row['times_least']:.3f}"]
        for row in results
    ]
    return [["blocks", "peak memory, GB", "times the least"], *rows]


def _scale_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    header = ["shapes", "blocks", "recipe", "a block, GB", "its statistics", "activations", "peak"]
    header += ["of twice a block", "and statistics", "at start", "of twice a block, without"]
    header += ["and statistics", "export's Δ loss"]
    header += ["whole model: peak, GB", "hours", "disk, GB"]
    rows = []
    for row in results:
        held, whole = row["held"], row["whole"]
        start = row.get("memory_at_start")  # which earlier records have not
        peak, twice = row["peak_memory"], 2 * held["block"] + held["activations"]
        solving = twice + 2 * held["statistics"]
        rows.append(
            [
                row["model"].replace("_", " "),
                f"{row['blocks']} of {whole['blocks']}",
                " ".join(part.partition("=")[2] for part in row["recipe"]),
                *(f"{held[part] / 1e9:.2f}" for part in ("block", "statistics", "activations")),
                f"{peak / 1e9:.2f}",
                *(f"{peak / least:.2f}" for least in (twice, solving)),
                "–" if start is None else f"{start / 1e9:.2f}",
                *(
                    "–" if start is None else f"{(peak - start) / least:.2f}"
                    for least in (twice, solving)
                ),
                f"{row['loss_of_export'] - row['loss']:+.1e}",
                f"{max(whole['memory'].values()) / 1e9:.1f}",
                f"{sum(whole['seconds'].values()) / 3600:.1f}",
                f"{whole['disk'] / 1e9:.1f}",
            ]
        )
    return [header, *rows]


def _interruption_rows(row: dict[str, Any]) -> list[list[str]]:
    header = [
        "kills",
        "finished runs among them",
        "an undisturbed run, s",
        "blocks kept when killed",
    ]
    kept = [done for one in row["rounds"] for done in one["layers_done_at_kill"]]
    cells = [str(row["kills"]), str(row["runs"]), f"{row['undisturbed_seconds']:.0f}"]
    cells.append(f"{min(kept)}–{max(kept)}, {sum(kept) / len(kept):.0f} on average")
    return [[*header, "files with equal bytes"], [*cells, f"all {row['files']}"]]


def _estimate_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    header = ["run", "memory estimated, GB", "measured", "ratio", "time estimated, s", "measured"]
    rows = [
        [
            row["configuration"],
            f"{row['estimated_memory'] / 1e9:.2f}",
            f"{row['measured_peak'] / 1e9:.2f}",
            f"{row['memory_ratio']:.2f}",
            f"{row['estimated_seconds']:.0f}",
            f"{row['measured_seconds']:.0f}",
            f"{row['time_ratio']:.2f}",
        ]
        for row in results
    ]
    return [[*header, "ratio"], *rows]


def _hostile_rows(row: dict[str, Any]) -> list[list[str]]:
    """By the first words of a kind: what every file can have, then each format's own."""
    groups: dict[str, list[int]] = {}
    for kind, counts in row["kinds"].items():
        what, own, _ = kind.partition(":")
        name = f"{what}, edited" if own else "any bytes, any file"
        name = "a hostile chat template" if kind == "a hostile chat template" else name
        found = groups.setdefault(name, [0, 0, 0])
        groups[name] = [a + b for a, b in zip(found, counts.values(), strict=True)]
    rows = [[name, str(sum(n)), *map(str, n)] for name, n in sorted(groups.items())]
    whole = [row[verdict] for verdict in ("accepted", "refused", "finding")]
    header = ["damage", "files", "still valid", "refused in a sentence", "anything else"]
    return [header, *rows, ["all", str(row["files"]), *map(str, whole)]]


def _trainer_rows(row: dict[str, Any]) -> list[list[str]]:
    """Positions per second of both in their medians; the overhead is the median over turns."""
    header = ["bare steps, tokens/s", "the trainer's", "overhead", "compilations of the step"]
    header += ["arguments, MB", "temporaries", "estimate of the whole run"]
    speeds = [row["bare_positions_per_second"], row["trainer_positions_per_second"]]
    memory = [row["memory"]["arguments"], row["memory"]["temporaries"], row["estimated_memory"]]
    cells = [*(f"{statistics.median(each):,.0f}" for each in speeds), f"{row['overhead']:+.1%}"]
    cells += [str(row["compilations"]), *(f"{each / 1e6:.1f}" for each in memory)]
    return [header, cells]


def _algorithm_cost_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The first is what the others are multiples of; seconds are medians over turns."""
    header = ["algorithm", f"times {results[0]['algorithm']}'s time", "seconds", "compile", *PARTS]
    rows = [
        [
            row["algorithm"],
            f"{row['times_first']:.2f}",
            f"{statistics.median(row['seconds']):.1f}",
            f"{row['compile_seconds']:.1f}",
            *(f"{row['phases_with_compile'].get(part, 0.0):.1f}" for part in PARTS),
        ]
        for row in results
    ]
    return [header, *rows]


def _repeatability_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The difference is the last column's from the first."""
    cores = results[0]["cores"]
    header = ["run", *(f"on {n} core{'s' if n > 1 else ''}" for n in cores), "Δ loss"]
    rows = [
        [
            row["run"],
            *(f"{value:.2f}" for value in row["perplexity"]),
            f"{row['difference']:+.4f} ± {row['standard_error']:.4f}",
        ]
        for row in results
    ]
    return [header, *rows]


def _optimizer_cost_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The cheapest first."""
    header = ["optimizer", "times AdamW's time", "ns per parameter"]
    header += ["state, bytes per parameter", "temporaries"]
    rows = [
        [
            row["optimizer"],
            f"{row['times_adamw']:.2f}",
            f"{row['nanoseconds_per_parameter']:.2f}",
            f"{row['state_bytes_per_parameter']:.1f}",
            f"{row['temporaries_per_parameter']:.1f}",
        ]
        for row in sorted(results, key=lambda row: row["times_adamw"])
    ]
    return [header, *rows]


def _teacher_logits_rows(found: dict[str, Any]) -> list[list[str]]:
    header = ["k", "values", "bytes a token", "of all in bfloat16", "mass kept", "KL lost, nats"]
    rows = [
        [
            str(row["k"]),
            row.get("values", "bfloat16") + (f", {row['exact']} exact" if "exact" in row else ""),
            str(row["bytes_per_token"]),
            f"{row['bytes_per_token'] / (2 * found['vocabulary']):.2%}",
            f"{row['kept']:.4f}",
            f"{row['kl']:.5f}",
        ]
        for row in found["rows"]
    ]
    return [header, *rows]


def _widths_rows(found: dict[str, Any]) -> list[list[str]]:
    header = ["parametrization", "mean magnitude of", *(f"{w} wide" for w in found["widths"])]
    rows = [
        [
            parametrization,
            name,
            *(f"{size:.3g}" for size in each["sizes"]),
            with_interval(estimate(np.array(each["powers"])), 2, sign="+"),
        ]
        for parametrization, names in found["parametrizations"].items()
        for name, each in names.items()
    ]
    return [[*header, "power of the width"], *rows]


def _mathematics_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    header = ["function", "size", "ours, ms", "compile, s", "oracle", "its time, ms"]
    rows = [
        [
            row["function"],
            row["size"],
            f"{1e3 * row['seconds']:.3g}",
            f"{row['compile_seconds']:.2f}",
            row["oracle"],
            f"{1e3 * row['oracle_seconds']:.3g}",
            f"{row['times_faster']:.2f}",
            f"{row['apart']:.0e}",
        ]
        for row in results
    ]
    return [[*header, "times faster", "apart"], *rows]
