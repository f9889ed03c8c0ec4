"""Clusters of one size: k-means, then the borders are moved until every part holds as much as the others.

Plain k-means gives some students little to do. The equal parts that lie closest to its centres solve a transport
problem, and by duality they are cells again: argmin_k |f - centre_k|^2 + price_k for the right prices. So the parts of
unseen prompts need no table.

Letters: N points, D features, K parts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import ClusterError, kmeans2
from scipy.optimize import linprog
from scipy.sparse import csr_array, vstack

from stepdistill.errors import UserError
from stepdistill.partition import Array, ByCluster, squared_distances


ITERATIONS = 100
ATTEMPTS = 10  # a start that leaves a cluster empty is tried again with the next seed


def fit_clusters(features: Array, students: int, seed: int) -> ByCluster:
    """Equal parts around the centres of k-means.

    Args:
        features: (N, D); rows that come twice count once.
        students: K.
        seed: of the centres' start.

    Raises:
        UserError: fewer different points than students.
    """
    points = np.unique(features, axis=0)
    if len(points) < students:
        raise UserError(f"{students} students cannot share prompts with {len(points)} different embeddings; give "
                        "fewer students or more prompts")  # fmt: skip
    if students == 1:
        return ByCluster(points.mean(axis=0, keepdims=True), np.zeros(1))
    centres = _centres(points, students, seed)
    costs = squared_distances(points, centres)
    return ByCluster(centres, prices_of(costs, equal_parts(costs)))


def _centres(points: Array, students: int, seed: int) -> Array:
    for attempt in range(ATTEMPTS):
        try:
            centres, _ = kmeans2(points, students, iter=ITERATIONS, minit="++", missing="raise", seed=seed + attempt)
        except ClusterError:
            continue
        return np.asarray(centres, dtype=np.float64)
    raise UserError(f"k-means found no {students} clusters in {len(points)} embeddings; give fewer students")


def equal_parts(costs: Array) -> NDArray[np.int64]:
    """The cheapest assignment with parts of N / K points, one more or less where it does not divide: (N, K) => (N,).

    A transport problem: its linear programme has whole numbers at every corner.
    """
    points, parts = costs.shape
    variables = np.arange(points * parts)
    ones = np.ones(points * parts)
    each_once = csr_array((ones, (variables // parts, variables)))
    sizes = csr_array((ones, (variables % parts, variables)))
    least, most = points // parts, -(-points // parts)
    solution = linprog(
        costs.ravel(), A_eq=each_once, b_eq=np.ones(points),
        A_ub=vstack([sizes, -sizes]), b_ub=np.repeat([most, -least], parts), bounds=(0, None), method="highs-ds",
    )  # fmt: skip
    assert solution.success, solution.message
    return np.asarray(solution.x.reshape(points, parts).argmax(axis=1), dtype=np.int64)


def prices_of(costs: Array, parts: NDArray[np.int64]) -> Array:
    """Prices (K,) under which every point's own part is the cheapest, by the widest margin that there is.

    Args:
        costs: (N, K).
        parts: (N,), a cheapest assignment to parts of given sizes; others have no such prices.
    """
    number = costs.shape[1]
    rows, bounds = [], []
    for k in range(number):
        own = costs[parts == k]
        for other in range(number):
            if other != k and len(own):
                # price_k + margin <= price_other + what the other part costs more, for the most doubtful point
                row = np.zeros(number + 1)
                row[k], row[other], row[-1] = 1, -1, 1
                rows.append(row)
                bounds.append((own[:, other] - own[:, k]).min())
    solution = linprog(
        np.append(np.zeros(number), -1), A_ub=np.array(rows), b_ub=np.array(bounds),
        bounds=[(0, 0), *[(None, None)] * (number - 1), (None, 1)], method="highs",
    )  # fmt: skip
    assert solution.success, solution.message
    return np.asarray(solution.x[:-1], dtype=np.float64)
