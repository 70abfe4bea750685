"""Files and pictures inside messages, by reference and by URL; and stores that are away, full, slow or not allowed."""

import asyncio
import base64
import io
import json
import signal
import struct
import zlib

import numpy
import pytest
from celery.exceptions import SoftTimeLimitExceeded
from PIL import Image

from actors.data.blobs import InlineBytes
from bridge import data, errors
from bridge.settings import settings
from tests.apps.media import QUEUE
from tests.apps.media import app as media_app
from tests.support.services import RedisServer, Worker, wait_for
from tests.support.web import WebServer

GET = {"timeout": 60}
MIB = 1 << 20
LIMIT_BYTES = 8 * MIB
TIMEOUT_S = 1.0


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Redis for large data alone: tests stop and fill it."""
    server = RedisServer(tmp_path_factory.mktemp("store"), password="geheim")
    yield server
    server.client.close()
    server.kill_group()


@pytest.fixture(scope="module")
def web():
    server = WebServer()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files") / "public"
    folder.mkdir()
    (folder.parent / "secret").write_bytes(b"secret")
    (folder / "out").symlink_to(folder.parent / "secret")
    return folder


@pytest.fixture(scope="module")
def variables(store, web, folder):
    """What worker and producers are started with."""
    return {
        "BRIDGE_DATA_URL": store.url,
        "BRIDGE_DATA_ROOTS": json.dumps([f"file://{folder}", web.root]),
        "BRIDGE_DATA_LIMIT_BYTES": str(LIMIT_BYTES),
        "BRIDGE_DATA_TIMEOUT_S": str(TIMEOUT_S),
    }


@pytest.fixture(scope="module")
def worker(environment, variables, tmp_path_factory):
    process = Worker(
        tmp_path_factory.mktemp("media"), "-c", "1", "-n", "media@%h", "-Q", QUEUE, app="tests.apps.media:app",
        env={**environment, **variables},
    )  # fmt: skip
    yield process
    assert process.stop() == 0, process.output[-5000:]


@pytest.fixture(scope="module")
def app(redis_server, worker, variables):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        settings.cache_clear()
        data._stores_of.cache_clear()
        media_app.conf.update(broker_url=redis_server.url, result_backend=redis_server.url)
        media_app.set_current()
        yield media_app
        media_app.backend.result_consumer.stop()
        media_app.close()
    settings.cache_clear()
    data._stores_of.cache_clear()


@pytest.fixture
def send(app):
    return lambda name, *args: app.tasks[f"tests.apps.media.{name}"].apply_async(args)


def picture(width=60, height=40, file_format="PNG"):
    file = io.BytesIO()
    pixels = numpy.full((height, width, 3), 100, numpy.uint8)
    Image.fromarray(pixels).save(file, file_format)
    return file.getvalue()


def text(file):
    return base64.b64encode(file).decode()


def bomb():
    """A small file of 40000 x 40000 pixels, well compressed."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(MIB)))


PDF = b"%PDF-1.7 " + bytes(range(256))


def forms(file, web, folder):
    """One file in every form a message may carry."""
    web.files["file"] = file
    (folder / "file").write_bytes(file)
    ref = data.put_bytes(file)
    return {
        "base64": text(file),
        "envelope": {"kind": "bytes", "data": text(file)},
        "bytes": file,
        "reference": ref,
        "reference as JSON": json.loads(ref.model_dump_json()),
        "URL": f"{web.root}file",
        "URL as reference": {"kind": "blob", "url": f"{web.root}file", "size_bytes": len(file)},
        "file": f"file://{folder}/file",
    }


def test_a_file_in_every_form_is_the_same_bytes(send, web, folder):
    for file in (PDF, b"plain words"):
        results = {name: send("digest", form) for name, form in forms(file, web, folder).items()}
        expected = send("digest", text(file)).get(**GET)
        assert expected[:2] == ["bytes", len(file)]
        assert {name: result.get(**GET) for name, result in results.items()} == dict.fromkeys(results, expected)


def test_a_picture_in_every_form_is_the_same_pixels(send, web, folder):
    for file_format in ("PNG", "JPEG"):
        sent = forms(picture(file_format=file_format), web, folder)
        results = [send("brightness", form) for form in sent.values()]
        assert [each.get(**GET) for each in results] == [["numpy", "|u1", [40, 60, 3], 100.0]] * len(sent)
        results = [send("widths", form) for form in sent.values()]
        assert [each.get(**GET) for each in results] == [60] * len(sent)
        album = {"name": "all", "pictures": list(sent.values())}
        assert send("pixels_of", album).get(**GET) == 40 * 60 * 3 * len(sent)


REFUSED = {
    "no picture": ("brightness", text(PDF), errors.PayloadInvalid, "image: .*is neither PNG nor JPEG"),
    "no base64": ("brightness", "§§§", errors.PayloadInvalid, "image: .*not base64"),
    "base64 to its end": ("brightness", text(picture())[:-4] + "§§§§", errors.PayloadInvalid, "image: .*not base64"),
    "another type": ("brightness", [1], errors.PayloadInvalid, r"expected a picture .*found list"),
    "a bomb": ("brightness", text(bomb()), errors.PayloadInvalid, "image: .*at most 10000"),
    "too many pixels": (
        "brightness",
        text(picture(101, 100)),
        errors.PayloadInvalid,
        "101 x 100 pixels, at most 10000",
    ),
    "torn": ("brightness", text(picture()[:-30]), errors.PayloadInvalid, "image: .*cannot be read"),
    "another format": ("read", text(b"GIF89a"), errors.PayloadInvalid, "letter: .*the file is no PDF"),
    "too large": ("read", text(PDF * 10), errors.PayloadInvalid, r"letter: .*2\.6 KiB, at most 1000 B"),
    "a file outside": ("digest", "file:///etc/passwd", errors.DataRefused, "not below an allowed root"),
    "metadata of a cloud": ("digest", "http://169.254.169.254/latest", errors.DataRefused, "not below an allowed root"),
    "another Redis": ("digest", "redis://127.0.0.1:6379/0", errors.DataRefused, "is no reference to data in Redis"),
    "a chain": ("digest", "simplecache::file:///etc/passwd", errors.DataRefused, "not below an allowed root"),
}


@pytest.mark.parametrize(("name", "value", "error", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_names_the_reason(send, name, value, error, reason):
    with pytest.raises(error, match=reason):
        send(name, value).get(**GET)


def test_places_outside_the_roots_are_refused_however_they_are_written(send, web, folder):
    (folder / "file").write_bytes(PDF)
    for url in (
        f"file://{folder}/../secret", f"file://{folder}/out", f"file://{folder}/%2e%2e/secret", f"file://{folder}",
        f"file://localhost{folder}/file", f"{web.url}/private", f"{web.root}../private",
        web.root.replace("//", "//user:geheim@") + "file", f"{web.root}file?next=x",
    ):  # fmt: skip
        with pytest.raises(errors.DataRefused, match="not below an allowed root") as caught:
            send("digest", {"kind": "blob", "url": url}).get(**GET)
        assert "BRIDGE_DATA_ROOTS lists them" in str(caught.value) and "/secret" not in str(caught.value).replace(
            url, ""
        )
    assert not any("private" in path for path in web.asked)


TROUBLE = {
    "redirect": (errors.DataRefused, "redirect, which is not followed"),
    "missing": (errors.DataLost, "is not there"),
    "cut": (errors.DataCorrupt, "was cut off"),
    "endless": (errors.DataRefused, r"has more than 1000 B"),
    "huge": (errors.DataRefused, r"has more than 1000 B"),
    "stops": (errors.StoreUnavailable, "timed out"),
    "broken": (errors.StoreUnavailable, "answers 500"),
}


def test_web_servers_that_misbehave_cost_their_task_alone(send, web):
    other = WebServer()
    other.files["file"], web.elsewhere = PDF, f"{other.root}file"
    try:
        results = {name: send("read", web.root + name) for name in TROUBLE}
        for name, result in results.items():
            error, reason = TROUBLE[name]
            with pytest.raises(error, match=reason):
                result.get(**GET)
        assert other.asked == []
    finally:
        other.stop()
    assert send("read", PDF).get(**GET) == len(PDF)


def test_a_soft_limit_ends_the_wait_for_a_slow_server(send, web):
    """No piece of it is late; the limit is the task's own error, not the server's."""
    with pytest.raises(SoftTimeLimitExceeded):
        send("soft", f"{web.root}streams").get(**GET)


def test_results_by_reference(send, store):
    result = send("twice", PDF)
    assert result.get(**GET) == {"name": "twice", "file": PDF * 2}
    kept = json.loads(media_app.backend.client.get(f"celery-task-meta-{result.id}"))["result"]["file"]
    assert kept["__type__"] == "bridge.blob" and kept["__value__"]["kind"] == "blob"
    assert data.get(kept["__value__"]) == PDF * 2
    assert send("echo", PDF).get(**GET) == PDF  # without the mark they travel in the result


def test_chains_hand_references_on(app):
    s = {name: app.tasks[f"tests.apps.media.{name}"].s for name in ("echo", "on_cpu", "digest")}
    ref = data.put_bytes(PDF)
    found = (s["echo"](ref) | s["on_cpu"]()).apply_async().get(**GET)
    assert found == ["bytes", len(PDF)]
    assert s["on_cpu"](ref).apply_async().get(**GET) == ["bytes", len(PDF)]


def test_a_producer_may_put_into_a_shared_folder(send, folder, monkeypatch):
    monkeypatch.setenv("BRIDGE_DATA_URL", f"file://{folder}/put")
    settings.cache_clear()
    data._stores_of.cache_clear()
    try:
        array, file = data.put(numpy.ones((2, 3))), data.put_bytes(PDF)
        assert send("total", array).get(**GET) == 6 and send("read", file).get(**GET) == len(PDF)
        for each in (array, file):
            data.delete(each)
        assert list((folder / "put").iterdir()) == []
    finally:
        monkeypatch.undo()
        settings.cache_clear()
        data._stores_of.cache_clear()
    with pytest.raises(errors.DataLost, match="is not there"):
        send("read", file).get(**GET)


def test_in_an_event_loop(send):
    async def both():
        return await data.aget(await data.aput_bytes(PDF))

    assert asyncio.run(both()) == PDF


def test_files_meant_for_one_task_go_and_no_others(send, store, folder):
    before = set(store.client.keys())
    assert send("digest", data.put_bytes(PDF, once=True)).get(**GET)[1] == len(PDF)
    with pytest.raises(errors.PayloadInvalid):
        send("brightness", data.put_bytes(PDF, once=True)).get(**GET)
    wait_for(lambda: set(store.client.keys()) <= before, "all of it to be deleted")
    (folder / "precious").write_bytes(PDF)
    ref = {"kind": "blob", "url": f"file://{folder}/precious", "size_bytes": len(PDF), "once": True}
    assert send("digest", ref).get(**GET)[1] == len(PDF)
    lie = {"kind": "blob", "url": "redis:" + "a" * 32, "size_bytes": 1 << 60, "once": True}
    with pytest.raises(errors.DataRefused):
        send("digest", lie).get(**GET)
    wait_for(lambda: send("digest", data.put_bytes(PDF, once=True)).get(**GET), "the driver to go on")
    wait_for(lambda: set(store.client.keys()) <= before, "the last one to be deleted")  # after both others, in order
    assert (folder / "precious").exists()


def test_the_limit_holds_on_both_sides(send, store):
    before = set(store.client.keys())
    with pytest.raises(errors.DataRefused, match="BRIDGE_DATA_LIMIT_BYTES"):
        data.put_bytes(bytes(LIMIT_BYTES + 1))
    with pytest.raises(errors.DataRefused, match="BRIDGE_DATA_LIMIT_BYTES"):
        send("twice", bytes(LIMIT_BYTES // 2 + 1)).get(**GET)
    lie = {"kind": "ref", "url": "redis:" + "a" * 32, "dtype": "|u1", "shape": [1 << 40], "size_bytes": 1 << 40}
    with pytest.raises(errors.DataRefused, match="BRIDGE_DATA_LIMIT_BYTES"):
        send("total", lie).get(**GET)
    assert set(store.client.keys()) <= before


def test_a_store_that_hangs_is_a_clear_error_and_is_back_for_the_next_run(send, store):
    ref = data.put_bytes(PDF)
    store.signal(signal.SIGSTOP)
    try:
        for name, value in (("digest", ref), ("twice", PDF)):
            with pytest.raises(errors.StoreUnavailable, match="Redis did not") as caught:
                send(name, value).get(**GET)
            assert "geheim" not in str(caught.value)
        with pytest.raises(errors.StoreUnavailable):
            data.put_bytes(PDF)
        waiting = [send("patient", ref), send("patient_result", 1000)]
        wait_for(lambda: all(each.state == "RETRY" for each in waiting), "both to be sent again")
        assert send("read", PDF).get(**GET) == len(PDF)  # who needs no store is served
    finally:
        store.signal(signal.SIGCONT)
    assert [waiting[0].get(**GET), waiting[1].get(**GET)] == [len(PDF), bytes(1000)]


def test_a_full_store_keeps_no_part_and_is_a_clear_error(send, store):
    before = set(store.client.keys())
    store.client.config_set("maxmemory", store.client.info("memory")["used_memory"] + 6 * MIB)
    size = 6 * MIB
    try:
        for result in (send("twice", bytes(size // 2)), send("numbers", size // 8)):
            with pytest.raises(errors.StoreUnavailable, match=r"Redis did not take .*OutOfMemory"):
                result.get(**GET)
        with pytest.raises(errors.StoreUnavailable, match=r"Redis did not take .*OutOfMemory"):
            data.put(numpy.zeros(size // 8))
        assert set(store.client.keys()) <= before
        waiting = send("patient_result", size)
        wait_for(lambda: waiting.state == "RETRY", "it to be sent again")
    finally:
        store.client.config_set("maxmemory", 0)
    assert waiting.get(**GET) == bytes(size)


def test_nothing_of_a_file_is_in_the_log(send, worker):
    secret = b"%PDF-1.7 this is nobody's business"
    send("read", secret).get(**GET)
    send("read", InlineBytes.of(secret)).get(**GET)
    with pytest.raises(errors.PayloadInvalid):
        send("brightness", text(secret)).get(**GET)
    assert "nobody's business" not in worker.output and text(secret)[:40] not in worker.output
    assert "geheim" not in worker.output
