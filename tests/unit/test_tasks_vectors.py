import math

import numpy
import pytest

from actors.batching import batch_of, run_batch
from actors.bodies import innermost
from celery_app.tasks import vectors
from celery_app.tasks.vectors import CORPUS_DIMENSION, CORPUS_SEED, CORPUS_SIZE, corpus, normalise, top_k


def run_together(*items):
    return run_batch(batch_of(innermost(normalise)), [([item], {}) for item in items])


def test_one_task_takes_and_gives_one_vector():
    assert normalise([3.0, 4.0]) == [0.6, 0.8]
    assert normalise.run([3.0, 4.0]) == [0.6, 0.8]


def test_a_batch_gives_what_each_alone_would():
    random = numpy.random.default_rng(3)
    items = [random.normal(size=size).tolist() for size in (3, 64, 3, 1, 64, 2)]
    expected = [[value / math.sqrt(sum(v * v for v in item)) for value in item] for item in items]
    results = run_together(*items)
    assert [len(result) for result in results] == [3, 64, 3, 1, 64, 2]
    for result, wanted in zip(results, expected, strict=True):
        assert result == pytest.approx(wanted)
        assert type(result[0]) is float


def test_an_item_without_direction_fails_alone():
    results = run_together([0.0, 0.0], [0.0, 2.0], [], [math.inf, 1.0], [math.nan, 1.0], [1.0])
    assert [results[1], results[5]] == [[0.0, 1.0], [1.0]]
    for index in (0, 2, 3, 4):
        assert isinstance(results[index], ValueError)
        assert "has no direction" in str(results[index])


def test_a_single_zero_vector_raises():
    with pytest.raises(ValueError, match="vector has no direction"):
        normalise([0.0, 0.0])


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_lengths_whose_squares_do_not_exist(scale):
    assert normalise([3 * scale, 4 * scale]) == pytest.approx([0.6, 0.8])


def test_vectors_of_one_length_make_one_trip_to_the_device(monkeypatch):
    rounds = []
    original = vectors._normalised
    monkeypatch.setattr(vectors, "_normalised", lambda rows: rounds.append(len(rows)) or original(rows))
    run_together(*[[1.0, 2.0]] * 100, *[[1.0]] * 56)
    assert rounds == [100, 56]


def test_the_corpus_is_the_same_in_every_process():
    table = corpus()
    drawn = numpy.random.default_rng(CORPUS_SEED).standard_normal((CORPUS_SIZE, CORPUS_DIMENSION))
    assert table.shape == (4096, 64)
    assert table.dtype == numpy.float32
    assert numpy.allclose(numpy.linalg.norm(table, axis=1), 1, atol=1e-6)
    assert numpy.allclose(table[7], drawn[7] / math.sqrt((drawn[7] ** 2).sum()))


def test_a_corpus_vector_finds_itself_first():
    row = corpus()[1234]
    hits = top_k((row * 17).tolist(), 4)
    similarities = sorted((float(numpy.dot(row, other)) for other in corpus()), reverse=True)
    assert hits[0] == {"index": 1234, "score": pytest.approx(1, abs=1e-6)}
    assert [hit["score"] for hit in hits] == pytest.approx(similarities[:4], abs=1e-6)
    assert all(type(hit["index"]) is int and type(hit["score"]) is float for hit in hits)


def test_k_defaults_to_five_and_may_be_all():
    query = [1.0] * CORPUS_DIMENSION
    assert len(top_k(query)) == 5
    assert sorted(hit["index"] for hit in top_k(query, CORPUS_SIZE)) == list(range(CORPUS_SIZE))


@pytest.mark.parametrize(
    ("query", "k", "reason"),
    [
        ([1.0, 2.0], 5, "query has 2 numbers, the corpus has vectors of 64"),
        ([], 5, "query has 0 numbers"),
        ([0.0] * 64, 5, "query has no direction"),
        ([1.0] * 64, 0, "k must be 1 to 4096, got 0"),
        ([1.0] * 64, 5000, "k must be 1 to 4096, got 5000"),
    ],
)
def test_top_k_refuses(query, k, reason):
    with pytest.raises(ValueError, match=reason):
        top_k(query, k)
