"""Bodies taken apart without being read: the parts are what Python's json finds, and who looks sees the same."""

import json
import pickle

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu.utils import json as kombu_json

from actors import closed, frames
from actors.closed import SMALL_BYTES, ClosedDict, ClosedList, Texts, split
from bridge.driver import dead_letters
from bridge.link import Run

EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
NUMBERS = [number / 7 for number in range(1000)]
BODY = json.dumps([[NUMBERS, 3, "text"], {"more": {"rows": [[1, 2]] * 500}, "few": [1]}, EMBED]).encode()

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=60) | st.dictionaries(st.text(), inner, max_size=8),
    max_leaves=150,
)
bodies = st.tuples(st.lists(values, max_size=4), st.dictionaries(st.text(), values, max_size=4), st.just(EMBED))


def opened(value):
    return value.opened() if isinstance(value, closed.Closed) else value


def plain(parts):
    args, kwargs, embed = parts
    return [[*map(opened, args)], {name: opened(value) for name, value in kwargs.items()}, embed]


@given(bodies, st.booleans(), st.sampled_from([None, 1]))
@settings(max_examples=60, deadline=None)
def test_the_parts_are_what_json_finds(body, ascii_only, indent):
    """Python objects alike to the last bit and type, whatever way the producer writes."""
    text = json.dumps(body, ensure_ascii=ascii_only, indent=indent)
    if "\\ud" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        return  # lone surrogates are no JSON outside of Python
    texts = split(text.encode())
    if texts is None:
        assert "__type__" in text or "\\u00" in text
        return
    want = json.loads(text)
    assert repr(plain(texts.values())) == repr(want)
    assert json.loads(texts.joined()) == want


def test_what_is_large_stays_closed():
    texts = split(BODY)
    args, kwargs, embed = texts.values()
    assert [type(each) for each in (*args, *kwargs.values())] == [ClosedList, int, str, ClosedDict, list]
    assert embed == EMBED
    assert plain((args, kwargs, embed)) == json.loads(BODY)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{}", b"[[1], {}]", b"[[1], {}, {}, {}]", b"[{}, {}, {}]", b"[[1], [], {}]", b"[[1], {}, {}] x",
        b"[[1,], {}, {}]",
        b"[[01], {}, {}]", b"[[1.], {}, {}]", b"[[.5], {}, {}]", b"[[+1], {}, {}]", b"[[1e], {}, {}]",
        b"[[tru], {}, {}]", b"[['a'], {}, {}]", b'[["\n"], {}, {}]', b'[["\\x"], {}, {}]', b'[["\xff"], {}, {}]',
        b"\xef\xbb\xbf[[1], {}, {}]", b'[[1], {"a": 1,}, {}]', b"[[1], {}, {}", b"[[1] {}, {}]", b"[[1 2], {}, {}]",
    ],
)  # fmt: skip
def test_what_is_no_task_in_json_is_left_to_kombu(body):
    assert split(body) is None


@pytest.mark.parametrize(
    "body",
    [
        b"[[NaN], {}, {}]", b"[[-Infinity], {}, {}]", b'[["\\ud800"], {}, {}]',
        b'[[{"__type__": "decimal", "__value__": "1"}], {}, {}]',
        b'[[{"\\u005f_type__": "decimal", "__value__": "1"}], {}, {}]',
        b'[[{"__typ\\u0065__": "decimal", "__value__": "1"}], {}, {}]',
    ],
)  # fmt: skip
def test_what_only_python_and_kombu_read_is_left_to_them(body):
    json.loads(body)
    assert split(body) is None


@pytest.mark.parametrize(("opens", "shuts"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_a_bomb_of_brackets_is_left_to_kombu(opens, shuts):
    depth = 200_000
    assert split(b"[[" + opens * depth + b"1" + shuts * depth + b"], {}, {}]") is None


def test_what_is_nested_too_deeply_to_be_opened_says_so():
    """The stack may be deeper here than where the body was taken apart."""
    with pytest.raises(ValueError, match="nested too deeply"):
        closed.read(b"[" * 100_000 + b"]" * 100_000)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "123456789012345678901234567890", "-0.0", "1e-400"])
def test_odd_numbers_are_as_python_has_them(number):
    text = f"[{number}{', 1' * SMALL_BYTES}]".encode()
    assert repr(closed.read(text)) == repr(json.loads(text))


def test_a_number_that_python_takes_for_too_long_is_named():
    with pytest.raises(ValueError, match="4300 digits"):
        closed.read(b"[" + b"9" * 5000 + b"]")


def test_who_looks_sees_the_list():
    value = split(BODY).values()[0][0]
    assert len(value) == 1000 and value[3] == 3 / 7 and value[-2:] == NUMBERS[-2:]
    assert value == NUMBERS and value != [1] and list(value) == NUMBERS
    assert sum(value) == sum(NUMBERS) and 2 / 7 in value and value.index(2 / 7) == 2
    assert numpy.asarray(value).tolist() == NUMBERS


def test_who_looks_sees_the_dict():
    value = split(BODY).values()[1]["more"]
    assert value["rows"][0] == [1, 2] and list(value) == ["rows"] and value.get("none") is None
    assert dict(value) == json.loads(BODY)[1]["more"] == value


def test_looking_at_it_in_a_log_reads_nothing():
    value = split(BODY).values()[0][0]
    assert repr(value).startswith("[0.0, 0.14") and repr(value).endswith("...]") and len(repr(value)) < 100
    assert value._value is None


def test_sent_again_it_is_what_it_was():
    """As JSON by kombu, when a task is retried; as pickle, to somebody who knows nothing of the bridge."""
    args, kwargs, _ = split(BODY).values()
    assert json.loads(kombu_json.dumps([args, kwargs, EMBED])) == json.loads(BODY)
    again = pickle.loads(pickle.dumps([args, kwargs, EMBED]))
    assert again == json.loads(BODY) and type(again[0][0]) is list
    assert b"actors" not in pickle.dumps(args)


def test_between_processes_of_the_bridge_it_stays_closed():
    args, kwargs, _ = split(BODY).values()
    data, parts = closed.dumps((args, kwargs))
    assert len(data) < 300 and sum(map(len, parts)) > len(BODY) - 300
    again_args, again_kwargs = closed.loads(data, parts)
    assert isinstance(again_args[0], ClosedList) and isinstance(again_kwargs["more"], ClosedDict)
    assert plain((again_args, again_kwargs, EMBED)) == json.loads(BODY)


def test_its_texts_cross_the_link_beside_the_pickle():
    texts = split(BODY)
    pieces = frames.dump(texts)
    assert len(pieces) == 3 and len(pieces[0]) < 500
    again = frames.load(memoryview(b"".join(pieces)))
    assert isinstance(again, Texts) and plain(again.values()) == json.loads(BODY)
    assert plain(pickle.loads(pickle.dumps(texts, 5)).values()) == json.loads(BODY)


def test_a_dead_letter_keeps_the_body():
    run = Run(1, "shop.total", "own", {}, split(BODY), "application/json", "utf-8", None, None, 0)
    data, content_type, encoding, not_kept = dead_letters._body(run, "json")
    assert (json.loads(data), content_type, encoding, not_kept) == (json.loads(BODY), "application/json", "utf-8", "")


def test_a_body_that_came_as_text():
    assert plain(split(BODY.decode()).values()) == json.loads(BODY)
    assert split('[["\ud800"], {}, {}]') is None
