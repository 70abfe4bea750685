"""The worker's bookkeeping of requests: restart, give-back, death and cancellation of the driver, told by hand."""

import signal
from types import SimpleNamespace

import pytest
from billiard.exceptions import Terminated, WorkerLostError

from actors.contract import ActorState
from bridge.link import Accepted, Done, Ended, Flush, Flushed, Link, Report, Returned, Run, SoftLimited, Stop, Withdraw
from bridge.worker import driver_process, supervisor
from bridge.worker.supervisor import DriverSupervisor, _einfo


class Hub:
    """Runs what is due when a test says so."""

    def __init__(self):
        self.soon, self.later = [], []

    def call_soon(self, function, *args):
        self.soon.append((function, args))

    def call_later(self, seconds, function, *args):
        self.later.append((seconds, function, args))

    def add_reader(self, *_):
        pass

    remove = add_reader

    def run(self):
        soon, self.soon = self.soon, []
        for function, args in soon:
            function(*args)


class Process:
    """A driver that says what the test says."""

    started = []

    def __init__(self, target, args, name):
        self.socket, self.pid, self.exitcode = args[2], 4000 + len(self.started), 0

    def start(self):
        self.link = Link(self.socket.dup())
        self.started.append(self)

    def join(self, _=None):
        pass

    def is_alive(self):
        return True


class Lab:
    def __init__(self, monkeypatch):
        Process.started = []
        monkeypatch.setattr(driver_process.billiard, "Process", Process)
        self.killed = []
        monkeypatch.setattr(driver_process.os, "kill", lambda pid, number: self.killed.append((pid, number)))
        self.supervisor = DriverSupervisor(None, "worker@here", None)
        self.supervisor.process._start()
        self.hub = Hub()
        self.supervisor.register(self.hub)
        self.heard = []  # (request's name, callback, arguments)

    @property
    def driver(self):
        return Process.started[-1]

    def send(self, name, hard_limit_s=None, body=None):
        fields = [field for field in Run._fields if field not in ("serial", "lost", "refusal", "announced")]
        run = dict.fromkeys(fields) | {"id": name, "hard_limit_s": hard_limit_s, "body": body}
        names = ("callback", "error_callback", "accept_callback", "timeout_callback")
        callbacks = {each: lambda *args, each=each: self.heard.append((name, each, args)) for each in names}
        request = self.supervisor.apply(run, callbacks)
        request.on_end = lambda: self.heard.append((name, "end", ()))
        return request

    def received(self):
        """What the driver has got: message types, or ids of requests."""
        self.hub.run()
        return [each.id if isinstance(each, Run) else type(each) for each in self.driver.link.receive()]

    def say(self, *messages):
        for message in messages:
            self.driver.link.send(message)
        self.driver.link.flush()
        self.supervisor.process.on_readable()

    def die(self):
        self.driver.link.close()
        self.supervisor.process.on_readable()
        _, restart, args = self.hub.later[-1]
        restart(*args)

    def said(self):
        found, self.heard = [(name, callback) for name, callback, _ in self.heard], []
        return found


@pytest.fixture
def lab(monkeypatch):
    lab = Lab(monkeypatch)
    yield lab
    for process in Process.started:
        process.link.close()
        process.socket.close()


def serial(request):
    return request.run.serial


def test_a_restart_waits_for_what_has_started_and_keeps_the_rest(lab):
    running, waiting = lab.send("running"), lab.send("waiting")
    assert lab.received() == ["running", "waiting"]
    lab.say(Accepted(serial(running), 1.0))
    lab.supervisor.restart()
    meanwhile = lab.send("meanwhile")
    assert lab.received() == [Flush], "a driver that is to end gets nothing new"
    lab.say(Flushed(serial(waiting)))
    assert lab.received() == []
    lab.say(Done(serial(running), (False, 1, 0.1)))
    assert lab.received() == [Stop]
    lab.die()
    assert lab.received() == ["waiting", "meanwhile"]
    assert lab.said() == [("running", "accept_callback"), ("running", "callback"), ("running", "end")]
    assert (waiting.run.lost, meanwhile.run.lost) == (0, 0), "a planned end is nobody's fault"


def test_a_restart_waits_for_what_starts_while_it_is_told(lab):
    crossing = lab.send("crossing")
    assert lab.received() == ["crossing"]
    lab.supervisor.restart()
    assert lab.received() == [Flush], "not Stop: whether it has started is not known"
    lab.say(Accepted(serial(crossing), 1.0))
    assert lab.received() == []
    lab.say(Returned(serial(crossing)))
    assert lab.received() == [Stop], "it waits again, so the next driver can have it"
    lab.die()
    assert lab.received() == ["crossing"]


def test_give_back_ends_without_a_word_what_has_not_started(lab):
    running, waiting = lab.send("running"), lab.send("waiting")
    lab.say(Accepted(serial(running), 1.0))
    lab.supervisor.give_back()
    lab.say(Flushed(serial(waiting)))
    late = lab.send("late")
    assert lab.received() == ["running", "waiting", Flush]
    assert lab.supervisor.in_flight == 1 and late.run.serial
    lab.say(Done(serial(running), (False, 1, 0.1)))
    assert lab.supervisor.in_flight == 0
    expected = [("running", "accept_callback"), ("waiting", "end"), ("running", "callback"), ("running", "end")]
    assert lab.said() == expected, "no callback of what the broker still has"


def test_what_a_death_does_to_each_request(lab):
    running, waiting, revoked, started = (lab.send(name) for name in ("running", "waiting", "revoked", "started"))
    lab.say(Accepted(serial(running), 1.0), Accepted(serial(started), 1.0))
    revoked.terminate(signal.SIGTERM), started.terminate(signal.SIGTERM)
    lab.received(), lab.said()
    lab.die()
    errors = {name: args[0].exception for name, callback, args in lab.heard if callback == "error_callback"}
    errors = {name: type(getattr(error, "exc", error)) for name, error in errors.items()}
    assert errors == {"running": WorkerLostError, "revoked": Terminated, "started": Terminated}
    assert lab.received() == ["waiting"] and waiting.run.lost == 1


@pytest.mark.parametrize(
    ("late", "on_lost", "trouble", "goes_on"),
    [
        (True, None, "OOM", True),
        (True, True, "OOM", True),
        (True, False, "OOM", False),
        (False, None, "OOM", False),
        (True, None, "", False),
    ],
)
def test_while_nothing_is_stored_a_death_costs_no_late_task(lab, late, on_lost, trouble, goes_on):
    task = SimpleNamespace(acks_late=late, reject_on_worker_lost=on_lost)
    lab.supervisor._app = SimpleNamespace(tasks={None: task})
    request = lab.send("it")
    lab.say(Accepted(serial(request), 1.0), Report(0, {"actors": [], "results": trouble}, None))
    lab.received(), lab.said()
    lab.die()
    assert lab.received() == (["it"] if goes_on else [])
    assert lab.said() == ([] if goes_on else [("it", "error_callback"), ("it", "end")])
    assert lab.supervisor.running == 0


def test_who_takes_over_while_the_worker_ends_is_told_so(lab):
    running = lab.send("running")
    lab.say(Accepted(serial(running), 1.0), Returned(serial(running)))
    lab.supervisor.give_back()
    lab.received()
    lab.die()
    assert lab.received() == ["running", Flush]


def test_a_request_wanted_back_comes_back_only_if_it_has_not_started(lab):
    waiting, crossing = lab.send("waiting"), lab.send("crossing")
    lab.received()
    back = []
    for request in (waiting, crossing, waiting):
        lab.supervisor.withdraw(request, lambda request=request: back.append(request.run.id))
    assert lab.received() == [Withdraw, Withdraw], "asked once each"
    lab.say(Flushed(serial(waiting)), Accepted(serial(crossing), 1.0), Done(serial(crossing), (False, 1, 0.1)))
    assert back == ["waiting"] and lab.supervisor.in_flight == 0
    assert lab.said() == [("crossing", each) for each in ("accept_callback", "callback", "end")]


def test_a_request_wanted_back_that_no_driver_has_comes_back_at_once(lab):
    asked, later, ended = lab.send("asked"), lab.send("later"), lab.send("ended")
    back = []
    lab.supervisor.withdraw(asked, lambda: back.append("asked"))
    lab.received()
    lab.driver.link.close()
    lab.supervisor.process.on_readable()
    assert back == ["asked"], "its driver has died without an answer"
    lab.supervisor.withdraw(later, lambda: back.append("later"))
    ended.terminate(signal.SIGTERM)
    assert back == ["asked", "later"]
    assert lab.said() == [("ended", "error_callback"), ("ended", "end")]
    _, restart, args = lab.hub.later[-1]
    restart(*args)
    assert lab.received() == [], "the next driver hears of none of them"


def test_a_request_wanted_back_during_a_restart_comes_back_at_once(lab):
    running, waiting = lab.send("running"), lab.send("waiting")
    lab.say(Accepted(serial(running), 1.0))
    lab.supervisor.restart()
    lab.say(Flushed(serial(waiting)))
    new = lab.send("new")
    back = []
    lab.supervisor.withdraw(waiting, lambda: back.append("waiting"))
    lab.supervisor.withdraw(new, lambda: back.append("new"))
    assert back == ["waiting", "new"], "not only when the running one ends, hours later"


def test_a_restart_ends_when_its_requests_are_dropped_with_the_connection(lab):
    waiting = lab.send("waiting")
    lab.received()
    lab.supervisor.restart()
    lab.supervisor.flush_requests()
    assert lab.received() == [Flush, Stop, Flush]
    lab.say(Flushed(serial(waiting)))
    lab.die()
    lab.send("next")
    assert lab.received() == ["next"]


def test_a_soft_limit_is_told_and_the_request_goes_on(lab):
    request = lab.send("limited")
    lab.say(Accepted(serial(request), 1.0), SoftLimited(serial(request), 2))
    assert lab.heard[-1] == ("limited", "timeout_callback", (True, 2))
    lab.say(Done(serial(request), (False, 1, 0.1)))
    assert lab.said()[-1] == ("limited", "end")


def test_a_driver_that_lets_a_hard_limit_pass_and_is_silent_is_ended(lab, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now)
    limited, free = lab.send("limited", hard_limit_s=10), lab.send("free")
    lab.say(Accepted(serial(limited), now), Accepted(serial(free), now))

    def enforce():
        (_, function, args) = [each for each in lab.hub.later if each[1] == lab.supervisor._enforce][-1]
        function(*args)

    now += 10 + supervisor.BACKSTOP_S - 1
    enforce()
    assert lab.killed == [], "it still has time"
    now += 2
    lab.say()
    lab.supervisor.process._heard_at = now
    enforce()
    assert lab.killed == [], "it speaks, so it knows what it does"
    now += supervisor.BACKSTOP_S + 1
    enforce()
    assert lab.killed == [(lab.driver.pid, signal.SIGKILL)]
    lab.supervisor.register(lab.hub)
    timers = len(lab.hub.later)
    lab.supervisor._enforce(lab.hub, 1)
    assert len(lab.hub.later) == timers, "the timer of before a reconnect ends by itself"


def test_what_fails_without_having_started_is_accepted_first(lab):
    """Celery acknowledges a task early when it is accepted: else its message would come again after the failure."""
    request = lab.send("odd")
    lab.say(Ended(serial(request), _einfo(ValueError("odd"))))
    assert lab.said() == [("odd", each) for each in ("accept_callback", "error_callback", "end")]
    waiting = lab.send("waiting")
    for _ in range(supervisor.MAX_LOST):
        lab.die()
    assert lab.said() == [("waiting", each) for each in ("accept_callback", "error_callback", "end")]
    assert waiting.run.lost == supervisor.MAX_LOST


def test_a_driver_that_is_not_let_in_is_nobodys_fault_and_tasks_wait_and_learn_why(lab, monkeypatch):
    """After the cluster's token was changed under a worker, say."""
    now = 100.0
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now)
    lab.supervisor._settings = SimpleNamespace(cluster_wait_s=300.0)

    def shut_out():
        lab.say(Report(0, {"actors": []}, ("ClusterAuthFailed", "the token was refused")))
        lab.driver.exitcode = driver_process.loop.EXIT_NOT_STARTED
        lab.die()

    waiting = lab.send("waiting")
    for _ in range(supervisor.MAX_LOST + 1):
        shut_out()
    assert waiting.run.lost == 0 and lab.said() == []
    now += 300.0
    shut_out()
    error = next(args[0].exception for _, callback, args in lab.heard if callback == "error_callback")
    assert "ClusterUnavailable: the token was refused" in str(error)
    assert lab.said() == [("waiting", each) for each in ("accept_callback", "error_callback", "end")]
    later = lab.send("later")
    lab.say(Report(0, {"actors": [{"state": ActorState.READY}]}, None))
    shut_out()
    assert later.run.lost == 0 and lab.said() == [], "somebody was let in: it counts from now"


def test_whoever_listens_to_reports_and_breaks_costs_no_report(lab):
    def breaks():
        raise OSError("the event path is down")

    lab.supervisor.process.on_report = breaks
    lab.say(Report(0, {"actors": [{"slot": 0, "state": "fenced"}], "driver_id": "d"}, None))
    assert lab.supervisor.process.report["actors"][0]["state"] == "fenced"
    lab.send("a")
    lab.say(Accepted(1, 0.0), Done(1, (0, "value", 0.1)))
    assert lab.said() == [("a", "accept_callback"), ("a", "callback"), ("a", "end")]


def pauses(lab):
    """Of each timer for the next driver, in seconds."""
    return [seconds for seconds, function, _ in lab.hub.later if function == lab.supervisor.process._restart]


def test_the_pause_before_the_next_driver_grows_until_one_gets_an_actor(lab):
    for _ in range(3):
        lab.die()
    assert pauses(lab) == [0.1, 0.2, 0.4]
    lab.say(Report(0, {"actors": [{"state": ActorState.READY}]}, None))
    lab.die()
    assert pauses(lab)[3:] == [0.1]


def test_outside_the_event_loop_a_driver_is_started_once_and_only_if_somebody_waits(lab, monkeypatch):
    now = 100.0
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now)
    lab.driver.link.close()
    lab.supervisor.process.on_readable()

    def started():
        lab.supervisor.restart_if_due()
        return len(Process.started)

    now += 1.0
    assert started() == 1, "nobody waits"
    lab.send("waiting")
    now -= 1.0
    assert started() == 1, "too early"
    now += 1.0
    assert started() == 2
    assert started() == 2, "it is there"
    assert lab.received() == ["waiting"]


def test_a_driver_that_cannot_be_started_for_now_is_tried_again(lab, monkeypatch):
    """Else one fork at a full process table, whose error the event loop only logs, would be the last."""

    def refuse(_):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    lab.send("waiting")
    with monkeypatch.context() as full:
        full.setattr(Process, "start", refuse)
        lab.die()
    assert pauses(lab) == [0.1, 0.2]
    _, restart, args = lab.hub.later[-1]
    restart(*args)
    assert lab.received() == ["waiting"]


def test_what_a_driver_has_not_taken_is_offered_again_though_a_reconnect_took_the_timer(lab):
    lab.send("large", body=bytes(8 << 20))
    lab.hub.run()
    again = lab.supervisor.process._flush_again
    assert [each[1] for each in lab.hub.later].count(again) == 1
    lab.hub = Hub()
    lab.supervisor.register(lab.hub)
    assert [each[1] for each in lab.hub.later].count(again) == 1
