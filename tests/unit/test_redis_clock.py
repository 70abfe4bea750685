"""Redis' clock, asked of a Redis and counted on by a host that are made up: what counts as a jump."""

import pytest

from bridge.worker import redis_clock
from bridge.worker.redis_clock import RedisClock

WALL = 1_800_000_000.0


class Host:
    """Its clock since boot, and the clock of a Redis it asks."""

    def __init__(self):
        self.boot_s, self.redis_s, self.answer_takes_s = 1000.0, WALL, 0.0

    def time(self):
        said = self.redis_s
        self.passes(self.answer_takes_s)
        return int(said), int(said % 1 * 1e6)

    def passes(self, seconds):
        self.boot_s += seconds
        self.redis_s += seconds


@pytest.fixture
def host(monkeypatch):
    host = Host()
    monkeypatch.setattr(redis_clock, "boot_s", lambda: host.boot_s)
    monkeypatch.setattr(redis_clock.time, "time", lambda: WALL)
    return host


@pytest.fixture
def clock(host):
    clock = RedisClock()
    assert clock.ask(host, 60, 20) == WALL and clock.is_steady
    return clock


def test_it_is_counted_on_between_questions(host, clock):
    host.passes(7.5)
    assert clock.now() == host.redis_s


def test_a_question_of_any_length_is_no_jump(host, clock):
    for takes_s in (500, 0, 500, 500, 0):
        host.answer_takes_s = takes_s
        host.passes(20)
        clock.ask(host, 60, 20)
        assert clock.is_steady


@pytest.mark.parametrize("by_s", [21, -21, 86400, -86400])
def test_after_a_jump_it_is_not_steady_for_one_time_out(host, clock, by_s):
    host.passes(20)
    host.redis_s += by_s
    assert clock.ask(host, 60, 20) == host.redis_s
    for _ in range(3):
        assert not clock.is_steady
        host.passes(20)
        clock.ask(host, 60, 20)
    assert clock.is_steady


def test_a_small_step_is_none(host, clock):
    host.redis_s += 19
    clock.ask(host, 60, 20)
    assert clock.is_steady


def test_a_host_whose_clock_differs_waits_at_first(host):
    host.redis_s += 86400
    clock = RedisClock()
    clock.ask(host, 60, 20)
    assert not clock.is_steady
    host.passes(60)
    assert clock.is_steady
