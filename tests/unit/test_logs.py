"""What a body logs is kept with its outcome, and bounded."""

import logging
import pickle
import sys
import threading

import pytest
from celery import Celery

from actors.executor.logs import LogCapture


@pytest.fixture
def logger():
    return logging.Logger("shop")


@pytest.fixture
def capture(logger):
    capture = LogCapture(logging.INFO, 1000, lambda lines: None)
    logger.addHandler(capture)
    return capture


def test_lines_of_a_body_are_kept_in_order(logger, capture):
    capture.start()
    logger.info("one %d", 1)
    logger.error("two")
    first, second = capture.take()
    assert (first[:4], second[:4]) == ((20, "shop", "one 1", False), (40, "shop", "two", False))
    assert first.created <= second.created
    assert first.where[0] == __file__ and first.where[2] == "test_lines_of_a_body_are_kept_in_order"


def test_what_a_caller_gives_as_extra_travels_as_far_as_it_can(logger, capture):
    capture.start()
    logger.info("one", extra={"tenant": "red", "lock": threading.Lock()})
    logger.info("two", extra={"tenant": "blue"})
    first, second = (pickle.loads(line.extra) for line in capture.take())
    assert first["tenant"] == "red" and "lock" in first["lock"]
    assert second["tenant"] == "blue" and "lock" not in second


def test_handlers_of_the_apps_own_loggers_are_called_where_the_lines_are_logged_again(capture):
    own = logging.getLogger("tests.own_handler")
    own.addHandler(logging.NullHandler())
    own.propagate = False
    root, before = logging.getLogger(), list(logging.getLogger().handlers)
    try:
        capture.install(Celery("logs", set_as_current=False, config_source={"worker_redirect_stdouts": False}))
        capture.start()
        own.error("once")
        assert [line.text for line in capture.take()] == ["once"]
        assert own.handlers == []
    finally:
        root.handlers[:] = before


def test_each_body_has_its_own(logger, capture):
    capture.start()
    logger.info("one")
    capture.take()
    capture.start()
    assert capture.take() == ()


def test_exceptions_are_formatted(logger, capture):
    capture.start()
    try:
        raise KeyError("k")
    except KeyError:
        logger.exception("failed")
    assert "KeyError: 'k'" in capture.take()[0].text


def test_between_bodies_lines_go_to_stderr(logger, capture, capfd, monkeypatch):
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    logger.warning("alone")
    assert "WARNING shop: alone" in capfd.readouterr().err
    assert capture.take() == ()


def test_a_record_that_cannot_be_formatted_is_said_and_costs_nothing_else(logger, capture):
    capture.start()
    logger.info("%d items", "many")
    logger.info("next")
    first, second = capture.take()
    assert "could not be formatted" in first.text
    assert second.text == "next"


@pytest.mark.parametrize("text", ["x" * 10, "x" * 999, "x" * 5000, ""])
def test_output_is_bounded_whatever_its_lines_look_like(logger, capture, text):
    capture.start()
    for _ in range(20_000):
        logger.info(text)
    lines = capture.take()
    assert sum(len(line.text) for line in lines) <= 2 * 1000 + 100
    assert len(lines) <= 1001
    assert lines[-1].text.endswith("(more output of this task was dropped)")


def test_the_bound_is_per_body(logger, capture):
    for _ in range(2):
        capture.start()
        logger.info("x" * 2000)
        logger.info("y")
        assert len(capture.take()) == 1


def test_no_room_keeps_nothing(logger):
    capture = LogCapture(logging.INFO, 0, lambda lines: None)
    logger.addHandler(capture)
    capture.start()
    logger.info("x")
    assert capture.take() == ()
