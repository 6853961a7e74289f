"""What proposes the sub-networks of a search: what conf/structure/sampler names.

Given the same answers, a sampler proposes the same again, so that a search that was killed goes on
by being told what it had found. Evolution is NSGA-II's, of one objective (Deb et al., IEEE
Transactions on Evolutionary Computation 2002), the model that of TPE (Bergstra et al., NeurIPS
2011), both as optuna has them: what is beyond a budget ranks by how far, behind all that is within.
"""

import abc
import sys
from collections.abc import Callable, Mapping
from typing import Any

from algorithms.search.once_for_all import Space
from experiments.errors import UserError

BEYOND = sys.float_info.max  # the value of what is within no budget, which nobody looks at
type Sampler = Callable[[Space, int], "Proposals"]  # of a space and a seed


class Proposals(abc.ABC):
    """One search's."""

    exhaustive = False  # whether it proposes all sub-networks, each once

    @abc.abstractmethod
    def ask(self) -> dict[str, int] | None:
        """The next sub-network; None: there is no other."""

    @abc.abstractmethod
    def tell(self, loss: float | None, over: Mapping[str, float]) -> None:
        """Of the one that was asked for last. over: by how much each budget is exceeded,
        relatively; not above zero where it is not. loss: None where any is.
        """


class Everything(Proposals):
    """All sub-networks in order."""

    exhaustive = True

    def __init__(self, space: Space):
        self._left = iter(space)

    def ask(self) -> dict[str, int] | None:
        return next(self._left, None)

    def tell(self, loss: float | None, over: Mapping[str, float]) -> None:
        pass


class Study(Proposals):
    """What one of optuna's samplers proposes. Sizes are told by their rank: their order counts."""

    def __init__(self, space: Space, sampler: Any):
        import optuna  # takes a second to import

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._choices = dict(space.choices)
        self._ranks: dict[str, Any] = {
            name: optuna.distributions.IntDistribution(0, len(values) - 1)
            for name, values in space.choices
        }
        self._study = optuna.create_study(sampler=sampler)
        self._trial: Any = None

    def ask(self) -> dict[str, int]:
        self._trial = self._study.ask(self._ranks)
        return {name: self._choices[name][rank] for name, rank in self._trial.params.items()}

    def tell(self, loss: float | None, over: Mapping[str, float]) -> None:
        for name, value in over.items():
            self._trial.set_constraint(name, value)
        self._study.tell(self._trial, BEYOND if loss is None else loss)


def evolution(
    *, population: int = 16, mutation: float | None = None, crossover: float = 0.9
) -> Sampler:
    """Children of what is best so far. mutation: the probability that a size is drawn anew; None:
    one in as many as there are.
    """
    if population < 2:
        raise ValueError(f"population={population} must be at least 2.")
    _require_probabilities(mutation=mutation, crossover=crossover)

    def proposals(space: Space, seed: int) -> Proposals:
        import optuna

        return Study(space, optuna.samplers.NSGAIISampler(
            population_size=population, mutation_prob=mutation, crossover_prob=crossover, seed=seed,
        ))  # fmt: skip

    return proposals


def tpe(*, startup: int = 10, candidates: int = 24) -> Sampler:
    """What is likely among the best and unlikely among the others. startup: drawn before."""
    for name, value in (("startup", startup), ("candidates", candidates)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")

    def proposals(space: Space, seed: int) -> Proposals:
        import optuna

        return Study(space, optuna.samplers.TPESampler(
            n_startup_trials=startup, n_ei_candidates=candidates, seed=seed
        ))  # fmt: skip

    return proposals


def random() -> Sampler:
    """Each choice as likely as any other."""

    def proposals(space: Space, seed: int) -> Proposals:
        import optuna

        return Study(space, optuna.samplers.RandomSampler(seed=seed))

    return proposals


def exhaustive(*, most: int = 4096) -> Sampler:
    """All of them. most: sub-networks, beyond which it is refused."""

    def proposals(space: Space, seed: int) -> Proposals:
        if len(space) > most:
            raise UserError(
                f"structure: there are {len(space)} sub-networks, more than sampler.most={most}: "
                "choose structure/sampler=evolution, or raise it."
            )
        return Everything(space)

    return proposals


def _require_probabilities(**given: float | None) -> None:
    for name, value in given.items():
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must be from 0 to 1.")
