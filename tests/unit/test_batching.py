"""`@batched`: one producer's item, many tasks' body."""

import inspect

import pytest

from actors.batching import batch_of, batched, run_batch, run_prepared
from actors.journal import MAX_TASKS


@batched(max_size=4, max_wait_s=0.5)
def scale(vectors: list[list[float]], factors: list[float]) -> list[list[float]]:
    """Scales."""
    return [[x * factor for x in vector] for vector, factor in zip(vectors, factors, strict=True)]


def test_a_direct_call_takes_one_item():
    assert scale([1.0, 2.0], 3.0) == [3.0, 6.0]
    assert scale(vectors=[1.0], factors=2.0) == [2.0]


def test_the_signature_is_that_of_one_item():
    signature = inspect.signature(scale)
    assert [p.annotation for p in signature.parameters.values()] == [list[float], float]
    assert signature.return_annotation == list[float]
    assert scale.__annotations__ == {"vectors": list[float], "factors": float, "return": list[float]}
    assert (scale.__name__, scale.__doc__) == ("scale", "Scales.")


def test_the_executor_finds_the_body_and_its_bounds():
    batch = batch_of(scale)
    assert (batch.max_size, batch.max_wait_s) == (4, 0.5)
    assert batch.body([[1.0], [2.0]], [2.0, 3.0]) == [[2.0], [6.0]]
    assert batch_of(len) is None


def test_items_come_positional_or_by_name():
    found = run_batch(
        batch_of(scale), [(([1.0], 2.0), {}), (([3.0],), {"factors": 4.0}), ((), {"factors": 1, "vectors": [5]})]
    )
    assert found == [[2.0], [12.0], [5]]


def test_an_exception_in_an_items_place_is_raised_by_a_direct_call():
    @batched()
    def picky(numbers: list[int]) -> list[int]:
        return [ValueError("negative") if number < 0 else number for number in numbers]

    assert picky(1) == 1
    with pytest.raises(ValueError, match="negative"):
        picky(-1)
    found = run_batch(batch_of(picky), [((1,), {}), ((-1,), {})])
    assert found[0] == 1 and isinstance(found[1], ValueError)


@pytest.mark.parametrize("result", [[1], [1, 2, 3], None, 5, []])
def test_a_body_must_return_one_result_per_item(result):
    @batched()
    def wrong(numbers: list[int]):
        return result

    with pytest.raises(TypeError, match=r"wrong must return one result per item: 2 items, \d results"):
        run_batch(batch_of(wrong), [((1,), {}), ((2,), {})])


def test_any_iterable_of_results_will_do():
    @batched()
    def lazy(numbers: list[int]):
        return (number * 2 for number in numbers)

    assert run_batch(batch_of(lazy), [((1,), {}), ((2,), {})]) == [2, 4]
    assert lazy(4) == 8


def test_wrong_arguments_are_a_type_error_of_the_call():
    with pytest.raises(TypeError):
        scale([1.0])
    with pytest.raises(TypeError):
        scale([1.0], 2.0, 3.0)


@pytest.mark.parametrize(
    "options", [{"max_size": 0}, {"max_size": -1}, {"max_size": MAX_TASKS + 1}, {"max_wait_s": -0.1}]
)
def test_options_out_of_bounds_fail_where_they_are_written(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        batched(**options)


def bodies():
    def unannotated(numbers):
        pass

    def scalar(number: int):
        pass

    def bare(numbers: list):
        pass

    def star(*numbers: list[int]):
        pass

    def names(**numbers: list[int]):
        pass

    def positional_only(numbers: list[int], /):
        pass

    return [unannotated, scalar, bare, star, names, positional_only]


@pytest.mark.parametrize("body", bodies(), ids=lambda body: body.__name__)
def test_a_body_that_cannot_be_vectorised_fails_where_it_is_written(body):
    with pytest.raises(TypeError, match=body.__name__):
        batched()(body)


def test_a_default_is_not_a_list_and_counts_for_nobody():
    @batched()
    def body(numbers: list[int], factors: list[int]) -> list[int]:
        return [number * factor for number, factor in zip(numbers, factors, strict=True)]

    assert inspect.signature(body).parameters["factors"].default is inspect.Parameter.empty


def test_string_annotations_are_resolved():
    @batched()
    def body(numbers: "list[int]") -> "list[float]":
        return numbers

    assert inspect.signature(body).parameters["numbers"].annotation is int
    assert inspect.signature(body).return_annotation is float


def test_items_that_cannot_be_prepared_have_their_errors_and_the_others_their_results():
    def half(number, item):
        if item % 2:
            raise ValueError(f"{number} is odd")
        return item // 2

    results = run_prepared([2, 3, 8], half, lambda good: [each * 10 for each in good], (ValueError,))
    assert [results[0], results[2]] == [10, 40] and str(results[1]) == "1 is odd"
    assert [str(each) for each in run_prepared([1], half, lambda good: 1 / 0, (ValueError,))] == ["0 is odd"]
    with pytest.raises(ValueError, match="1 is odd"):
        run_prepared([2, 3], half, list, (TypeError,))
