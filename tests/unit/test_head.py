"""When a driver may wait for Ray's head, and when it must leave."""

import os

import pytest

from bridge.driver.head import VARIABLE, Head, HeadWatch, outlast


class Place:
    """A head as a probe sees it."""

    def __init__(self, monkeypatch, wait_s=50.0):
        self.now, self.is_there, self.cluster = 100.0, True, "one"
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        self.watch = HeadWatch(lambda: self.is_there, lambda: self.cluster, wait_s)

    def after(self, seconds, is_there=None, cluster=None):
        self.now += seconds
        self.is_there = self.is_there if is_there is None else is_there
        self.cluster = cluster or self.cluster
        return self.watch.look()


@pytest.fixture
def place(monkeypatch):
    return Place(monkeypatch)


def test_a_head_that_comes_back_with_its_memory_is_the_same(place):
    assert place.after(2) is Head.HERE
    assert place.after(2, is_there=False) is Head.AWAY
    assert place.after(47) is Head.AWAY
    assert place.after(2, is_there=True) is Head.HERE
    assert place.after(49, is_there=False) is Head.AWAY, "each absence counts on its own"


def test_a_head_that_has_forgotten_all_is_another_one(place):
    assert place.after(2, is_there=False) is Head.AWAY
    assert place.after(2, is_there=True, cluster="two") is Head.GONE


def test_an_absence_ends(place):
    assert place.after(2, is_there=False) is Head.AWAY
    assert place.after(50) is Head.GONE


def test_a_head_that_listens_and_cannot_say_what_it_is_the_head_of_is_still_away(place):
    assert place.after(2, is_there=False) is Head.AWAY
    place.watch._identity = lambda: None
    assert place.after(10, is_there=True) is Head.AWAY
    assert place.after(40) is Head.GONE


@pytest.mark.parametrize(("wait_s", "said"), [(50.0, "60"), (300.0, "310"), (1.0, "60")])
def test_ray_waits_longer_than_we_do(monkeypatch, wait_s, said):
    monkeypatch.delenv(VARIABLE, raising=False)
    outlast(wait_s)
    assert os.environ[VARIABLE] == said
    outlast(1000)
    assert os.environ[VARIABLE] == said, "whoever has set it knows better"
    monkeypatch.delenv(VARIABLE)
