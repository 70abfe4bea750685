"""GPU tasks on embedding vectors: one vectorised task, and a search in a table that stays on the device."""

from collections import defaultdict
from typing import Annotated, Any

import numpy
from pydantic import Field

from bridge import Gpu, array_module, batched, resident
from celery_app.application import app
from celery_app.tasks.payloads import Vector, vector_of

#: The corpus of `top_k`: unit vectors, and the seed that makes every process hold the same ones.
CORPUS_SIZE = 4096
CORPUS_DIMENSION = 64
CORPUS_SEED = 20_240


@app.task(gpu=True)
@batched(max_size=256, max_wait_s=0.002)
def normalise(vectors: list[Vector]) -> list[Vector]:
    """Each vector divided by its Euclidean length. Producers send one vector per task; lengths may differ.

    An item that is empty, zero or not finite gets a ValueError in its place, and its neighbours their results.
    """
    of_length = defaultdict(list)
    for index, vector in enumerate(vectors):
        of_length[len(vector)].append(index)
    results: list[Any] = [None] * len(vectors)
    for length, indices in of_length.items():
        units = (
            _normalised([vectors[index] for index in indices]) if length else [_no_direction("vector")] * len(indices)
        )
        for index, unit in zip(indices, units, strict=True):
            results[index] = unit
    return results


@resident
def corpus() -> Any:
    """The vectors `top_k` searches: float32, shape (CORPUS_SIZE, CORPUS_DIMENSION), unit length, equal everywhere."""
    # Drawn by NumPy on every device: CuPy's generator gives other numbers for the same seed.
    drawn = numpy.random.default_rng(CORPUS_SEED).standard_normal((CORPUS_SIZE, CORPUS_DIMENSION))
    xp = array_module()
    return xp.asarray(drawn / numpy.linalg.norm(drawn, axis=1, keepdims=True), dtype=xp.float32)


@app.task(gpu=Gpu(example=([1.0] * CORPUS_DIMENSION,)))
def top_k(query: Vector, k: Annotated[int, Field(ge=1, le=CORPUS_SIZE)] = 5) -> list[dict[str, float]]:
    """The `k` corpus vectors most similar to `query`, best first.

    Args:
        query: CORPUS_DIMENSION numbers of any length above 0.
        k: how many, 1 to CORPUS_SIZE.

    Returns:
        A dict per hit: index (row of the corpus) and score (cosine similarity, -1..1).

    Raises:
        ValueError: a query of another dimension, a zero query, or `k` out of bounds.
    """
    if len(query) != CORPUS_DIMENSION:
        raise ValueError(f"query has {len(query)} numbers, the corpus has vectors of {CORPUS_DIMENSION}")
    if not 1 <= k <= CORPUS_SIZE:
        raise ValueError(f"k must be 1 to {CORPUS_SIZE}, got {k}")
    xp = array_module()
    unit, usable = _unit_rows(vector_of(query, "query")[None, :])
    if not bool(usable[0]):
        raise _no_direction("query")
    scores = corpus() @ unit[0].astype(xp.float32)
    best = xp.argsort(-scores)[:k]
    return [{"index": index, "score": score} for index, score in zip(best.tolist(), scores[best].tolist(), strict=True)]


def _normalised(vectors: list[Vector]) -> list[Any]:
    """A unit vector for each of `vectors`, or a ValueError where there is none. All share one length above 0."""
    xp = array_module()
    units, usable = _unit_rows(xp.asarray(vectors, dtype=xp.float64))
    outcomes = zip(units.tolist(), usable.tolist(), strict=True)
    return [unit if fine else _no_direction("vector") for unit, fine in outcomes]


def _unit_rows(rows: Any) -> tuple[Any, Any]:
    """Rows (n x d) divided by their lengths, and for each (n) whether it has a direction; other rows mean nothing."""
    xp = array_module()
    largest = xp.abs(rows).max(axis=1, keepdims=True)
    usable = (largest > 0) & xp.isfinite(largest)
    scaled = xp.where(usable, rows, 1) / xp.where(usable, largest, 1)  # else squares of very large numbers overflow
    return scaled / xp.sqrt((scaled * scaled).sum(axis=1, keepdims=True)), usable[:, 0]


def _no_direction(name: str) -> ValueError:
    return ValueError(f"{name} has no direction: it is empty, zero or not finite")
