"""Arguments against signatures: what passes, what is refused, and that no value ever stands in the message."""

import functools
import json
import typing
from typing import Annotated, Literal

import numpy
import pytest
from pydantic import BaseModel, ConfigDict, Field

from actors.batching import batched
from actors.data.arrays import Array
from actors.validation import MAX_PROBLEMS, checker
from bridge.errors import PayloadInvalid

SECRET = "s3cret-value-of-a-customer"


class Point(BaseModel):
    x: float
    y: float = 0.0


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str


class Circle(BaseModel):
    kind: Literal["circle"]
    radius: float


class Square(BaseModel):
    kind: Literal["square"]
    side: float


class Tree(BaseModel):
    children: "list[Tree]" = []


def check(body, *args, **kwargs):
    return checker("shop.task", body)(args, kwargs)


def call(body, *args, **kwargs):
    """What the body gets after the check."""
    args, kwargs = check(body, *args, **kwargs)
    return body(*args, **kwargs)


def problems(body, *args, **kwargs):
    with pytest.raises(PayloadInvalid) as caught:
        check(body, *args, **kwargs)
    assert caught.value.task == "shop.task"
    assert SECRET not in str(caught.value)
    assert SECRET not in json.dumps(caught.value.args)
    return [(each["field"], each["received"]) for each in caught.value.problems]


def test_plain_types_pass_and_json_numbers_become_what_is_declared():
    def body(a: int, b: float, c: str = "x", *, d: bool = False):
        return a, b, c, d

    assert call(body, 1, 2) == (1, 2.0, "x", False)
    assert type(call(body, 1, 2)[1]) is float
    assert call(body, a=1, b="2.5", d=True) == (1, 2.5, "x", True)


def test_models_are_built_from_dicts_and_pass_as_they_are():
    def body(point: Point, others: list[Point]):
        return point, others

    point, others = call(body, {"x": 1}, [{"x": 2, "y": 3}])
    assert point == Point(x=1) and others == [Point(x=2, y=3)]
    assert call(body, Point(x=1), [])[0] == Point(x=1)


def test_wrong_values_are_named_by_path_and_type():
    def body(point: Point, points: list[Point], *, scale: float = 1.0):
        pass

    assert problems(body, {"x": SECRET}, [{"x": 1}, {"y": 2}], scale=[SECRET]) == [
        ("point.x", "str"),
        ("points.1.x", "nothing"),
        ("scale", "list"),
    ]


def test_positional_and_keyword_arguments_are_named_alike():
    def body(first: int, second: int):
        pass

    assert problems(body, "a", "b") == [("first", "str"), ("second", "str")]
    assert problems(body, first="a", second="b") == [("first", "str"), ("second", "str")]


def test_missing_and_extra_arguments():
    def body(a: int, b: int, *, c: int):
        pass

    assert problems(body, 1) == [("b", "nothing"), ("c", "nothing")]
    assert problems(body, 1, 2, SECRET, c=1) == [("argument 3", "str")]
    assert problems(body, 1, 2, c=1, d=SECRET) == [("d", "str")]
    assert ("a", "int") in problems(body, 1, 2, a=3, c=1), "given twice"


def test_constraints_hold():
    size_type, names_type = Annotated[int, Field(gt=0, le=10)], Annotated[list[str], Field(max_length=2)]

    def body(size: size_type, kind: Literal["sum", "mean"], names: names_type):
        return size

    assert call(body, 3, "sum", []) == 3
    assert problems(body, 11, SECRET, ["a", "b", "c"]) == [("size", "int"), ("kind", "str"), ("names", "list")]


def test_a_union_by_tag_does_not_show_the_tag():
    def body(shape: Annotated[Circle | Square, Field(discriminator="kind")]):
        return shape

    assert call(body, {"kind": "square", "side": 2}) == Square(kind="square", side=2)
    ((field, received),) = problems(body, {"kind": SECRET})
    assert field == "shape"
    assert received == "dict"


def test_extra_fields_of_a_strict_model_are_refused():
    def body(person: Strict):
        pass

    assert problems(body, {"name": "a", "age": SECRET}) == [("person.age", "str")]


def test_star_arguments_are_checked_one_by_one():
    def body(first: str, *numbers: int, **options: float):
        return first, numbers, options

    assert call(body, "a", 1, 2, x=1) == ("a", (1, 2), {"x": 1.0})
    assert problems(body, "a", 1, "two", x="three") == [("argument 3", "str"), ("x", "str")]


def test_unannotated_parameters_take_anything():
    def body(a, *args, b=None, **kwargs):
        return a, args, b, kwargs

    thing = object()
    assert call(body, thing, 1, b=2, c=thing) == (thing, (1,), 2, {"c": thing})
    assert problems(body) == [("a", "nothing")]


def test_annotations_pydantic_cannot_use_count_as_unannotated_and_the_rest_is_checked():
    class Custom:
        pass

    def body(image: numpy.ndarray, custom: Custom, maybe: numpy.ndarray | None, number: int):
        return image, number

    array, custom = numpy.arange(3), Custom()
    image, number = call(body, array, custom, None, "4")
    assert image is array and number == 4
    assert call(body, [1, 2], "anything", 1, 4) == ([1, 2], 4)
    assert problems(body, array, custom, None, "x") == [("number", "str")]


def test_string_annotations_are_understood():
    def body(point: "Point", number: "int"):
        return point

    assert call(body, {"x": 1}, 1) == Point(x=1)
    assert problems(body, {"x": "?"}, "?") == [("point.x", "str"), ("number", "str")]


def test_names_for_type_checkers_only_leave_their_parameter_unchecked():
    def body(thing: "NotThere", number: int):  # noqa: F821
        return thing, number

    assert call(body, "anything", "4") == ("anything", 4)


def test_defaults_stay_and_need_not_fit():
    def body(a: int, b: int = None, c: str = "c"):  # noqa: RUF013
        return a, b, c

    assert call(body, 1) == (1, None, "c")


def test_positional_only_and_keyword_only():
    def body(a: int, /, b: int, *, c: int):
        return a, b, c

    assert call(body, "1", "2", c="3") == (1, 2, 3)
    assert problems(body, b=1, c=2) == [("a", "nothing")]


def test_bound_methods_and_partials_leave_out_what_is_bound():
    class Holder:
        def method(self, a: int):
            return a

    def function(task, a: int):
        return task, a

    assert call(Holder().method, "5") == 5
    assert problems(Holder().method, "x") == [("a", "str")]
    bound = functools.partial(function, "the task")
    assert call(bound, "5") == ("the task", 5)
    assert problems(bound, "x") == [("a", "str")]


def test_a_batched_body_is_checked_per_item():
    @batched(max_size=4)
    def body(vectors: list[list[float]], points: list[Point]) -> list[float]:
        return [sum(vector) + point.x for vector, point in zip(vectors, points, strict=True)]

    assert call(body, [1, 2], {"x": 3}) == 6.0
    assert problems(body, [1, "x"], {}) == [("vectors.1", "str"), ("points.x", "nothing")]


def test_no_more_problems_are_listed_than_a_person_reads():
    def body(numbers: list[int]):
        pass

    with pytest.raises(PayloadInvalid) as caught:
        check(body, [SECRET] * 100_000)
    assert len(caught.value.problems) == MAX_PROBLEMS + 1
    assert caught.value.problems[-1]["reason"] == f"{100_000 - MAX_PROBLEMS} more problems"
    assert len(str(caught.value)) < 5000


def nested(depth, make):
    value = make(None)
    for _ in range(depth):
        value = make(value)
    return value


@pytest.mark.parametrize(
    ("hint", "make"),
    [
        (Tree, lambda inner: {"children": [] if inner is None else [inner]}),
        (list, lambda inner: [inner]),
        (typing.Any, lambda inner: {"a": inner}),
        (dict[str, typing.Any], lambda inner: {"a": inner}),
    ],
)
def test_deep_nesting_is_an_error_or_passes_and_never_a_crash(hint, make):
    def body(value):
        return "ran"

    body.__annotations__["value"] = hint
    deep = nested(100_000, make)
    if hint is Tree:
        assert problems(body, deep)
    else:
        assert call(body, deep) == "ran"
    while deep:  # let go of it step by step: even deallocating recursion is bounded only by C
        deep = next(iter(deep.values())) if isinstance(deep, dict) else deep[0]


def test_a_self_referencing_payload_is_an_error_not_a_crash():
    def body(tree: Tree):
        pass

    loop = {}
    loop["children"] = [loop]
    assert problems(body, loop)


@pytest.mark.parametrize("hint", [int, float, bytes, list[int], dict[str, int], set[int], tuple[int, str], Point, None])
def test_the_value_is_never_shown(hint):
    def body(value):
        pass

    body.__annotations__["value"] = hint
    if hint is bytes:
        problems(body, [SECRET])
    else:
        problems(body, SECRET)


def test_a_validators_own_words_are_told_as_they_are():
    def body(values: Array):
        pass

    with pytest.raises(PayloadInvalid, match="invalid payload: values: expected numbers of any shape, found str"):
        check(body, "x")


def test_text_sent_as_field_name_is_bounded():
    def body(a: int):
        pass

    with pytest.raises(PayloadInvalid) as caught:
        check(body, 1, **{"x" * 1_000_000: 1})
    assert len(str(caught.value)) < 5000


def test_the_error_goes_through_json_and_pickle():
    import pickle

    def body(a: int):
        pass

    with pytest.raises(PayloadInvalid) as caught:
        check(body, "x")
    error = caught.value
    assert error.__cause__ is None and error.__suppress_context__, "pydantic's own error holds the value"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(PayloadInvalid(*json.loads(json.dumps(error.args)))) == str(error)


def test_one_unresolvable_annotation_does_not_leave_the_others_unchecked():
    def body(number: "int", other: "NowhereToBeFound"):  # noqa: F821
        """A body with a name that only type checkers know."""

    check = checker("shop.body", body)
    assert check((1, object), {})[0][0] == 1
    with pytest.raises(PayloadInvalid, match="number"):
        check(("x", 1), {})
