"""Scores per query by ir-measures, and whether two systems differ: paired tests and bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lens.files import require

MEASURES = ("nDCG@10", "RR@10", "R@100")
"""Names as ir-measures parses them. nDCG has linear gains and log2 discounts; RR and R count judgements >= 1."""

Values = Mapping[str, NDArray[np.float64]]
"""Measure -> its value for each query, in the order of the queries."""


@dataclass(frozen=True)
class Comparison:
    """One system against another on one measure: `difference` is the mean of (system - other) over queries.

    `low` and `high` bound its 95% bootstrap interval; `p` is of the randomisation test, `p_holm` the same corrected
    for all comparisons of the data set on this measure, `p_t` of the paired t-test; all are two-sided.
    With fewer than two queries the interval and the p values are None.
    """

    system: str
    other: str
    measure: str
    difference: float
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    p_t: float | None
    wins: int
    ties: int
    losses: int


def per_query(
    qrels: Mapping[str, Mapping[str, int]], run: Mapping[str, Sequence[str]], measures: Sequence[str] = MEASURES
) -> dict[str, NDArray[np.float64]]:
    """Values of each measure for every query of `qrels`, in its order; `run` ranks documents, best first.

    ir-measures gets the ranks, not the scores, so that no provider breaks ties in its own way.
    Raises ValueError for a measure it does not know.
    """
    require("eval", "ir_measures")
    import ir_measures

    try:
        parsed = {ir_measures.parse_measure(measure): measure for measure in measures}
    except (NameError, ValueError) as error:
        raise ValueError(f"unknown measure among {', '.join(measures)}: {error}") from error
    row = {query: number for number, query in enumerate(qrels)}
    values = {measure: np.zeros(len(qrels)) for measure in measures}
    scored = {
        query: {document: float(len(run[query]) - rank) for rank, document in enumerate(run[query])}
        for query in qrels
        if run.get(query)
    }
    if scored:
        judged = {query: dict(documents) for query, documents in qrels.items()}
        for value in ir_measures.iter_calc(list(parsed), judged, scored):
            values[parsed[value.measure]][row[value.query_id]] = value.value
    return values


def randomisation_test(differences: NDArray[np.float64], resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p of the paired randomisation test on the mean: signs of the differences flipped at random.

    All 2^n flips are enumerated where they are no more than `resamples`. Source: Smucker, Allan and Carterette,
    "A comparison of statistical significance tests for information retrieval evaluation", CIKM 2007.
    """
    test = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=1000,
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def interval(
    values: NDArray[np.float64], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float] | tuple[None, None]:
    """95% percentile bootstrap interval of the mean over queries; (None, None) for fewer than two."""
    if len(values) < 2:
        return None, None
    result = stats.bootstrap(
        (values,), np.mean, n_resamples=resamples, batch=1000, method="percentile", rng=np.random.default_rng(seed)
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the i-th smallest of m p values times (m - i + 1), kept monotone, at most 1."""
    corrected = [0.0] * len(p)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda place: p[place])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[place]))
        corrected[place] = largest
    return corrected


def compare(
    values: Mapping[str, Values], pairs: Sequence[tuple[str, str]], resamples: int = 10_000, seed: int = 0
) -> list[Comparison]:
    """Compares pairs (system, other) on every measure; `values` holds system -> measure -> value per query."""
    comparisons = []
    for measure in values[pairs[0][0]] if pairs else ():
        differences = [values[system][measure] - values[other][measure] for system, other in pairs]
        tested = len(differences[0]) > 1
        p = [randomisation_test(difference, resamples, seed) for difference in differences] if tested else []
        corrected = holm(p)
        for place, ((system, other), difference) in enumerate(zip(pairs, differences, strict=True)):
            low, high = interval(difference, resamples, seed)
            p_t = None
            if tested:
                same = np.ptp(difference) == 0
                p_t = float(not difference.any()) if same else float(stats.ttest_1samp(difference, 0).pvalue)
            comparisons.append(
                Comparison(
                    system=system,
                    other=other,
                    measure=measure,
                    difference=float(difference.mean()),
                    low=low,
                    high=high,
                    p=p[place] if tested else None,
                    p_holm=corrected[place] if tested else None,
                    p_t=p_t,
                    wins=int((difference > 0).sum()),
                    ties=int((difference == 0).sum()),
                    losses=int((difference < 0).sum()),
                )
            )
    return comparisons
