"""Results in groups on a real Redis: what Celery would have stored and published, one question per turn."""

import gc
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import greenlet
import pytest
import redis
from celery import Celery, group, signals, states
from celery.app.task import Context
from celery.app.trace import build_tracer
from celery.backends.redis import RedisBackend
from celery.exceptions import BackendStoreError

from actors.contract import Pending, Reply
from actors.wishes import Wish
from bridge import link
from bridge.driver import backends, results, trouble
from bridge.driver.backends import can_be_grouped, expiry
from bridge.driver.news import Replied
from bridge.driver.results import GroupedResults
from bridge.errors import ResultRefused
from bridge.settings import settings
from tests.integration.test_driver import Lab, shared_call, succeeded
from tests.support.services import RedisServer, wait_for

pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")  # Celery's own way


#: A Redis that is away is waited for by nobody.
AT_ONCE = {"result_backend_transport_options": {"retry_policy": {"max_retries": 0}}}


def nothing():
    pass


class Turns:
    """Greenlets in place of tracers: each stores what it is told, and may wait as a tracer at its outcome may.

    As with a tracer, what cannot be stored as it is is stored as the error that says why.
    """

    def __init__(self, url, is_late=False, **conf):
        self.late = is_late
        self.given_back = {}
        self.app = Celery("results", broker="memory://", backend=url, set_as_current=False)
        self.app.conf.update(**conf)
        self.task = self.app.task(name="results.task", shared=False)(nothing)
        self.backend = self.task.backend
        self.grouped = GroupedResults(self, lambda task, error: self.given_back.update({task.run.id: error}))
        self.grouped.adopt([self.task])
        self.loop = greenlet.getcurrent()
        self.ended, self.errors, self.another = [], {}, []
        self.may_wait = True

    # what results.py asks of the tracing

    def at_its_outcome(self, task_id):
        return getattr(greenlet.getcurrent(), "task", None) if self.may_wait else None

    def has_another_outcome(self, task):
        self.another.append(task.run.id)

    def running(self, task_id):
        return getattr(greenlet.getcurrent(), "task", None)

    def is_late(self, task):
        return self.late

    def wait(self):
        return self.loop.switch()

    def go_on(self, task, answer):
        task.tracer.switch(answer)

    # what a test does

    def store(self, task_id, value, state=states.SUCCESS, **kwargs):
        return self._trace(task_id, lambda: self.backend.store_result(task_id, value, state, **kwargs))

    def tell_chord(self, request):
        return self._trace(request.id, lambda: self.backend.mark_as_done(request.id, 1, request, store_result=False))

    def _trace(self, task_id, ends):
        def run():
            try:
                ends()
                self.ended.append(task_id)
            except Exception as error:
                self.errors[task_id] = error

        each = greenlet.greenlet(run)
        each.task = SimpleNamespace(run=SimpleNamespace(id=task_id, task="results.task"), tracer=each)
        each.switch()
        return each

    def state(self, task_id):
        return self.app.AsyncResult(task_id).state


@pytest.fixture
def server(redis_server):
    redis_server.client.flushall()
    return redis_server


@pytest.fixture
def turns(server):
    made = []

    def make(**conf):
        made.append(Turns(server.url, **conf))
        return made[-1]

    yield make
    for each in made:
        each.backend.client.close()
        each.app.close()


def asked(client):
    counts = {name[8:]: row["calls"] for name, row in client.info("commandstats").items()}
    client.config_resetstat()
    return counts


def meta(client, task_id):
    return json.loads(client.get(f"celery-task-meta-{task_id}"))


def test_redis_knows_the_script_before_the_first_result(server, turns):
    server.client.script_flush()
    grouped = turns().grouped
    grouped.warm_up()
    wait_for(lambda: server.client.script_exists(grouped._script.sha) == [True], "the script")


def test_a_redis_that_is_away_at_warm_up_is_no_error(server):
    turns = Turns("redis://127.0.0.1:1/0")
    turns.grouped._connect()


def test_a_turns_results_cost_one_question_and_are_there_when_a_tracer_goes_on(server, turns):
    one = turns()
    listener = server.client.pubsub(ignore_subscribe_messages=True)
    listener.psubscribe("*")
    listener.get_message(timeout=5)
    asked(server.client)
    for number in range(50):
        one.store(f"t{number}", {"n": number})
    assert one.ended == [] and one.grouped.are_waiting
    one.grouped.flush()
    assert one.ended == [f"t{number}" for number in range(50)] and not one.grouped.are_waiting
    counts = asked(server.client)
    assert counts["evalsha"] <= 2, "Redis does not know the script at first"
    assert (counts["get"], counts["setex"], counts["publish"]) == (50, 50, 50)
    for number in range(50):
        message = listener.get_message(timeout=5)
        key = f"celery-task-meta-t{number}".encode()
        assert (message["channel"], message["data"]) == (key, server.client.get(key))
        assert one.app.AsyncResult(f"t{number}").get(timeout=1) == {"n": number}
    listener.close()


@pytest.mark.parametrize("conf", [{}, {"result_extended": True}, {"result_expires": None}, {"result_expires": 60}])
@pytest.mark.parametrize("state", [states.SUCCESS, states.FAILURE, states.RETRY])
def test_what_is_stored_is_what_celery_stores(server, turns, conf, state):
    request = {"id": "t", "task": "results.task", "args": [1], "kwargs": {"a": 2}, "retries": 1, "group": "g"}
    found = []
    for may_wait in (False, True):
        server.client.flushall()
        one = turns(result_failure_expires=30, **conf)
        one.may_wait = may_wait
        value = ValueError("odd", 1) if state != states.SUCCESS else {"ünï": [1.5, None]}
        one.store("t", value, state, traceback="text", request=one.task.request_stack.top or _context(request))
        assert one.grouped.are_waiting == may_wait
        one.grouped.flush()
        assert one.ended == ["t"]
        stored = meta(server.client, "t")
        assert bool(stored.pop("date_done")) == (state != states.RETRY)
        found.append((stored, server.client.ttl("celery-task-meta-t")))
    assert found[0] == found[1]


def _context(request):
    from celery.app.task import Context

    return Context(request)


def test_expiry_is_celerys():
    class Backend:
        expires, failure_expires = 60, 30

    assert (expiry(Backend, states.SUCCESS), expiry(Backend, states.FAILURE)) == (60, 30)
    Backend.expires, Backend.failure_expires = None, None
    assert expiry(Backend, states.FAILURE) == 0


def test_a_success_is_never_overwritten_and_other_states_are(server, turns):
    one = turns()
    for state in (states.SUCCESS, states.STARTED, states.FAILURE, "PROGRESS"):
        server.client.set(f"celery-task-meta-{state}", json.dumps({"status": state, "result": "first"}))
        one.store(state, "second")
    one.grouped.flush()
    assert len(one.ended) == 4
    now = {state: meta(server.client, state)["result"] for state in (states.SUCCESS, states.STARTED, "PROGRESS")}
    assert now == {states.SUCCESS: "first", states.STARTED: "second", "PROGRESS": "second"}


def test_one_tasks_results_are_stored_in_order(server, turns):
    """A group may hold two of one task that came back."""
    one = turns()
    one.store("t", ValueError("first"), states.RETRY)
    one.store("t", "second", states.SUCCESS)
    one.store("t", ValueError("third"), states.FAILURE)
    one.grouped.flush()
    assert (one.state("t"), meta(server.client, "t")["result"]) == ("SUCCESS", "second")


@pytest.mark.parametrize(
    "stored", [b"no json", b"[1]", b"5", b'{"result": 1}', b"\xff", b'{"status": "SUCCESS", "r": "%s"}']
)
def test_what_redis_cannot_judge_is_left_to_celery(server, turns, stored):
    """Then whatever Celery makes of it happens, an error or a store, as without groups."""
    ends = []
    for may_wait in (False, True):
        server.client.set("celery-task-meta-t", stored.replace(b"%s", b"x" * results.LARGEST_BYTES))
        one = turns()
        one.may_wait = may_wait
        one.store("t", "new")
        one.store("other", "new")
        one.grouped.flush()
        ends.append((sorted(one.ended), {key: type(error) for key, error in one.errors.items()}))
        assert one.state("other") == "SUCCESS"
        assert server.client.get("celery-task-meta-t").startswith(
            (stored[:5], b'{"status": "SUCCESS", "result": "new"')
        )
    assert ends[0] == ends[1]


def test_a_key_of_another_kind_costs_only_its_own_result(server, turns):
    server.client.lpush("celery-task-meta-odd", 1)
    one = turns()
    for task_id in ("a", "odd", "b"):
        one.store(task_id, 1)
    one.grouped.flush()
    assert sorted(one.ended) == ["a", "b"]
    assert isinstance(one.errors["odd"], redis.ResponseError)


def fill(server):
    server.client.config_set("maxmemory", 1)


def make_replica(server):
    server.client.execute_command("REPLICAOF", "127.0.0.1", "1")


def lose_its_master(server):
    """A replica that would rather say nothing than something old."""
    server.client.config_set("replica-serve-stale-data", "no")
    make_replica(server)


def dump(server):
    return Path(server.client.config_get("dir")["dir"]) / "dump.rdb"


def fail_to_save(server):
    """Redis takes no writes when it could not save: a folder is where its file must go, which stops root, too."""
    dump(server).mkdir()
    server.client.config_set("save", "3600 1")
    _save(server, "err")


def _save(server, status):
    server.client.bgsave()
    wait_for(lambda: server.client.info("persistence")["rdb_last_bgsave_status"] == status, f"{status} of a save")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A Redis that the test may break; it is asked again soon."""
    monkeypatch.setattr(trouble, "PAUSES_S", (0.01, 0.01))
    server = RedisServer(tmp_path)
    yield server
    server.client.close()
    server.kill_group()
    gc.collect()  # Celery's results ask Redis when they are collected, which is to be in no other test


def accept(server):
    server.client.config_set("maxmemory", 0)
    server.client.config_set("min-replicas-to-write", 0)
    server.client.execute_command("REPLICAOF", "NO", "ONE")
    if dump(server).is_dir():
        dump(server).rmdir()
        _save(server, "ok")


#: What the error says -> how it is brought about.
REFUSALS = {
    "OOM command": fill,
    "read only": make_replica,
    "NOREPLICAS": lambda server: server.client.config_set("min-replicas-to-write", 1),
    "MISCONF": fail_to_save,
    "MASTER is down": lose_its_master,
}


def flush_until(one, condition, what):
    wait_for(lambda: one.grouped.flush() or condition(), what, every_s=0.005)


@pytest.mark.parametrize(("said", "refuse"), REFUSALS.items(), ids=REFUSALS)
def test_results_of_late_tasks_wait_until_redis_stores_again(own, said, refuse, caplog):
    one = Turns(own.url, is_late=True, **AT_ONCE)
    one.store("a", 1), one.store("b", ValueError("b"), states.FAILURE)
    refuse(own)
    for _ in range(3):
        flush_until(one, lambda: one.grouped.due_in_s() > 0, "Redis to refuse")
        wait_for(lambda: one.grouped.due_in_s() == 0, "the pause to be over", every_s=0.005)
    assert (one.ended, one.errors, one.given_back) == ([], {}, {})
    assert said in one.grouped.trouble
    accept(own)
    flush_until(one, lambda: len(one.ended) == 2, "the results to be stored")
    assert [one.state(each) for each in "ab"] == ["SUCCESS", "FAILURE"] and one.errors == {}
    assert caplog.text.count("the result backend refuses results") == 1 and one.grouped.trouble == ""


@pytest.mark.parametrize("refuse", REFUSALS.values(), ids=REFUSALS)
def test_an_early_task_waits_as_long_as_celerys_policy_says_and_then_fails_with_the_cause(own, refuse):
    one = Turns(own.url, **AT_ONCE)
    one.store("a", 1), one.store("b", 2)
    refuse(own)
    one.grouped.flush()
    assert set(one.errors) == {"a", "b"} and all(trouble.is_refusal(error) for error in one.errors.values())
    accept(own)
    one.store("c", 3)
    one.grouped.flush()
    assert one.state("c") == "SUCCESS"


def test_when_the_worker_ends_what_is_not_stored_goes_back_without_an_outcome(own):
    one = Turns(own.url, is_late=True, **AT_ONCE)
    one.store("a", 1)
    fill(own)
    flush_until(one, lambda: one.grouped.due_in_s() > 0, "Redis to refuse")
    one.grouped.end()
    one.grouped.flush()
    assert trouble.is_refusal(one.given_back["a"]) and (one.ended, one.errors) == ([], {})
    assert not one.grouped.are_waiting
    accept(own)
    assert one.state("a") == "PENDING"


@pytest.fixture
def parts(own):
    """``parts(one)``: requests of both tasks of a chord's header, and how many bodies have been sent."""

    def send(one):
        body = one.app.signature("results.body")
        header = group([one.task.s(), one.task.s()], app=one.app).freeze()
        one.backend.set_chord_size(header.id, 2)
        requests = [
            Context(id=each.id, group=header.id, group_index=index, chord=body) for index, each in enumerate(header)
        ]
        queue = one.app.connection_for_read().SimpleQueue(f"parts-{header.id}")
        body.set(queue=f"parts-{header.id}")
        return requests, queue.qsize

    return send


def refuse_words_to_chords(server):
    server.client.execute_command("ACL", "SETUSER", "default", "resetkeys", "~celery-task-meta-*")


def hear_words_to_chords(server):
    server.client.execute_command("ACL", "SETUSER", "default", "allkeys")


def test_a_chord_hears_of_its_parts_when_redis_takes_words_again(own, parts, caplog):
    one = Turns(own.url, is_late=True, **AT_ONCE)
    (first, second), bodies = parts(one)
    one.tell_chord(first)
    assert one.ended == [first.id] and not one.grouped.are_waiting
    refuse_words_to_chords(own)
    one.tell_chord(second)
    for _ in range(3):
        flush_until(one, lambda: one.grouped.due_in_s() > 0, "Redis to refuse")
        wait_for(lambda: one.grouped.due_in_s() == 0, "the pause to be over", every_s=0.005)
    assert one.errors == {} and one.ended == [first.id] and bodies() == 0
    hear_words_to_chords(own)
    flush_until(one, lambda: len(one.ended) == 2, "the chord to be told")
    assert bodies() == 1 and one.errors == {} and not one.grouped.are_waiting
    assert caplog.text.count("the result backend refuses results") == 1 and one.grouped.trouble == ""


def test_a_chord_hears_of_its_parts_from_a_redis_that_was_away(own, parts, tmp_path):
    own.client.config_set("appendonly", "yes")
    wait_for(lambda: not own.client.info("persistence")["aof_rewrite_in_progress"], "what is there to be kept")
    one = Turns(own.url, is_late=True, **AT_ONCE)
    (first, second), bodies = parts(one)
    one.tell_chord(first)
    own.kill_group()
    one.tell_chord(second)
    one.grouped.flush()
    assert one.grouped.are_waiting and one.errors == {}
    again = RedisServer(tmp_path, port=own.port, options=["appendonly yes"])
    try:
        flush_until(one, lambda: len(one.ended) == 2, "the chord to be told")
        assert bodies() == 1
    finally:
        again.client.close()
        again.kill_group()


def test_a_part_whose_chord_cannot_be_told_before_the_worker_ends_goes_back(own, parts):
    one, early = Turns(own.url, is_late=True, **AT_ONCE), Turns(own.url, **AT_ONCE)
    (first, _), _ = parts(one)
    refuse_words_to_chords(own)
    one.tell_chord(first)
    assert one.grouped.are_waiting
    one.grouped.end()
    one.grouped.flush()
    assert trouble.is_refusal(one.given_back[first.id]) and (one.ended, one.errors) == ([], {})
    early.tell_chord(first)
    assert trouble.is_refusal(early.errors[first.id]), "an early task's message is gone, so Celery says what it says"


def test_an_early_task_tells_its_chord_for_as_long_as_celerys_policy_says(own, parts):
    policy = {"max_retries": 1, "interval_start": 0.05, "interval_max": 0.05}
    one = Turns(own.url, result_backend_transport_options={"retry_policy": policy})
    (first, _), _ = parts(one)
    own.kill_group()
    one.tell_chord(first)
    assert one.grouped.are_waiting and one.errors == {}
    flush_until(one, lambda: one.errors, "the policy to be over while Redis is away")
    assert isinstance(one.errors[first.id], redis.ConnectionError)
    assert not one.grouped.are_waiting and one.grouped.trouble == ""


def test_a_word_to_a_chord_that_is_too_large_keeps_no_results_from_redis(own, parts, caplog):
    one = Turns(own.url, is_late=True, **AT_ONCE)
    (first, _), _ = parts(one)
    own.client.config_set("maxmemory", own.client.info("memory")["used_memory"] + (4 << 20))
    large = "x" * (8 << 20)
    one._trace(first.id, lambda: one.backend.mark_as_done(first.id, large, first, store_result=False))
    for number in range(5):
        one.store(str(number), number)
        flush_until(one, lambda number=number: str(number) in one.ended, "a small result to be stored")
        flush_until(one, lambda: one.grouped.due_in_s() > 0, "the word to be refused again")
        wait_for(lambda: one.grouped.due_in_s() == 0, "the pause to be over", every_s=0.005)
    assert one.grouped.are_waiting and one.errors == {} and "OOM" in one.grouped.trouble
    assert caplog.text.count("stores results again") == 0
    accept(own)
    flush_until(one, lambda: first.id in one.ended, "the chord to be told")
    assert one.grouped.trouble == ""


def test_a_chord_whose_body_was_claimed_by_a_question_without_an_answer_gets_it(own, parts):
    one = Turns(own.url, is_late=True, **AT_ONCE)
    (first, second), bodies = parts(one)
    one.tell_chord(first)
    script = one.backend._chord_part_return_script

    def lose_the_answer(*args, **kwargs):
        one.backend._chord_part_return_script = script
        script(*args, **kwargs)
        raise redis.ConnectionError("cut off")

    one.backend._chord_part_return_script = lose_the_answer
    one.tell_chord(second)
    flush_until(one, lambda: "claimed" in one.grouped.trouble, "what has become of it")
    assert bodies() == 0
    own.client.delete(one.backend.get_key_for_group(second.group, ".c"))  # as its time does
    flush_until(one, lambda: second.id in one.ended, "the chord to be told")
    assert bodies() == 1 and one.errors == {} and one.grouped.trouble == ""


def test_a_user_who_may_not_write_here_is_refused_without_an_end_too(own):
    own.client.execute_command("ACL", "SETUSER", "reader", "on", "nopass", "~*", "&*", "+@all", "-setex")
    one = Turns(own.url.replace("redis://", "redis://reader:x@"), is_late=True, **AT_ONCE)
    one.store("a", 1)
    flush_until(one, lambda: one.grouped.trouble, "Redis to refuse")
    assert one.grouped.are_waiting and one.errors == {}
    own.client.execute_command("ACL", "SETUSER", "reader", "+setex")
    flush_until(one, lambda: one.ended == ["a"], "the result to be stored")
    one.backend.client.close()


def test_where_scripts_are_refused_too_results_wait_as_well(own):
    own.client.execute_command("ACL", "SETUSER", "plain", "on", "nopass", "~*", "&*", "+@all", "-evalsha")
    one = Turns(own.url.replace("redis://", "redis://plain:x@"), is_late=True, **AT_ONCE)
    fill(own)
    one.store("a", 1)
    flush_until(one, lambda: one.grouped.trouble, "Redis to refuse")
    one.store("b", 2)
    assert one.errors == {} and one.ended == []
    accept(own)
    flush_until(one, lambda: sorted(one.ended) == ["a", "b"], "the results to be stored")
    one.backend.client.close()


@pytest.mark.parametrize("is_late", [True, False])
def test_a_result_that_alone_is_too_large_fails_and_says_why(own, is_late):
    one = Turns(own.url, is_late=is_late)
    one.store("small", 1)
    one.store("large", "x" * (16 << 20))
    own.client.config_set("maxmemory", own.client.info("memory")["used_memory"] + (4 << 20))
    listener = own.client.pubsub(ignore_subscribe_messages=True)
    listener.subscribe("celery-task-meta-large")
    one.grouped.flush()
    assert one.ended == ["small"] and one.another == ["large"] and one.given_back == {}
    error = one.errors["large"]
    assert (type(error), error.task) == (ResultRefused, "results.task") and error.size > 16 << 20
    assert "OOM command not allowed" in str(error) and "large-arrays.md" in str(error)
    stored = one.app.AsyncResult("large")
    assert stored.state == "FAILURE" and str(stored.result) == str(error), "also if the tracer ended here"
    assert json.loads(wait_for(listener.get_message, "the news")["data"])["status"] == "FAILURE"
    listener.close()


def test_a_result_beyond_what_redis_reads_fails_and_says_why(own):
    own.client.config_set("proto-max-bulk-len", 2 << 20)
    one = Turns(own.url, is_late=True)
    one.store("large", "x" * (16 << 20))
    one.store("small", 1)
    flush_until(one, lambda: one.errors, "the large one to be refused")
    assert "proto-max-bulk-len" in str(one.errors["large"]) and one.ended == ["small"]
    assert one.state("large") == "FAILURE"


def test_a_result_beyond_512_mb_is_not_even_sent(own, monkeypatch):
    monkeypatch.setattr(RedisBackend, "_MAX_STR_VALUE_SIZE", 1000)
    one = Turns(own.url, is_late=True)
    one.store("large", "x" * 2000)
    assert "512 MB" in str(one.errors["large"]) and one.another == ["large"] and one.state("large") == "PENDING"


def test_a_retry_that_cannot_be_stored_goes_on_in_the_broker(own, caplog):
    one = Turns(own.url, is_late=True, **AT_ONCE)
    one.store("a", ValueError("again"), states.RETRY)
    fill(own)
    one.grouped.flush()
    assert one.ended == ["a"] and one.errors == {} and "RETRY of a is not stored" in caplog.text


def test_progress_that_cannot_be_stored_fails_nothing(own):
    one = Turns(own.url, **AT_ONCE)
    fill(own)
    one.store("a", {"pid": 1}, states.STARTED), one.store("b", {"done": 1}, "PROGRESS")
    assert one.ended == ["a", "b"] and one.errors == {}


def test_where_the_script_may_not_run_celery_goes_on_alone(server, turns, caplog):
    server.client.execute_command("ACL", "SETUSER", "plain", "on", "nopass", "~*", "&*", "+@all", "-evalsha")
    try:
        one = Turns(server.url.replace("redis://", "redis://plain:x@"))
        one.store("a", 1), one.store("b", 2)
        one.grouped.flush()
        assert one.ended == ["a", "b"] and one.state("a") == one.state("b") == "SUCCESS"
        one.store("c", 3)
        assert one.ended == ["a", "b", "c"], "at once, while the pause lasts"
        assert caplog.text.count("Redis refused a script") == 1
        one.backend.client.close()
    finally:
        server.client.acl_deluser("plain")


def test_scripts_flushed_under_a_running_driver(server, turns):
    one = turns()
    for task_id in ("a", "b"):
        server.client.script_flush()
        one.store(task_id, 1)
        one.grouped.flush()
    assert one.ended == ["a", "b"]


def test_results_wait_for_a_redis_that_is_away_and_nothing_else_does(tmp_path, monkeypatch):
    monkeypatch.setattr(trouble, "PAUSES_S", (0.05, 0.05))
    server = RedisServer(tmp_path)
    one = Turns(server.url)
    try:
        server.client.close()
        server.kill_group()
        one.store("a", 1), one.store("b", 2)
        ended = one.store("c", 3)
        one.grouped.flush()
        assert one.grouped.are_waiting and 0 < one.grouped.due_in_s() <= 0.05 and one.errors == {}
        ended.throw(greenlet.GreenletExit)
        wait_for(lambda: one.grouped.due_in_s() == 0, "the pause to be over")
        one.grouped.flush()
        assert one.ended == [] and one.grouped.due_in_s() > 0, "still away"
        server = RedisServer(tmp_path, port=server.port)
        wait_for(lambda: one.grouped.flush() or one.ended == ["a", "b"], "the results to be stored")
        assert not one.grouped.are_waiting and one.grouped.due_in_s() == float("inf")
        assert [one.state(each) for each in "abc"] == ["SUCCESS", "SUCCESS", "PENDING"]
        server.client.close()
    finally:
        server.kill_group()


@pytest.mark.parametrize(
    ("policy", "seconds"),
    [
        ({"max_retries": 20, "interval_start": 0, "interval_step": 1, "interval_max": 1}, 19),
        ({"max_retries": 3, "interval_start": 1, "interval_step": 0.5, "interval_max": 9}, 4.5),
        ({"max_retries": None}, float("inf")),
        ({"max_retries": None, "timeout": 5.0}, 5),
        ({"max_retries": 0}, 0),
    ],
)
def test_as_long_as_celerys_policy_says(policy, seconds):
    assert backends.patience(policy) == seconds


def test_redis_away_is_the_error_celery_would_raise_in_each_task(tmp_path):
    server = RedisServer(tmp_path)
    try:
        one = Turns(server.url, **AT_ONCE)
        one.store("before", 1)
        one.grouped.flush()
        server.client.close()
        server.kill_group()
        one.store("a", 1), one.store("b", 2)
        one.grouped.flush()
        assert {type(error) for error in one.errors.values()} == {redis.ConnectionError}
        assert one.errors["a"] is not one.errors["b"]
        again = RedisServer(tmp_path, port=server.port)
        one.store("c", 3)
        one.grouped.flush()
        assert one.ended == ["before", "c"] and one.state("c") == "SUCCESS"
        again.client.close()
        again.kill_group()
    finally:
        server.kill_group()


def test_celerys_own_retries_go_on(tmp_path):
    """`result_backend_always_retry`: the error reaches Celery's policy, which asks again, and gives up as ever."""
    server = RedisServer(tmp_path)
    one = Turns(
        server.url, result_backend_always_retry=True, result_backend_max_retries=2,
        result_backend_max_sleep_between_retries_ms=1, **AT_ONCE,
    )  # fmt: skip
    tries = []
    one.backend.on_backend_retryable_error = tries.append
    server.client.close()
    server.kill_group()
    one.store("a", 1)
    while one.grouped.are_waiting:
        one.grouped.flush()
    assert len(tries) == 2
    assert isinstance(one.errors["a"], BackendStoreError)


def test_what_is_ended_from_outside_is_not_stored(server, turns):
    one = turns()
    ended = one.store("a", 1)
    one.store("b", 2)
    ended.throw(greenlet.GreenletExit)
    one.grouped.flush()
    assert one.ended == ["b"]
    assert (one.state("a"), one.state("b")) == ("PENDING", "SUCCESS")


def test_other_states_and_places_are_stored_at_once(server, turns):
    one = turns()
    one.store("a", {"done": 1}, "PROGRESS")
    one.store("b", {"pid": 1}, states.STARTED)
    one.backend.store_result("c", 1, states.SUCCESS)
    assert not one.grouped.are_waiting
    assert [one.state(each) for each in "abc"] == ["PROGRESS", "STARTED", "SUCCESS"]


def test_a_result_that_cannot_be_written_fails_before_it_joins_the_others(server, turns):
    one = turns()
    one.store("a", {"odd": object()})
    one.store("b", 1)
    one.grouped.flush()
    assert one.ended == ["b"]
    assert type(one.errors["a"]).__name__ == "EncodeError"


def test_large_groups_are_stored_in_parts(server, turns, monkeypatch):
    one = turns()
    big = "x" * (results.MOST_BYTES // 2)
    for number in range(3):
        one.store(f"big{number}", big)
    for number in range(results.MOST_RESULTS + 1):
        one.store(f"t{number}", number)
    asked(server.client)
    one.grouped.flush()
    assert len(one.ended) == results.MOST_RESULTS + 4
    assert asked(server.client)["evalsha"] in (4, 5)
    assert one.app.AsyncResult("big2").get(timeout=5) == big


def test_whatever_is_not_celerys_own_json_is_left_alone(server):
    def backend(cls=RedisBackend, **conf):
        app = Celery("other", set_as_current=False)
        app.conf.update(**conf)
        return cls(app=app, url=server.url)

    class Own(RedisBackend):
        def _set_with_state(self, key, value, state):
            return super()._set_with_state(key, value, state)

    assert can_be_grouped(backend())
    assert not can_be_grouped(backend(Own))
    assert not can_be_grouped(backend(result_serializer="pickle"))
    assert not can_be_grouped(backend(result_compression="gzip"))
    assert not can_be_grouped(Celery("mem", backend="cache+memory://", set_as_current=False).backend)
    instrumented = backend()
    instrumented.set = lambda *args, **kwargs: None
    assert not can_be_grouped(instrumented)


# ---- in the driver, with Celery's own tracers


@pytest.fixture
def lab(server, monkeypatch):
    monkeypatch.setenv("BRIDGE_CALL_GAP_S", "0")
    settings.cache_clear()
    lab = Lab(monkeypatch, server.url)
    yield lab
    lab.app.backend.client.close()
    settings.cache_clear()


def turn(lab):
    """What the loop does at its end; the answers that leave."""
    lab.driver._results.flush()
    return [answer.serial for answer in lab.answers()]


def called(lab, count):
    """A call with that many tasks, all other tasks ended."""
    lab.event = _with_turn(lab, lab.event)
    call = shared_call(lab, count)
    del lab.event
    lab.answers()
    return call


def _with_turn(lab, event):
    def take(each):
        event(each)
        lab.driver._results.flush()

    return take


def state(lab, serial):
    return lab.app.AsyncResult(str(serial)).state


def test_a_task_is_done_when_its_result_is_stored(lab):
    call = called(lab, 3)
    lab.event(Replied(call.id, Reply(tuple(succeeded(task, 1) for task in call.tasks), 0.0), ""))
    assert lab.answers() == [] and lab.driver._timeout() == 0.0, "the loop must not sleep over it"
    assert [state(lab, serial) for serial in (2, 3, 4)] == ["PENDING"] * 3
    assert turn(lab) == [2, 3, 4]
    assert [state(lab, serial) for serial in (2, 3, 4)] == ["SUCCESS"] * 3
    assert not lab.driver._tasks.by_serial and lab.driver._timeout() > 0


def test_late_news_of_a_task_whose_result_is_being_stored_changes_nothing(lab):
    call = called(lab, 1)
    (task,) = call.tasks
    lab.event(Replied(call.id, Reply((succeeded(task, "first"),), 0.0), ""))
    lab.driver._tasks.tracing.resume(lab.driver._tasks.by_serial[2], succeeded(task, "second"))
    assert turn(lab) == [2]
    assert lab.app.AsyncResult("2").get(timeout=1) == "first"


def test_a_task_ended_while_its_result_waits_stores_nothing_and_costs_nobody(lab):
    call = called(lab, 2)
    lab.event(Replied(call.id, Reply(tuple(succeeded(task, 1) for task in call.tasks), 0.0), ""))
    lab.driver._tasks.tracing.stop(lab.driver._tasks.by_serial[2])
    assert turn(lab) == [3]
    assert (state(lab, 2), state(lab, 3)) == ("PENDING", "SUCCESS")


def test_hooks_never_interleave_whatever_they_store(lab):
    """A hook may hold a lock around what it asks of the backend."""
    said = []

    def on_success(sender, **_):
        task_id = sender.request.id
        said.append(f"in {task_id}")
        lab.app.backend.store_result(task_id, 1, states.SUCCESS)
        lab.app.backend.store_result(f"other-{task_id}", 1, states.FAILURE)
        said.append(f"out {task_id}")

    signals.task_success.connect(on_success, sender=lab.app.tasks["lab.echo"], weak=False)
    call = called(lab, 3)
    said.clear()
    lab.event(Replied(call.id, Reply(tuple(succeeded(task, 1) for task in call.tasks), 0.0), ""))
    assert said == []
    assert turn(lab) == [2, 3, 4]
    assert said == [f"{way} {task_id}" for task_id in (2, 3, 4) for way in ("in", "out")]
    signals.task_success.disconnect(on_success, sender=lab.app.tasks["lab.echo"])


def test_states_before_the_outcome_are_stored_at_once(lab):
    """STARTED before the call leaves, progress while the body runs: nothing may wait in the driver for those."""
    task = lab.app.tasks["lab.echo"]
    task.track_started = True
    task.__trace__ = build_tracer("lab.echo", task, lab.app.loader, "lab@here", app=lab.app)
    call = called(lab, 1)
    assert state(lab, 2) == "STARTED"
    wish = pickle.dumps([Wish("update_state", (), {"state": "PROGRESS", "meta": {"at": 1}})])
    lab.event(Replied(call.id, Reply((Pending(call.tasks[0].token, True, (wish,)),), 0.0), ""))
    assert state(lab, 2) == "PROGRESS"
    assert not lab.driver._results.are_waiting
    lab.event(Replied(call.id, Reply((succeeded(call.tasks[0], 1),), 0.0), ""))
    assert turn(lab) == [2] and state(lab, 2) == "SUCCESS"


def test_a_tracer_waits_until_its_chord_can_be_told(own, monkeypatch):
    monkeypatch.setenv("BRIDGE_CALL_GAP_S", "0")
    settings.cache_clear()
    lab = Lab(monkeypatch, own.url)
    lab.ready()
    lab.app.backend.set_chord_size("header", 1)
    queue = lab.app.connection_for_read().SimpleQueue("a-tracer-waits")
    body = lab.app.signature("lab.body", queue="a-tracer-waits")
    lab.send(1, chord=body, group="header", group_index=0)
    call = lab.fleet.calls.pop()
    refuse_words_to_chords(own)
    lab.event(Replied(call.id, Reply((succeeded(call.tasks[0], 1),), 0.0), ""))
    assert turn(lab) == [] and state(lab, 1) == "SUCCESS" and lab.driver._results.are_waiting
    hear_words_to_chords(own)
    wait_for(lambda: turn(lab) == [1], "the chord to be told", every_s=0.005)
    assert queue.qsize() == 1 and state(lab, 1) == "SUCCESS"
    lab.app.backend.client.close()
    settings.cache_clear()


@pytest.mark.filterwarnings("ignore:Exception raised outside body:RuntimeWarning")
def test_a_backend_that_is_away_costs_each_task_its_result_and_not_the_driver(monkeypatch, tmp_path):
    monkeypatch.setenv("BRIDGE_CALL_GAP_S", "0")
    settings.cache_clear()
    server = RedisServer(tmp_path)
    try:
        monkeypatch.setattr(results, "patience", lambda policy: 0.0)
        lab = Lab(monkeypatch, server.url)
        call = called(lab, 2)
        lab.event(Replied(call.id, Reply(tuple(succeeded(task, 1) for task in call.tasks), 0.0), ""))
        server.client.close()
        server.kill_group()
        lab.driver._results.flush()
        answers = lab.answers()
        assert [type(answer) for answer in answers] == [link.Ended, link.Ended]
        errors = [getattr(answer.einfo.exception, "exc", answer.einfo.exception) for answer in answers]
        assert {type(error) for error in errors} == {redis.ConnectionError}
    finally:
        server.kill_group()
        settings.cache_clear()
