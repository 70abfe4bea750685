"""Whatever a producer may write, in any protocol, serialiser, compression: a GPU body sees what a CPU body sees."""

import base64
import datetime
import decimal
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from celery import Celery
from celery.security.certificate import Certificate as SignerCertificate
from celery.security.key import PrivateKey
from celery.security.serialization import SecureSerializer

from tests.apps.messages import Basket
from tests.support.services import ROOT, Worker, wait_for
from tests.support.tls import Certificate

GET = {"timeout": 60}
KINDS = ("gpu", "cpu")
QUEUE = "messages"
ACCEPTED = ["json", "msgpack", "yaml"]

WHEN = datetime.datetime(2024, 2, 29, 12, 30, 15, 250, tzinfo=datetime.UTC)
PLAIN = [1, -2.5, "three", None, True, ["nested", {"deep": [1]}], "ünïcode ☃", "long " * 50_000]
#: serialiser -> arguments that only it carries, and what arrives of them where that differs
RICH = {
    "json": [
        WHEN, WHEN.date(), WHEN.time(), decimal.Decimal("1.10"), uuid.UUID(int=7), b"bytes", b"\xff\x00", (1, (2, 3)),
        {"in": [WHEN, decimal.Decimal(2), b"\x80"]},
    ],
    "yaml": [WHEN, WHEN.date(), {1, 2}, b"\xff\x00", (1, 2), 10**30, {7: "a number as key"}],
    "msgpack": [b"\xff\x00", (1, 2), 2**63, {"in": b"x"}],
    "pickle": [Basket("pear"), (1, {2}), {3: 4}, decimal.Decimal("0.1"), 1 + 2j, b"\xff", WHEN],
}  # fmt: skip


def as_it_arrives(serializer, value):
    """Only pickle knows tuples."""
    if serializer == "pickle" or not isinstance(value, tuple):
        return value
    return [as_it_arrives(serializer, each) for each in value]


def answers(results):
    """What the two returned; they must have seen the same."""
    gpu, cpu = [result.get(**GET) for result in results]
    assert gpu == cpu
    return gpu


def configured(queue=QUEUE, **conf):
    return {"CELERY_MESSAGES": json.dumps({"task_default_queue": queue, **conf})}


@pytest.fixture(scope="module")
def accepts(request):
    """What the worker accepts; tests that need another one come last and say so."""
    return getattr(request, "param", ACCEPTED)


def result_serializer(accepts):
    return "pickle" if "pickle" in accepts else "json"


@pytest.fixture(scope="module")
def worker(environment, accepts, redis_server, tmp_path_factory):
    """In place of the shop's worker one with both kinds of each task; it survives every test and leaves no message."""
    redis_server.client.flushall()
    worker = Worker(
        tmp_path_factory.mktemp("messages"), "-c", "1", "-n", "messages@%h", app="tests.apps.messages:app",
        env={
            **environment, **configured(accept_content=accepts, result_serializer=result_serializer(accepts)),
            "C_FORCE_ROOT": "1",  # Celery refuses to take pickle as root, as tests in containers are
        },
    )  # fmt: skip
    yield worker
    assert worker.popen.poll() is None, f"the worker ended:\n{worker.output[-5000:]}"
    assert worker.stop() == 0, worker.output[-5000:]
    assert left(redis_server) == (0, 0)


def left(redis_server, queue=QUEUE):
    """Messages waiting, and messages taken but not acknowledged."""
    return redis_server.client.llen(queue), redis_server.client.zcard("unacked_index")


@pytest.fixture
def app(redis_server, worker, accepts, request):
    """A producer with the protocol the test is parametrised with, 2 otherwise; reads whatever comes back."""
    made = Celery("producer", broker=redis_server.url, backend=redis_server.url, set_as_current=False)
    made.conf.accept_content, made.conf.result_serializer = accepts, result_serializer(accepts)
    made.conf.task_protocol = getattr(request, "param", 2)
    yield made
    made.close()


@pytest.fixture
def both(app):
    """``both("seen", [1])`` sends the GPU task and the CPU task alike; their results."""

    def send(name, args=(), kwargs=None, **options):
        return [app.send_task(f"messages.{kind}.{name}", args, kwargs, queue=QUEUE, **options) for kind in KINDS]

    return send


both_protocols = pytest.mark.parametrize("app", [1, 2], indirect=True, ids=["protocol1", "protocol2"])


# ---- what a body sees


@both_protocols
@pytest.mark.parametrize("serializer", ACCEPTED)
def test_a_body_sees_the_same_message(both, serializer):
    args = RICH[serializer]
    said = answers(both("seen", args, {"named": args[0]}, serializer=serializer))
    assert said["args"] == [repr(as_it_arrives(serializer, arg)) for arg in args]
    assert said["kwargs"] == repr({"named": args[0]})
    assert said["true"] == [True, True]


@both_protocols
@pytest.mark.parametrize("compression", ["gzip", "zlib", "bzip2", "lzma"])
def test_compression(both, compression):
    said = answers(both("seen", PLAIN, {"more": PLAIN}, compression=compression))
    assert said["args"] == [repr(arg) for arg in PLAIN]


def test_what_a_producer_may_add_arrives(both):
    past, future = "2020-01-01T00:00:00+00:00", "2099-01-01T00:00:00+00:00"
    said = answers(both(
        "seen", [1], {"two": 2}, headers={"colour": "red"}, priority=3, eta=past, expires=future, time_limit=50,
        soft_time_limit=40, argsrepr="(secret)", kwargsrepr="{hidden}", group_id="a group", reply_to="somebody",
        stamped_headers=["team"], team="vision",
    ))["request"]  # fmt: skip
    assert (said["eta"], said["expires"], said["timelimit"]) == (repr(past), repr(future), "[50, 40]")
    assert (said["argsrepr"], said["kwargsrepr"]) == ("'(secret)'", "'{hidden}'")
    assert (said["group"], said["reply_to"], said["headers"]) == ("'a group'", "'somebody'", "{'colour': 'red'}")
    assert "'priority': 3" in said["delivery_info"] and said["stamps"] == "{'team': 'vision'}"


def test_values_return_as_from_a_child(both):
    for value in [*PLAIN, *RICH["json"]]:
        assert answers(both("same", [value])) == as_it_arrives("json", value)


def test_a_shadow_is_a_name_for_people_only(both):
    """More of them than there are children: a slot lost with each would end the CPU tasks."""
    for _ in range(3):
        answers(both("same", [1], shadow="for people"))
    answers(both("same", [2], shadow="messages.cpu.same"))
    answers(both("same", [3], shadow="messages.gpu.same"))
    assert answers(both("same", [4])) == 4


# ---- clients without Celery


def put(redis_server, headers, body, content_type="application/json", queue=QUEUE, **properties):
    """A message as a client in another language writes it, straight into Redis."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    message = {
        "headers": headers,
        "body": base64.b64encode(body).decode(),
        "content-type": content_type,
        "content-encoding": "utf-8",
        "properties": {
            "body_encoding": "base64", "delivery_tag": str(uuid.uuid4()), "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue}, **properties,
        },
    }  # fmt: skip
    redis_server.client.lpush(queue, json.dumps(message))


def stored(redis_server, task_id):
    """What the result backend holds of a task, or None."""
    found = redis_server.client.get(f"celery-task-meta-{task_id}")
    return json.loads(found) if found else None


def outcome(redis_server, task_id):
    """Wait for the task's end; its state and its value or error, as any language reads them."""
    meta = wait_for(lambda: stored(redis_server, task_id), f"the result of {task_id}")
    return meta["status"], meta["result"]


HAND_WRITTEN = {
    "least of protocol 2": lambda name, own: ({"task": name, "id": own}, [[7], {}, {}]),
    "no embedded part": lambda name, own: ({"task": name, "id": own}, [[7], {}, None]),
    "another language": lambda name, own: (
        {"lang": "go", "task": name, "id": own, "root_id": None, "parent_id": None, "group": None, "retries": 0,
         "eta": None, "expires": None, "timelimit": [None, None], "origin": "1@host", "argsrepr": "", "kwargsrepr": ""},
        [[], {"value": 7}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}],
    ),
    "least of protocol 1": lambda name, own: ({}, {"task": name, "id": own, "args": [7]}),
    "protocol 1": lambda name, own: (
        {},
        {"task": name, "id": own, "args": [], "kwargs": {"value": 7}, "retries": 0, "eta": None, "expires": None,
         "utc": True, "callbacks": None, "errbacks": None, "chord": None, "taskset": None, "timelimit": [None, None]},
    ),
    "headers and body": lambda name, own: (
        {"task": name, "id": own}, {"task": name, "id": own, "args": [7], "kwargs": {}},
    ),
    "limits as text": lambda name, own: ({"task": name, "id": own, "timelimit": ["30", "20"]}, [[7], {}, {}]),
    "retries as text": lambda name, own: ({"task": name, "id": own, "retries": "1"}, [[7], {}, {}]),
    "args no list": lambda name, own: ({"task": name, "id": own}, [{"value": 1}, {}, {}]),
    "args a number": lambda name, own: ({"task": name, "id": own}, [5, {}, {}]),
    "a callback that is none": lambda name, own: ({"task": name, "id": own}, [[7], {}, {"callbacks": [5]}]),
}  # fmt: skip
FAIL = {"args a number": "TypeError", "a callback that is none": "AttributeError"}


@pytest.mark.parametrize("case", HAND_WRITTEN)
def test_hand_written_messages(worker, redis_server, case):
    found = []
    for kind in KINDS:
        own = str(uuid.uuid4())
        put(redis_server, *HAND_WRITTEN[case](f"messages.{kind}.same", own), correlation_id=own)
        found.append(outcome(redis_server, own))
    assert found[0] == found[1]
    if case in FAIL:
        assert (found[0][0], found[0][1]["exc_type"]) == ("FAILURE", FAIL[case])
    else:
        assert found[0] == ("SUCCESS", "value" if case == "args no list" else 7)


def test_a_hand_written_chain_and_callback(worker, redis_server):
    """What follows a task is part of its message: here GPU, then CPU, then GPU, and a callback."""
    own, second, third, callback = (str(uuid.uuid4()) for _ in range(4))

    def step(kind, task_id):
        options = {"task_id": task_id, "queue": QUEUE}
        return {"task": f"messages.{kind}.same", "args": [], "kwargs": {}, "options": options}

    after = {"chain": [step("gpu", third), step("cpu", second)], "callbacks": [step("cpu", callback)]}
    put(redis_server, {"task": "messages.gpu.same", "id": own}, [["on its way"], {}, after])
    for each in (own, second, third, callback):
        assert outcome(redis_server, each) == ("SUCCESS", "on its way")


BROKEN = {
    "no JSON": lambda name, own: ({"task": name, "id": own}, b"{nope"),
    "an eta that is none": lambda name, own: ({"task": name, "id": own, "eta": "soon"}, [[1], {}, {}]),
    "an unknown content type": lambda name, own: ({"task": name, "id": own}, [[1], {}, {}], "application/x-odd"),
    "not compressed as it says": lambda name, own: (
        {"task": name, "id": own, "compression": "application/x-gzip"}, [[1], {}, {}],
    ),
    "an unknown compression": lambda name, own: ({"task": name, "id": own, "compression": "odd"}, [[1], {}, {}]),
    "protocol 1, kwargs no mapping": lambda name, own: ({}, {"task": name, "id": own, "args": [1], "kwargs": [1]}),
    "protocol 2, kwargs no mapping": lambda name, own: ({"task": name, "id": own}, [[1], [2], {}]),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_message_costs_only_itself(worker, both, redis_server, case):
    sent = [str(uuid.uuid4()) for _ in KINDS]
    for kind, own in zip(KINDS, sent, strict=True):
        put(redis_server, *BROKEN[case](f"messages.{kind}.same", own))
    assert answers(both("same", ["next"])) == "next"
    wait_for(lambda: left(redis_server) == (0, 0), "the broken ones to be gone from the broker")
    assert [stored(redis_server, own) for own in sent] == [None, None]


@pytest.mark.parametrize("limits", [["soon", None], [None, "late"], [10**400, None]], ids=["hard", "soft", "endless"])
def test_limits_that_are_no_numbers_cost_one_task(worker, both, redis_server, limits):
    """Under prefork they end the worker; they must not end an actor, which other workers share."""
    executor = both("pid")[0].get(**GET)
    own = str(uuid.uuid4())
    put(redis_server, {"task": "messages.gpu.same", "id": own, "timelimit": limits}, [[7], {}, {}])
    assert outcome(redis_server, own)[0] == "FAILURE"
    assert both("pid")[0].get(**GET) == executor


# ---- pickle


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@both_protocols
def test_pickle_is_refused_where_it_is_not_accepted(worker, app, both, redis_server, tmp_path):
    before = worker.output.count("content of type pickle")
    refused = both("same", [Trap(str(tmp_path / "trapped"))], serializer="pickle")
    wait_for(lambda: worker.output.count("content of type pickle") >= before + 2, "the reason in the log")
    assert "Refusing to deserialize" in worker.output
    assert answers(both("same", ["next"])) == "next"
    wait_for(lambda: left(redis_server) == (0, 0), "the refused ones to be gone from the broker")
    assert [stored(redis_server, result.id) for result in refused] == [None, None]
    assert not (tmp_path / "trapped").exists()


with_pickle = pytest.mark.parametrize("accepts", [[*ACCEPTED, "pickle"]], indirect=True, ids=["pickle"])


@with_pickle
@both_protocols
def test_pickle_where_it_is_accepted(both):
    args = RICH["pickle"]
    said = answers(both("seen", args, {"all": Basket([1])}, serializer="pickle"))
    assert said["args"] == [repr(arg) for arg in args]
    said = answers(both("seen", args, serializer="pickle", compression="bzip2"))
    assert said["args"] == [repr(arg) for arg in args]


@with_pickle
def test_a_tuple_of_arguments_stays_one_in_the_request(both):
    """What `delay` sends, where the serialiser knows tuples."""
    assert answers(both("seen", (1, 2), serializer="pickle"))["request"]["args"] == "(1, 2)"


@with_pickle
def test_values_and_errors_return_in_pickle(both):
    assert answers(both("same", [RICH["pickle"]], serializer="pickle")) == RICH["pickle"]
    for result in both("fails", [Basket("plum")], serializer="pickle"):
        error = result.get(**GET, propagate=False)
        assert (type(error).__name__, error.args) == ("Odd", (Basket("plum"),))


# ---- signed messages


@pytest.fixture(scope="module")
def signatures(tmp_path_factory):
    """``signatures(name)``: the settings of somebody whose certificate everybody knows; of a stranger it does not."""
    store, others = tmp_path_factory.mktemp("store"), tmp_path_factory.mktemp("others")

    def settings(name):
        folder = others if name == "stranger" else store
        if not (folder / f"{name}.pem").exists():
            Certificate(folder, name)
        return {
            "security_key": str(folder / f"{name}.key"), "security_certificate": str(folder / f"{name}.pem"),
            "security_cert_store": str(store / "*.pem"), "task_serializer": "auth", "result_serializer": "auth",
            "event_serializer": "auth", "accept_content": ["auth"],
        }  # fmt: skip

    return settings


def sign(settings, body):
    """A body as the `auth` serialiser writes it."""
    with open(settings["security_key"]) as key, open(settings["security_certificate"]) as certificate:
        signer = SecureSerializer(PrivateKey(key.read()), SignerCertificate(certificate.read()))
    return signer.serialize(body)


def tampered(signed, before, after):
    """Other content under the same signature."""
    text = base64.b64decode(signed)
    assert text.count(before) == 1
    return base64.b64encode(text.replace(before, after))


def test_signed_messages(environment, redis_server, signatures, tmp_path):
    mine = signatures("producer")
    worker = Worker(
        tmp_path, "-c", "1", "-n", "signed@%h", app="tests.apps.messages:app",
        env={**environment, **configured("signed", **signatures("worker"))},
    )  # fmt: skip

    def deliver(settings_of, change=lambda signed: signed, kind="gpu"):
        path = str(tmp_path / f"{uuid.uuid4()}")
        signed = change(sign(settings_of, [[path, "text"], {}, {}]))
        put(redis_server, {"task": f"messages.{kind}.notes", "id": path}, signed, "application/data", "signed")
        return path

    def send(*chains):
        done = subprocess.run(
            [sys.executable, "-m", "tests.apps.messages", json.dumps(chains)], cwd=ROOT, timeout=100,
            env={**os.environ, **environment, **configured("signed", **mine)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    try:
        log = tmp_path / "log"
        chain = [["messages.gpu.same", ["abc"]], ["messages.cpu.same", []], ["messages.gpu.same", []]]
        gpu, cpu, chained = send([["messages.gpu.same", [[1, "x"]]]], [["messages.cpu.same", [[1, "x"]]]], chain)
        assert gpu == cpu == [1, "x"] and chained == "abc", "what follows in a chain is signed by the driver"
        good = [deliver(mine, kind=kind) for kind in KINDS]
        bad = []
        for kind in KINDS:
            bad.append(deliver(signatures("stranger"), kind=kind))
            bad.append(deliver(mine, lambda signed: tampered(signed, b"text", b"tEXt"), kind=kind))
            bare = [[str(log), "bare"], {}, {}]
            put(redis_server, {"task": f"messages.{kind}.notes", "id": str(uuid.uuid4())}, bare, queue="signed")
        assert send([["messages.gpu.notes", [str(log), "next"]]], [["messages.cpu.same", [5]]]) == ["next", 5]
        wait_for(lambda: left(redis_server, "signed") == (0, 0), "the refused ones to be gone from the broker")
        assert [Path(path).read_text() for path in good] == ["text\n"] * 2
        assert not [path for path in bad if Path(path).exists()]
        assert log.read_text() == "next\n"
        assert worker.output.count("Refusing to deserialize") >= 2
        assert worker.stop() == 0, worker.output[-5000:]
    finally:
        worker.kill_group()
