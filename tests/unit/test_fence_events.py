"""Celery events about fenced GPUs: one for each change, none for what is not known."""

from bridge.worker.fence_events import FenceEvents


def actor(slot, state):
    return {"slot": slot, "state": state, "node": "n", "reason": "3 faults", "probe_in_s": 60.0}


def test_each_change_is_told_once():
    events = FenceEvents()
    assert list(events.changes([actor(0, "ready"), actor(1, "ready")])) == []
    fenced = ("gpu-fenced", {"actor": 1, "node": "n", "reason": "3 faults", "probe_in_s": 60.0})
    assert list(events.changes([actor(0, "ready"), actor(1, "fenced")])) == [fenced]
    assert list(events.changes([actor(0, "ready"), actor(1, "fenced")])) == []
    assert list(events.changes([actor(0, "ready"), actor(1, "ready")])) == [("gpu-unfenced", {"actor": 1, "node": "n"})]


def test_an_actor_that_does_not_answer_or_is_restarted_is_fenced_until_it_is_ready():
    events = FenceEvents()
    list(events.changes([actor(0, "fenced")]))
    assert list(events.changes([{"slot": 0, "state": "lost"}])) == []
    assert list(events.changes([])) == []
    assert list(events.changes([actor(0, "draining")])) == list(events.changes([actor(0, "starting")])) == []
    assert [kind for kind, _ in events.changes([actor(0, "ready")])] == ["gpu-unfenced"]
