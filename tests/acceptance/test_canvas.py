"""Canvas as Celery documents it: the same workflow of GPU tasks, CPU tasks, or both in turn has the same end."""

import itertools

import pytest
from celery import chain, chord, chunks, group, xmap, xstarmap
from celery.canvas import StampingVisitor
from celery.contrib.abortable import AbortableAsyncResult
from celery.exceptions import ChordError, TaskRevokedError

from tests.apps.promise import KINDS
from tests.support import promise
from tests.support.promise import GET, failure
from tests.support.services import wait_for


@pytest.fixture(scope="module")
def worker(environment, redis_server, tmp_path_factory):
    with promise.serving(environment, tmp_path_factory.mktemp("canvas")) as worker:
        yield worker
    assert promise.left(redis_server) == (0, 0)


@pytest.fixture(scope="module")
def app(redis_server, worker):
    with promise.producer(redis_server) as app:
        yield app


def maker(app, kinds):
    """``s("add", 1, b=2)``: the signature of the task of the next kind, `immutable` or with `options`."""
    kinds = itertools.cycle(kinds)

    def make(name, *args, immutable=False, options=None, **kwargs):
        return app.signature(f"{next(kinds)}.{name}", args, kwargs, immutable=immutable, options=options or {})

    return make


@pytest.fixture(params=["gpu", "cpu", "mixed"])
def s(app, request):
    return maker(app, KINDS if request.param == "mixed" else [request.param])


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def one(app, kind):
    """As `s`, of one kind only."""
    return maker(app, [kind])


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


# ---- chains


def test_a_chain_passes_each_value_on(s):
    result = (s("add", 2, 2) | s("add", 4) | s("add", 8)).apply_async()
    assert result.get(**GET) == 16
    assert (result.parent.get(**GET), result.parent.parent.get(**GET)) == (8, 4)
    assert list(result.collect()) == [(result, 16)]
    assert sorted(value for _, value in result.parent.parent.collect()) == [4, 8, 16]


def test_partials_take_the_parents_value_first_and_immutable_ones_do_not(s):
    first = s("add", 1, 1)
    assert (first | s("add", 5, immutable=True)).apply_async().get(**GET) == 15
    assert (s("same", 1) | s("add", b=2)).apply_async().get(**GET) == 3
    assert s("add", 4).apply_async((2,)).get(**GET) == 6
    assert s("add", 4).apply_async(kwargs={"b": 3}).get(**GET) == 7
    assert s("add", 1).clone(args=(7,), kwargs={}).apply_async().get(**GET) == 8
    assert first.clone().set(countdown=0).apply_async().get(**GET) == 2
    assert (~s("add", 8, 8)) == 16


def test_every_task_of_a_chain_knows_its_parent_and_root(s):
    result = (s("family") | s("family") | s("family")).apply_async()
    first, second, third = [each.get(**GET) for each in (result.parent.parent, result.parent, result)]
    assert first[:3] == [result.parent.parent.id, None, first[0]]
    assert second[:3] == [result.parent.id, first[0], first[0]]
    assert third[:3] == [result.id, second[0], first[0]]


def test_a_failure_ends_the_chain(s, tmp_path):
    ran = tmp_path / "ran"
    result = (s("add", 1, 1) | s("fails", code=7) | s("notes", str(ran)) | s("notes", str(ran))).apply_async()
    assert failure(result)[:2] == ("PromiseError", [7, "because"])
    wait_for(lambda: result.parent.state == "FAILURE", "what follows to be marked, so nobody waits for it")
    assert result.parent.parent.parent.get(**GET) == 2
    assert lines(ran) == []


def test_links_and_their_order(s, tmp_path):
    """Callbacks run with the value, each once; a chain's next task, too."""
    paths = [tmp_path / str(number) for number in range(3)]
    signature = s("add", 20, 2)
    signature.link(s("notes", str(paths[0])))
    signature.link(s("notes", "set", str(paths[1]), immutable=True))
    result = (signature | s("notes", str(paths[2]))).apply_async()
    assert result.get(**GET) == 22
    wait_for(lambda: all(lines(path) for path in paths), "all callbacks")
    assert [lines(path) for path in paths] == [["22"], ["set"], ["22"]]
    assert len(result.parent.children) >= 2


# ---- groups


def test_a_group_gives_its_values_in_order(s):
    result = group(s("add", number, number) for number in range(20)).apply_async()
    assert result.get(**GET) == [2 * number for number in range(20)]
    assert result.successful() and result.ready() and not result.failed() and not result.waiting()
    assert result.completed_count() == 20
    assert result.join_native(**GET) == result.join(**GET)


def test_a_group_with_a_failure(s):
    result = group(s("add", 1, 1), s("fails", code=3), s("add", 2, 2)).apply_async()
    with pytest.raises(Exception, match="because"):
        result.get(**GET)
    first, error, third = result.get(propagate=False, **GET)
    assert (first, third, list(error.args)) == (2, 4, [3, "because"])
    wait_for(result.ready, "the others")
    assert result.failed() and not result.successful() and result.completed_count() == 2


def test_a_link_of_a_group_and_a_link_error_of_a_group(app, one, kind, tmp_path):
    linked, errors = tmp_path / "linked", tmp_path / "errors"
    of_group = group([one("add", 1, 1), one("add", 2, 2)], app=app)
    of_group.link(one("notes", "linked", str(linked)))
    assert of_group.apply_async().get(**GET) == [2, 4]
    failing = group([one("fails", code=1), one("fails", code=2)], app=app)
    failing.link_error(app.signature(f"{kind}.errback", kwargs={"path": str(errors)}))
    result = failing.apply_async()
    wait_for(lambda: len(lines(errors)) == 2, "an errback of each task")
    assert sorted(line.split()[1:] for line in lines(errors)) == [["PromiseError", str(n), "True"] for n in (1, 2)]
    assert sorted(line.split()[0] for line in lines(errors)) == sorted(each.id for each in result)
    wait_for(lambda: lines(linked), "the callback")
    assert lines(linked) == ["linked"], "linked to the first task only"


# ---- chords


def test_chords(app, s):
    adds = [s("add", number, number) for number in range(30)]
    big = chord(adds, app=app)(s("total"))
    piped = (group(adds[:3]) | s("total", plus=100)).apply_async()
    single = chord([s("add", 3, 4)], app=app)(s("total"))
    empty = chord([], app=app)(s("total", plus=5))
    long = (group(adds[:3]) | s("total") | s("add", 1) | s("add", 1)).apply_async()
    into_group = (s("same", 5) | group(s("add", 1), s("add", 2)) | s("total")).apply_async()
    body_is_group = chord(adds[:3], app=app)(group([s("total"), s("total", plus=1)], app=app))
    assert big.get(**GET) == 2 * sum(range(30))
    assert piped.get(**GET) == 106
    assert single.get(**GET) == 7
    assert empty.get(**GET) == 5
    assert long.get(**GET) == 8
    assert into_group.get(**GET) == 13
    assert body_is_group.get(**GET) == [6, 7]
    assert big.parent.get(**GET) == [2 * number for number in range(30)]


def test_nested(app, s):
    """Groups in groups, chains in headers, chords in chords, chords in chains, groups after groups."""
    pairs = group([group([s("add", 1, 1), s("add", 2, 2)], app=app), s("add", 3, 3)], app=app).apply_async()
    chains = chord([s("add", 1, 1) | s("add", 1), s("add", 2, 2) | s("add", 2)], app=app)(s("total"))
    inner = chord([s("add", 1, 1), s("add", 2, 2)], s("total"), app=app)
    chords = chord([inner, s("add", 4)], app=app)(s("total"))
    in_chain = (s("same", 1) | group(s("add", 1), s("add", 2)) | s("total") | s("add", 100)).apply_async()
    twice = (s("same", 1) | group(s("add", 1), s("add", 2)) | group(s("total"), s("total", plus=1))).apply_async()
    group_of_chains = group([s("add", 1) | s("add", 1), s("add", 2) | s("add", 2)], app=app).apply_async()
    chain_of_chains = chain(chain(s("add", 1, 1), s("add", 1)), chain(s("add", 1), s("add", 1))).apply_async()
    deep = chord([group([s("add", 1, 0), s("add", 2, 0)], app=app) | s("total"), s("add", 3, 0)], app=app)(s("total"))
    assert pairs.get(**GET) == [2, 4, 6]
    assert chains.get(**GET) == 9
    assert chords.get(**GET) == 20
    assert in_chain.get(**GET) == 105
    assert twice.get(**GET) == [5, 6]
    assert group_of_chains.get(**GET) == [12, 14]
    assert chain_of_chains.get(**GET) == 5
    assert deep.get(**GET) == 6


def test_members_of_a_chord_know_it(app, one):
    result = chord([one("family"), one("family")], app=app)(one("same"))
    seen = result.get(**GET)
    assert [row[0] for row in seen] == [each.id for each in result.parent]
    assert {row[3] for row in seen} == {result.parent.id}


def chord_error(result):
    """What a body that could not run has as its outcome; `get` would raise the header's own error."""
    wait_for(result.ready, "the body's outcome")
    assert result.state == "FAILURE" and isinstance(result.result, ChordError)
    return str(result.result)


@pytest.mark.parametrize("how", ["fails", "too_long"])
def test_a_chord_with_a_failing_header(app, one, kind, how, tmp_path):
    """The body never runs and fails with ChordError; its errbacks are called; a hard limit counts as well."""
    errors, olds, ran = tmp_path / "errors", tmp_path / "olds", tmp_path / "ran"
    body = one("notes", str(ran))
    body.on_error(app.signature(f"{kind}.errback", kwargs={"path": str(errors)}))
    body.on_error(app.signature(f"{kind}.old_errback", kwargs={"path": str(olds)}))
    result = chord([one("add", 1, 1), one(how), one("add", 2, 2)], app=app)(body)
    cause = "PromiseError(1, 'because')" if how == "fails" else "TimeLimitExceeded(0.5"
    assert chord_error(result).startswith(f"Dependency {result.parent[1].id} raised {cause}")
    wait_for(lambda: lines(errors) and lines(olds), "both errbacks")
    assert [line.split()[:2] for line in lines(errors)] == [[result.id, "ChordError"]]
    assert lines(olds) == [result.id]
    assert [result.parent[number].get(**GET) for number in (0, 2)] == [2, 4]
    assert lines(ran) == []


def test_a_chord_whose_member_is_revoked(app, one, tmp_path):
    gate, notes = tmp_path / "gate", tmp_path / "notes"
    result = chord([one("same", 1), one("holds", str(gate), str(notes))], app=app)(one("same"))
    held = result.parent[1]
    wait_for(lambda: lines(notes), "the body to run")  # with one actor it may be the first of the two
    app.control.revoke(held.id, terminate=True)
    assert chord_error(result).startswith(f"Dependency {held.id} raised TaskRevokedError")
    assert result.parent[0].get(**GET) == 1


def test_a_failing_body_calls_its_errback(app, one, kind, tmp_path):
    errors = tmp_path / "errors"
    body = one("fails", code=9)
    body.link_error(app.signature(f"{kind}.errback", kwargs={"path": str(errors)}))
    result = chord([one("add", 1, 1), one("add", 2, 2)], app=app)(body)
    assert failure(result)[:2] == ("PromiseError", [9, "because"])
    wait_for(lambda: lines(errors), "the errback")
    assert lines(errors) == [f"{result.id} PromiseError 9 True"]


def test_errbacks_of_a_chain_are_called_once(app, one, kind, tmp_path):
    errors, olds = tmp_path / "errors", tmp_path / "olds"
    workflow = one("add", 1, 1) | one("fails", code=4) | one("add", 1)
    workflow.link_error(app.signature(f"{kind}.errback", kwargs={"path": str(errors)}))
    workflow.link_error(app.signature(f"{kind}.old_errback", kwargs={"path": str(olds)}))
    result = workflow.apply_async()
    assert failure(result)[0] == "PromiseError"
    wait_for(lambda: lines(errors) and lines(olds), "both errbacks")
    assert one("same", 1).apply_async().get(**GET) == 1
    assert lines(errors) == [f"{result.parent.id} PromiseError 4 True"]
    assert lines(olds) == [result.parent.id]


def test_a_gpu_tasks_errback_may_be_a_cpu_task_and_the_reverse(app, tmp_path):
    for kind, other in (KINDS, KINDS[::-1]):
        errors = tmp_path / kind
        errback = app.signature(f"{other}.errback", kwargs={"path": str(errors)})
        result = app.signature(f"{kind}.fails", kwargs={"code": 5}).apply_async(link_error=errback)
        wait_for(lambda errors=errors: lines(errors), "the errback")
        assert lines(errors) == [f"{result.id} PromiseError 5 True"]


def test_a_task_may_be_its_own_errback(one, kind, tmp_path):
    errors = tmp_path / "errors"
    signature = one("own_errback", path=str(errors))
    result = signature.clone().apply_async(link_error=signature)
    assert failure(result)[:2] == ("PromiseError", ["as task", "because"])
    wait_for(lambda: lines(errors), "the errback")
    assert lines(errors) == [f"{result.id} as task"]
    assert one("same", 1).apply_async().get(**GET) == 1


def test_a_payload_that_does_not_fit_fails_its_workflow(app, tmp_path):
    """GPU only: the body never runs, and all that waits for it is told."""
    one, errors, ran = maker(app, ["gpu"]), tmp_path / "errors", tmp_path / "ran"
    signature = one("typed", "no number")
    in_chain = (signature.clone() | one("notes", str(ran))).apply_async()
    in_chord = chord([one("same", 1), signature.clone()], app=app)(one("notes", str(ran)))
    signature.apply_async(link_error=one("old_errback", path=str(errors)))
    assert failure(in_chain)[0] == "PayloadInvalid"
    assert chord_error(in_chord).startswith(f"Dependency {in_chord.parent[1].id} raised PayloadInvalid")
    wait_for(lambda: lines(errors), "the errback")
    assert lines(ran) == []


# ---- replace and add_to_chord in chords


def test_replace_in_a_chord(app, one):
    """A member is replaced by a task, a chain, a group, a chord; the chord waits for what took its place."""
    task, group_ = one("add", 1, 1), group([one("add", 2, 2), one("add", 3, 3)], app=app)
    by_task = chord([one("replaces", task), one("same", 1)], app=app)(one("same"))
    by_chain = chord([one("replaces", one("add", 1, 1) | one("add", 5)), one("same", 1)], app=app)(one("same"))
    by_group = chord([one("replaces", group_), one("same", 1)], app=app)(one("same"))
    by_chord = chord([one("replaces", group_ | one("total")), one("same", 1)], app=app)(one("same"))
    twice = chord([one("replaces", one("replaces", task)), one("same", 1)], app=app)(one("same"))
    body = chord([one("same", 1), one("same", 2)], app=app)(one("replaces", one("add", 7, 7)))
    assert by_task.get(**GET) == [2, 1]
    assert by_chain.get(**GET) == [7, 1]
    assert by_group.get(**GET) == [[4, 6], 1]
    assert by_chord.get(**GET) == [10, 1]
    assert twice.get(**GET) == [2, 1]
    assert body.get(**GET) == 14


def test_add_to_chord(app, one):
    """A member adds another member; the body gets its value, too."""
    for lazy in (False, True):
        header = [one("adds_to_chord", 1, one("add", 20, 20), lazy), one("same", 3)]
        result = chord(header, app=app)(one("same"))
        assert sorted(result.get(**GET)) == [1, 3, 40]


# ---- map, starmap, chunks


def test_map_starmap_and_chunks_run_where_the_task_runs(app, one, kind):
    mapped = xmap(one("same"), [1, 2, 3], app=app).apply_async()
    pids = xmap(one("pid"), [1, 2], app=app).apply_async().get(**GET)
    stars = xstarmap(one("pair"), [[1, 2], [3, 4]], app=app).apply_async().get(**GET)
    parts = chunks(one("pair"), [(number, number) for number in range(7)], 3, app=app).apply_async()
    after = (chunks(one("add"), [(1, 1), (2, 2), (3, 3)], 2, app=app).group() | one("same")).apply_async()
    assert mapped.get(**GET) == [1, 2, 3]
    assert [row[1:] for row in stars] == [[1, 2], [3, 4]]
    rows = parts.get(**GET)
    assert [[row[1:] for row in part] for part in rows] == [
        [[0, 0], [1, 1], [2, 2]], [[3, 3], [4, 4], [5, 5]], [[6, 6]],
    ]  # fmt: skip
    assert after.get(**GET) == [[2, 4], [6]]
    ran_in = {*pids, *[row[0] for row in stars], *[row[0] for part in rows for row in part]}
    stats = promise.gpu_stats(app)
    executor = {stats["actors"][0]["executor_pid"]}
    assert ran_in == executor if kind == "gpu" else not ran_in & (executor | {stats["driver"]})
    assert failure(xmap(one("fails"), [1, 2], app=app).apply_async())[:2] == ("PromiseError", [1, "because"])


# ---- stamps


class Visitor(StampingVisitor):
    """Stamps each signature with its place."""

    def on_signature(self, sig, **headers):
        return {"place": f"task {sig.task.partition('.')[2]}", "stamped_headers": ["place"]}

    def on_group_start(self, group, **headers):
        return {"in_group": True, "stamped_headers": ["in_group"]}

    def on_chain_start(self, chain, **headers):
        return {"in_chain": True, "stamped_headers": ["in_chain"]}

    def on_callback(self, callback, **headers):
        return {"called_back": True}


def test_stamps_are_seen_in_the_body(app, s):
    single = s("stamps")
    single.stamp(colour="red", size=[1, 2])
    workflow = s("stamps") | s("stamps")
    workflow.stamp(Visitor())
    of_group = group([s("stamps"), s("stamps")], app=app)
    of_group.stamp(visitor=Visitor())
    of_chord = chord([s("stamps"), s("stamps")], s("stamps"), app=app)
    of_chord.stamp(visitor=Visitor())
    linked = s("same", 1)
    linked.link(s("stamps"))
    linked.stamp(Visitor())
    results = [each.apply_async() for each in (single, workflow, of_group, of_chord, linked)]
    assert results[0].get(**GET) == [["colour", "size"], {"colour": "red", "size": [1, 2]}]
    in_chain = [["in_chain", "place"], {"in_chain": True, "place": "task stamps"}]
    assert [results[1].parent.get(**GET), results[1].get(**GET)] == [in_chain, in_chain]
    assert results[2].get(**GET) == [[["in_group", "place"], {"in_group": True, "place": "task stamps"}]] * 2
    assert all("place" in names for names, _ in results[3].parent.get(**GET))
    assert results[3].get(**GET)[1]["place"] == "task stamps"
    assert results[4].get(**GET) == 1
    wait_for(lambda: results[4].children, "the callback")
    assert results[4].children[0].get(**GET)[0] == ["called_back", "place"]


# ---- ending workflows


def test_revoke_of_a_group_ends_what_runs_and_what_waits(app, one, tmp_path):
    gate = tmp_path / "gate"
    notes = [tmp_path / str(number) for number in range(4)]
    result = group([one("holds", str(gate), str(path)) for path in notes], app=app).apply_async()
    wait_for(lambda: any(lines(path) for path in notes), "a body to run")
    result.revoke(terminate=True)
    for each in result:
        with pytest.raises(TaskRevokedError):
            each.get(**GET)
        assert each.state == "REVOKED"
    assert all("ends" not in lines(path) for path in notes)
    assert one("same", 1).apply_async().get(**GET) == 1


@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")  # by Celery's backend
def test_an_abortable_task_sees_that_it_is_aborted(app, one, tmp_path):
    started = tmp_path / "started"
    result = one("abortable", str(started)).apply_async()
    wait_for(lambda: lines(started), "the body to run")
    abortable = AbortableAsyncResult(result.id, app=app)
    assert not abortable.is_aborted()
    abortable.abort()
    assert wait_for(lambda: result.state == "SUCCESS", "the body to end by itself")
    assert result.get(**GET) == "aborted"
