"""Which bodies stay closed: GPU tasks' large JSON of which nobody but the body sees the arguments."""

import json
from types import SimpleNamespace

import pytest
from celery import Task, signals
from celery.worker.request import Request
from kombu import Message
from kombu.compression import compress
from pydantic import BaseModel

from actors.closed import ClosedList
from bridge.closing import close, may_stay_closed, texts_of
from tests.apps.base import App

NUMBERS = list(range(1000))
EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
BODY = json.dumps([[NUMBERS], {}, EMBED]).encode()
app = App("closing", set_as_current=False)


class Hooked(Task):
    def on_failure(self, *args):
        pass


class Own(Request):
    pass


class Point(BaseModel):
    x: float


@app.task
def plain(values):
    return sum(values)


def message(body=BODY, **fields):
    wanted = {"content_type": "application/json", "content_encoding": "utf-8", "accept": {"application/json"}}
    return Message(body, **(wanted | fields))


def is_closed(made, task=plain, limit=1000):
    close(made, task, limit)
    return texts_of(made) is not None


def test_the_body_stays_closed_and_celery_finds_its_parts():
    made = message()
    assert is_closed(made)
    args, kwargs, embed = made.payload
    assert isinstance(args[0], ClosedList) and args == [NUMBERS] and (kwargs, embed) == ({}, EMBED)
    assert made.body == BODY and "args" not in made.payload


@pytest.mark.parametrize(
    "fields",
    [
        {"content_type": "application/x-python-serialize"},
        {"content_type": None},
        {"content_encoding": "latin-1"},
        {"accept": {"application/x-yaml"}},
        {"body": BODY[:-1]},
        {"body": b"[[" + b"9" * 5000 + b"], {}, {}]"},
        {"body": b"[[" + b"NaN, " * 500 + b"1], {}, {}]"},
        {"body": json.dumps([[NUMBERS, {"kind": "ref", "url": "redis:x", "once": True}], {}, EMBED]).encode()},
        {"body": json.dumps([[NUMBERS], {"image": {"kind": "npy"}}, EMBED]).encode()},
        {"body": json.dumps([[NUMBERS, [[{"deep": {"kind": "device"}}]]], {}, EMBED]).encode()},
        {"body": json.dumps([[[{"kind": "device", "id": str(number)} for number in range(99)]], {}, EMBED]).encode()},
    ],
)
def test_other_bodies_are_decoded_as_ever(fields):
    made = message(**fields)
    assert not is_closed(made)
    assert not made._decoded_cache


def test_text_will_do():
    made = message(BODY.decode())
    assert is_closed(made)
    assert made.payload[0] == [NUMBERS]


def test_small_ones_too():
    assert not is_closed(message(), limit=len(BODY))
    assert is_closed(message(), limit=len(BODY) - 1)


def test_a_compressed_one_has_been_decompressed_by_then():
    body, kind = compress(BODY, "gzip")
    assert is_closed(message(body, headers={"compression": kind}))


def test_without_a_list_of_accepted_types_json_is_one():
    assert is_closed(message(accept=None))


@pytest.mark.parametrize(
    "options",
    [
        {"base": Hooked},
        {"Request": f"{__name__}:Own"},
        {"serializer": "yaml"},
        {"pydantic": True},
    ],
)
def test_somebody_else_looks_at_the_arguments(options):
    @app.task(name=f"closing.{options}", **options)
    def task(values):
        return values

    assert not may_stay_closed(task)
    assert not is_closed(message(), task)


@pytest.mark.parametrize("setting", [{"result_extended": True}, {"task_serializer": "msgpack"}])
def test_settings_that_need_them_open(setting):
    with App("other", set_as_current=False) as other:
        other.conf.update(setting)

        @other.task(name="closing.other")
        def task(values):
            return values

        assert not may_stay_closed(task)


@pytest.mark.parametrize(
    "signal", [signals.task_prerun, signals.task_postrun, signals.task_failure, signals.task_internal_error]
)
def test_receivers_that_name_the_arguments_get_them_as_ever(signal):
    def names(args=None, **_):
        pass

    def names_not(*args, task_id=None, **kwargs):
        pass

    other = SimpleNamespace()
    signal.connect(names, sender=other)
    signal.connect(names_not)
    try:
        assert may_stay_closed(plain)  # the first hears of another task
        signal.connect(names)
        assert not may_stay_closed(plain)
    finally:
        signal.disconnect(names)
        signal.disconnect(names, sender=other)
        signal.disconnect(names_not)


def test_what_celery_itself_listens_with_needs_nothing():
    from celery.fixups.django import DjangoWorkerFixup

    fixup = DjangoWorkerFixup.__new__(DjangoWorkerFixup)
    signals.task_prerun.connect(fixup.on_task_prerun)
    try:
        assert may_stay_closed(plain)
    finally:
        signals.task_prerun.disconnect(fixup.on_task_prerun)
