"""Which of a query's candidates become its negatives: the rank window, the filters, and random passages."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rules:
    """How negatives are chosen. Raises ValueError naming the option.

    `margin` M and `max_share` S let a candidate pass whose score is below p - M and below S * p, p being the score of
    the positive, the best or the worst one as `anchor` says (TopK-MarginPos and TopK-PercPos of NV-Retriever,
    arXiv 2407.15831). For p below 0, S * p becomes (2 - S) * p, so that a smaller share is always the stricter one.
    """

    negatives: int = 15
    depth: int = 100
    skip: int = 0
    sample: Literal["random", "top"] = "random"
    random_share: float = 0.0
    margin: float | None = None
    max_share: float | None = None
    anchor: Literal["highest", "lowest"] = "highest"
    seed: int = 42

    def __post_init__(self) -> None:
        if self.negatives < 1 or self.depth < 1 or not 0 <= self.skip < self.depth:
            raise ValueError(
                f"--negatives and --depth must be at least 1 and --skip from 0 to below --depth; found "
                f"{self.negatives}, {self.depth}, {self.skip}"
            )
        if not 0 <= self.random_share <= 1:
            raise ValueError(f"--random-share must be from 0 to 1, found {self.random_share}")
        if self.margin is not None and not 0 <= self.margin < math.inf:
            raise ValueError(f"--margin must be a number of at least 0, found {self.margin}")
        if self.max_share is not None and not 0 < self.max_share <= 1:
            raise ValueError(f"--max-share must be above 0 and at most 1, found {self.max_share}")

    @property
    def filters(self) -> bool:
        """Whether the positives' scores are needed."""
        return self.margin is not None or self.max_share is not None

    def limits(self, positives: NDArray[np.float64]) -> dict[str, float]:
        """What a candidate's score must lie below, by the option that says so; `positives` are scores (m,)."""
        score = float(positives.max() if self.anchor == "highest" else positives.min()) if self.filters else 0.0
        limits = {}
        if self.margin is not None:
            limits["margin"] = score - self.margin
        if self.max_share is not None:
            limits["max_share"] = score * (self.max_share if score >= 0 else 2 - self.max_share)
        return limits


def choose(
    rules: Rules,
    number: int,
    positions: NDArray[np.int64],
    scores: NDArray[np.float64],
    positives: NDArray[np.float64],
    keys: NDArray[np.int64],
    banned: set[int],
    counts: Counter[str],
) -> list[tuple[int, float | None]]:
    """The negatives of question `number` as (position, score), in the order of their ranks; random ones, whose score
    is None, come last.

    `positions` (c,) and `scores` (c,) are its candidates, best first, `positives` (m,) its positives' scores, `keys`
    (N,) tells which passages of the corpus hold the same text, and texts in `banned` are never chosen. Candidates that
    the window or a filter leaves out are no random passages either. `counts` counts what was left out by which rule.
    """
    rng = random.Random(f"{rules.seed} {number}")
    limits = rules.limits(positives)
    refused = set(banned)
    pool: dict[int, tuple[int, float]] = {}
    for rank, (position, score) in enumerate(zip(positions.tolist(), scores.tolist(), strict=True)):
        key = int(keys[position])
        over = next((name for name, limit in limits.items() if score >= limit), None)
        if key in banned:
            counts["positive, query or blank"] += 1
        elif rank < rules.skip:
            counts["skip"] += 1
            refused.add(key)
        elif key in refused or key in pool:
            counts["duplicate"] += 1
        elif over is not None:
            counts[over] += 1
            refused.add(key)
        else:
            pool[key] = (position, score)
    wanted = rules.negatives - round(rules.random_share * rules.negatives)
    passed = list(pool)
    chosen = passed[:wanted]
    if rules.sample == "random" and len(passed) > wanted:
        places = sorted(rng.sample(range(len(passed)), wanted))
        chosen = [passed[place] for place in places]
    found: list[tuple[int, float | None]] = [pool[key] for key in chosen]
    drawn = draw(rng, rules.negatives - len(found), keys, refused.union(chosen))
    counts["random"] += len(drawn)
    return found + [(position, None) for position in drawn]


def draw(rng: random.Random, wanted: int, keys: NDArray[np.int64], refused: set[int]) -> list[int]:
    """Positions of `wanted` random passages, or of as many as there are, of different texts that are not `refused`."""
    if not wanted:
        return []
    found: dict[int, int] = {}
    for _ in range(20 * wanted + 100):
        position = rng.randrange(len(keys))
        key = int(keys[position])
        if key not in refused and key not in found:
            found[key] = position
        if len(found) == wanted:
            return list(found.values())
    # Most of the corpus is refused or repeated: look at what is left.
    left = np.flatnonzero(~np.isin(keys, list(refused | set(found))))
    _, first = np.unique(keys[left], return_index=True)
    rest = left[np.sort(first)].tolist()
    return [*found.values(), *rng.sample(rest, min(wanted - len(found), len(rest)))]
