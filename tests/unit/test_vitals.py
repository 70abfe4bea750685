"""What a worker notes of itself, with a make-believe pool: pictures are taken by the main thread, read by any."""

import importlib.metadata
import json
import threading
import time
from types import SimpleNamespace

import pytest
from celery.worker import state

from bridge import Gpu
from bridge.marks import Mark
from bridge.worker.vitals import CONNECT_S, Vitals

MARK = Mark(name="shop.add", gpu=Gpu(), batch=None, configured=False)


class Pool:
    def __init__(self):
        self.settings = SimpleNamespace(health_place=None, hung_after_s=15.0, min_actors=None, max_actors=None)
        self.marks = {"shop.add": MARK}
        self.gpu = SimpleNamespace(heard=((7, time.monotonic()),))
        self.info = {
            "cluster": "h:6380", "nodes": 1, "gpus": 1, "ray": "2.60.0", "slots": 32, "in_flight": 5, "running": 2,
            "actors": [
                {"slot": 0, "state": "ready", "reason": "", "accelerator": "", "memory_total_bytes": 0, "share": 1.0,
                 "by_task": {"shop.add": {}}},
            ],
        }  # fmt: skip

    def gpu_info(self):
        return self.info


class Hub:
    def __init__(self):
        self.timers = []

    def call_repeatedly(self, every_s, function):
        timer = SimpleNamespace(function=function, cancelled=False)
        timer.cancel = lambda: setattr(timer, "cancelled", True)
        self.timers.append(timer)
        return timer


@pytest.fixture
def pool():
    return Pool()


@pytest.fixture
def vitals(pool):
    vitals = Vitals("w@h", pool)
    vitals.consumes(SimpleNamespace(_in_poll=None), lambda: 4)
    return vitals


def reasons(vitals):
    return "; ".join(reason["what"] for reason in vitals.account()["reasons"])


def test_an_account_is_json_and_says_no_more_of_actors_than_it_should(vitals):
    account = vitals.account()
    assert json.loads(json.dumps(account)) == account
    assert (account["state"], account["waiting"], account["running"], account["worker"]) == ("ready", 7, 2, "w@h")
    assert "by_task" not in account["actors"][0] and account["drivers"][0]["pid"] == 7


def test_a_bridge_that_is_unpacked_and_not_installed_answers_all_the_same(vitals, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert vitals.account()["version"] == "not installed"


def test_readers_see_the_last_picture_and_wait_for_nothing(vitals, pool):
    pool.gpu_info = lambda: pytest.fail("a reader must not look itself")
    seen = []
    thread = threading.Thread(target=lambda: seen.append(vitals.account()))
    thread.start()
    thread.join(5)
    assert seen and seen[0]["ready"]


def test_what_cannot_be_looked_at_does_not_end_the_main_thread(vitals, pool, caplog):
    pool.gpu_info = lambda: 1 / 0
    vitals.pulse()
    assert "could not be looked at" in caplog.text and vitals.account()["live"]


def test_the_loop_pulses_once_however_often_it_is_registered(vitals):
    hub = Hub()
    vitals.register(hub)
    vitals.register(hub)
    assert [timer.cancelled for timer in hub.timers] == [True, False]


@pytest.mark.parametrize(("connected", "silent_s", "live"), [(True, 14, True), (True, 16, False), (False, 16, True),
                                                             (False, 16 + CONNECT_S, False)])  # fmt: skip
def test_a_loop_that_does_not_turn(vitals, connected, silent_s, live):
    if not connected:
        vitals.loses_broker()
    vitals._pulsed_at -= silent_s
    assert vitals.account()["live"] is live


def test_a_question_to_redis_without_an_answer(vitals):
    vitals.consumes(SimpleNamespace(_in_poll="connection", _brpop_sent_at=time.monotonic() - 11), lambda: 0)
    assert "the broker has not answered for 11 s" in reasons(vitals)


def test_it_pulses_while_kombu_tries_to_connect_and_calls_what_celery_gave(vitals):
    calls = []

    def ensure_connection(errback, retries, callback=None):
        for _ in range(3):
            vitals._pulsed_at = 0.0
            callback()
            assert vitals._pulsed_at
        return "connected"

    connection = SimpleNamespace(ensure_connection=ensure_connection)
    vitals.connecting(connection)
    assert connection.ensure_connection(None, 5, callback=lambda: calls.append("stop?")) == "connected"
    assert calls == ["stop?"] * 3


@pytest.mark.parametrize("told", ["signal", "pool"])
def test_the_end_is_known_at_once(vitals, monkeypatch, told):
    if told == "signal":
        monkeypatch.setattr(state, "should_stop", 0)
    else:
        vitals.stops()
    vitals._pulsed_at -= 1000
    assert (vitals.account()["state"], vitals.account()["live"]) == ("stopping", True)


def test_actors_on_demand_need_a_cluster_that_has_gpus(vitals, pool):
    pool.settings.min_actors, pool.info = 0, {**pool.info, "actors": []}
    vitals.pulse()
    assert vitals.account()["ready"]
    pool.info = {**pool.info, "gpus": 0}
    vitals.pulse()
    assert "no GPU actor is ready" in reasons(vitals)
    pool.settings.max_actors = 4
    assert vitals.account()["ready"], "Ray's autoscaler is to bring them"
