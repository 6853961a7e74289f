"""Whether a paper's claims hold, computed: HOLDS, DOES NOT HOLD, INCONCLUSIVE or NOT RUN.

Perplexities are compared in the log, paired by held-out window: d = loss of `lower` − loss of
`higher` − log(factor), the mean over shared seeds first, then Student's t over windows. The claim
holds where the 95 % confidence interval of d lies below zero. What training came to is paired by
seed, with d = metric of `lower` − factor · that of `higher`. Any other metric is compared as the
number it is.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from experiments.errors import UserError
from experiments.papers.facts import Claim, Page
from experiments.papers.lookup import Find, NotRecorded, Run, run_at
from experiments.report import Record, loss_differences, number
from experiments.statistics import Estimate, estimate

Status = Literal["HOLDS", "DOES NOT HOLD", "INCONCLUSIVE", "NOT RUN"]
PERPLEXITY = "metrics.perplexity.value"
TRAINED = "training."  # of training runs, whose repetitions are seeds


@dataclasses.dataclass(frozen=True)
class Verdict:
    claim: Claim
    status: Status
    evidence: str  # the statistics behind it, or what it needs
    expected: str | None = None  # what its authors expect at this scale, where they say

    @property
    def surprise(self) -> bool:
        """It came out the other way than its page expects."""
        settled = self.status in ("HOLDS", "DOES NOT HOLD")
        return settled and self.expected is not None and self.status.lower() != self.expected

    @property
    def beside(self) -> str:
        """What was expected and why, as words to stand beside the status; none where none was."""
        if self.expected is None:
            return ""
        how = "to hold" if self.expected == "holds" else "not to hold"
        if self.surprise:
            words = f"though expected {how}"
        elif self.status.lower() == self.expected:
            words = "as expected"
        else:
            words = f"expected {how}"
        return f"{words}: {self.claim.reason}"

    def __str__(self) -> str:
        """The status in words: what it needs, and what was expected."""
        needs = f" (needs: {self.evidence})" if self.status == "NOT RUN" else ""
        return f"{self.status}{needs}{', ' if self.beside else ''}{self.beside}"


def runs_of(claim: Claim, scale: str, stem: str, pages: Mapping[str, Page]) -> tuple[Run, Run]:
    """The two runs that a claim compares, the lower first."""
    return (
        run_at(claim.check.lower, scale, stem, pages),
        run_at(claim.check.higher, scale, stem, pages),
    )


def judge_page(stem: str, scale: str, pages: Mapping[str, Page], find: Find) -> list[Verdict]:
    """Every claim of a page at a scale."""
    return [
        judge(claim, scale, runs_of(claim, scale, stem, pages), find)
        for claim in pages[stem].claims
    ]


def judge(claim: Claim, scale: str, runs: tuple[Run, Run], find: Find) -> Verdict:
    """One claim, by the records that `find` has of its two runs."""
    expected = claim.expected.get(scale)
    sides, needs = [], []
    for run in runs:
        try:
            sides.append(find(run))
        except NotRecorded as error:
            needs.append(str(error))
    if needs:
        return Verdict(claim, "NOT RUN", " and ".join(dict.fromkeys(needs)), expected)
    compare = _perplexities if claim.check.metric == PERPLEXITY else _values
    if claim.check.metric.startswith(TRAINED):
        compare = _trained
    try:
        status, evidence = compare(claim, *sides)
    except UserError as error:
        status, evidence = "NOT RUN", str(error).rstrip(".")
    return Verdict(claim, status, evidence, expected)


def _perplexities(
    claim: Claim, lower: Sequence[Record], higher: Sequence[Record]
) -> tuple[Status, str]:
    """By the paired difference of loss per window."""
    pairs, factor = shared_seeds(lower, higher), claim.check.factor
    ours, theirs = (
        math.exp(float(np.mean([math.log(number(pair[side], PERPLEXITY)) for pair in pairs])))
        for side in (0, 1)
    )
    found = estimate(mean_difference(pairs) - math.log(factor))
    ratio, low, high = (factor * math.exp(x) for x in (found.mean, found.low, found.high))
    return settled(found), (
        f"{ours:.2f} against {theirs:.2f}: ratio {ratio:.3f} ({low:.3f} to {high:.3f}), "
        f"to be below {factor:g}; n = {found.n} windows{_seeds(pairs)}, p {p_value(found.p)}"
    )


def _values(claim: Claim, lower: Sequence[Record], higher: Sequence[Record]) -> tuple[Status, str]:
    """As numbers: sizes and counts have no uncertainty, and times none that one run shows."""
    pairs, check = shared_seeds(lower, higher), claim.check
    ours, theirs = (
        float(np.mean([number(pair[side], check.metric) for pair in pairs])) for side in (0, 1)
    )
    holds = ours < check.factor * theirs
    ratio = f": ratio {ours / theirs:.3f}" if theirs else ""
    return "HOLDS" if holds else "DOES NOT HOLD", (
        f"{check.metric} {ours:.6g} against {theirs:.6g}{ratio}, to be below {check.factor:g}"
        f"{_seeds(pairs)}"
    )


def _trained(claim: Claim, lower: Sequence[Record], higher: Sequence[Record]) -> tuple[Status, str]:
    """By the paired difference of each seed: what training came to varies with them."""
    pairs, check = shared_seeds(lower, higher), claim.check
    ours, theirs = (
        np.array([number(pair[side], check.metric) for pair in pairs]) for side in (0, 1)
    )
    found = estimate(ours - check.factor * theirs)
    return settled(found), (
        f"{ours.mean():.4f} against {theirs.mean():.4f}: difference {found.mean:+.4f} "
        f"({found.low:+.4f} to {found.high:+.4f}), to be below 0"
        f"{'' if check.factor == 1 else f' with the second times {check.factor:g}'}; n = {found.n} "
        f"seeds, p {p_value(found.p)}"
    )


def settled(found: Estimate) -> Status:
    """Of a difference that a claim says is below zero, by its interval."""
    if found.high < 0:
        return "HOLDS"
    return "DOES NOT HOLD" if found.low > 0 else "INCONCLUSIVE"


def shared_seeds(first: Sequence[Record], second: Sequence[Record]) -> list[tuple[Record, Record]]:
    """The runs of both that drew alike, in pairs, the latest of each; UserError if there are none.

    An evaluation draws nothing, so it pairs with every seed of a compression.
    """
    mine, theirs = by_seeds(first), by_seeds(second)
    if len({record["command"] for record in (*first, *second)}) == 2:
        return [(a, b) for a in mine.values() for b in theirs.values()]
    pairs = [(record, theirs[seeds]) for seeds, record in mine.items() if seeds in theirs]
    if not pairs:
        raise UserError("runs of both with the same seeds; these share none")
    return pairs


def by_seeds(records: Sequence[Record]) -> dict[tuple[tuple[str, int], ...], Record]:
    """One run per choice of seeds, the latest; all evaluations are one, whatever their seeds."""
    return {
        () if record["command"] == "evaluate" else tuple(sorted(record["seeds"].items())): record
        for record in sorted(records, key=lambda record: record["started"])
    }


def mean_difference(pairs: Sequence[tuple[Record, Record]]) -> Float[np.ndarray, "windows"]:
    """Loss of the first minus the second's by window, nats, averaged over pairs.

    Raises UserError unless all were evaluated on the same windows.
    """
    found = [loss_differences(*pair) for pair in pairs]
    across = [loss_differences(pair[0], pairs[0][0]) for pair in pairs]
    if any(each is None for each in (*found, *across)):
        digests = {
            record["metrics"]["perplexity"]["data"]["digest"][:12]
            for pair in pairs
            for record in pair
        }
        raise UserError(
            "runs evaluated on the same held-out windows; these are of "
            f"{', '.join(sorted(digests))}"
        )
    return np.mean([each for each in found if each is not None], axis=0)


def p_value(p: float) -> str:
    """With its sign of relation: "= 0.03", "< 1e-16"."""
    return "< 1e-16" if p < 1e-16 else f"= {p:.2g}"


def _seeds(pairs: Sequence[Any]) -> str:
    return f" over {len(pairs)} seeds" if len(pairs) > 1 else ""
