"""Stores of large data, for real: a Redis that stops, fills and dies; files; a web server that misbehaves."""

import os
import resource
import signal
import ssl

import numpy
import pytest
import redis
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from fsspec.implementations.local import LocalFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from actors.contract import StoreConfig
from actors.data.arrays import ArrayRef, Inline
from actors.data.blobs import BlobRef
from actors.data.stores import CHUNK_BYTES, Stores
from actors.executor.device import CpuDevice
from bridge.errors import DataCorrupt, DataLost, DataRefused, StoreUnavailable
from tests.support.services import RedisServer, free_port
from tests.support.tls import Certificate, TlsProxy
from tests.support.web import WebServer

MIB = 1 << 20
APP = Celery("stores", broker="memory://", set_as_current=False)
ARRAY = numpy.arange(6.0).reshape(2, 3)
#: Short for what is expected to hang, long for a machine under load.
SHORT_S, LONG_S = 0.3, 20.0


def stores(url=None, *roots, **changes):
    return Stores(APP, StoreConfig(url, tuple(map(str, roots)), **{"timeout_s": LONG_S, **changes}))


# ---- Redis


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Redis that tests may stop and fill."""
    server = RedisServer(tmp_path_factory.mktemp("data"))
    yield server
    server.client.close()
    server.kill_group()


@pytest.fixture
def in_redis(server):
    server.client.flushall()
    return stores(server.url)


KINDS = st.sampled_from("?bhilqBHILQefdgFDG").flatmap(
    lambda code: st.sampled_from("<>").map(lambda order: numpy.dtype(code).newbyteorder(order))
)


@given(
    array=npst.arrays(KINDS, npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)), turned=st.booleans()
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_array_comes_back_as_it_was(server, array, turned):
    """By Redis, by envelope and as a device receives it, also transposed and in the other byte order."""
    array = array.T if turned else array
    store = stores(server.url)
    ref = ArrayRef.model_validate_json(store.put(array).model_dump_json())
    received = CpuDevice("").receive(store.pieces(ref), ref.shape, ref.dtype)
    for found in (store.get(ref), Inline.model_validate_json(Inline.of(array).model_dump_json()).get(), received):
        assert found.shape == array.shape
        assert found.dtype == array.dtype or (found is received and found.dtype == array.dtype.newbyteorder("="))
        numpy.testing.assert_array_equal(found, array)


@given(data=st.binary(max_size=100))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_all_bytes_come_back(server, data):
    store = stores(server.url)
    assert store.get(store.put_bytes(data)) == data


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES])
def test_keys_of_a_size(in_redis, server, size):
    data = os.urandom(size)
    ref = in_redis.put_bytes(data)
    assert (ref.size_bytes, len(server.client.keys())) == (size, max(1, -(-size // CHUNK_BYTES)))
    assert in_redis.get(ref) == data
    in_redis.delete(ref)
    assert server.client.keys() == []
    in_redis.delete(ref)  # as often as one likes
    with pytest.raises(DataLost):
        in_redis.get(ref)


def test_a_part_that_is_gone(in_redis, server):
    ref = in_redis.put_bytes(bytes(2 * CHUNK_BYTES))
    server.client.delete(server.client.keys("*-1")[0])
    with pytest.raises(DataLost, match="is not in Redis"):
        in_redis.get(ref)


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize(
    ("instead", "error", "text"),
    [
        (bytes(47), DataCorrupt, "48 bytes"),
        (bytes(49), DataCorrupt, "48 bytes"),
        (bytes(48), DataCorrupt, "another checksum"),
        (b"", DataCorrupt, "48 bytes"),
        (None, DataLost, "is not in Redis"),
        (["a list"], StoreUnavailable, "WRONGTYPE"),
    ],
    ids=["shorter", "longer", "other bytes", "empty", "nothing", "a list"],
)
def test_what_is_there_instead(server, protocol, instead, error, text):
    """The same as with redis-py's own reading, and what is said on that connection is not the next one's answer."""
    server.client.flushall()
    in_redis = stores(f"{server.url}?protocol={protocol}")
    ref, other = in_redis.put(ARRAY), in_redis.put(2 * ARRAY)
    (key,) = server.client.keys(f"*{ref.url.partition(':')[2]}*")
    server.client.delete(key)
    if isinstance(instead, list):
        server.client.rpush(key, *instead)
    elif instead is not None:
        server.client.set(key, instead)
    for _ in range(2):
        with pytest.raises(error, match=text):
            in_redis.get(ref)
        assert (in_redis.get(other) == 2 * ARRAY).all()


@pytest.fixture(scope="module")
def with_tls(server, tmp_path_factory):
    """The same Redis behind TLS, as a URL."""
    folder = tmp_path_factory.mktemp("tls")
    authority = Certificate(folder, "authority")
    proxy = TlsProxy(Certificate(folder, "redis", authority), server.port)
    yield f"rediss://localhost:{proxy.port}/0?ssl_cert_reqs=required&ssl_ca_certs={authority.file}"
    proxy.stop()


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("where", ["url", "backend", "broker"])
def test_bytes_are_not_copied_on_their_way(server, with_tls, where, tls, monkeypatch):
    """Neither redis-py's packer in C nor its parser sees them; both take copies, which are most of what 1 MiB costs."""
    url = with_tls if tls else server.url
    app = Celery(
        broker=url if where == "broker" else "memory://",
        backend=url if where == "backend" else None,
        set_as_current=False,
    )
    in_redis = Stores(app, StoreConfig(url if where == "url" else None, (), timeout_s=LONG_S))
    sent = []
    send = redis.Connection.send_packed_command

    def sending(self, pieces, *args, **kwargs):
        sent.extend(pieces)
        send(self, pieces, *args, **kwargs)

    monkeypatch.setattr(redis.Connection, "send_packed_command", sending)
    array = numpy.arange(3 * CHUNK_BYTES // 16)
    ref = in_redis.put(array)
    views = [each for each in sent if isinstance(each, memoryview)]
    assert [each.nbytes for each in views] == [CHUNK_BYTES, CHUNK_BYTES // 2]
    assert all(numpy.shares_memory(numpy.frombuffer(each, numpy.uint8), array) for each in views)
    sent.clear()
    assert (in_redis.get(ref) == array).all()
    assert not any(b"GET" in each for each in sent)


def test_a_connection_that_has_gone_meanwhile_is_made_anew(in_redis, server):
    ref = in_redis.put(ARRAY)
    for _ in range(2):
        server.client.client_kill_filter(_type="normal", skipme=True)
        assert (in_redis.get(ref) == ARRAY).all()


def test_the_limit_holds_on_both_sides(server):
    large = stores(server.url).put(numpy.zeros(MIB // 8 + 1))
    small = stores(server.url, limit_bytes=MIB)
    for what in (
        lambda: small.put(numpy.zeros(MIB // 8 + 1)),
        lambda: small.put_bytes(bytes(MIB + 1)),
        lambda: small.get(large),
        lambda: small.pieces(large),  # at once, before anybody makes room for it
        lambda: small.delete(large),
    ):
        with pytest.raises(DataRefused, match=r"1\.0 MiB, more than BRIDGE_DATA_LIMIT_BYTES allows"):
            what()
    assert small.get(small.put_bytes(bytes(MIB))) == bytes(MIB)


def test_a_reference_that_lies_about_its_size_costs_nothing(in_redis):
    """It would be a list of 10**11 keys, or as much memory, in whoever reads or deletes it."""
    for ref in (
        ArrayRef(url="redis:" + "a" * 32, dtype="|u1", shape=(1 << 60,), size_bytes=1 << 60, once=True),
        BlobRef(url="redis:" + "a" * 32, size_bytes=1 << 60, once=True),
    ):
        for what in (in_redis.delete, in_redis.get, in_redis.pieces):
            with pytest.raises(DataRefused, match="BRIDGE_DATA_LIMIT_BYTES"):
                what(ref)
    with pytest.raises(DataRefused, match="tells their size_bytes"):
        in_redis.get(BlobRef(url="redis:" + "a" * 32))


def test_a_redis_that_hangs_is_waited_for_once_and_serves_again(server):
    store = stores(server.url, timeout_s=SHORT_S)
    ref = store.put(ARRAY)

    def connections():
        return server.client.info("stats")["total_connections_received"]

    before = connections()
    server.signal(signal.SIGSTOP)
    try:
        for what in (lambda: store.put(ARRAY), lambda: store.get(ref), lambda: store.delete(ref)):
            with pytest.raises(StoreUnavailable, match="Redis did not"):
                what()
    finally:
        server.signal(signal.SIGCONT)
    assert connections() - before <= 3  # two as a rule; second tries of each would make five, and wait as long again
    assert (store.get(ref) == ARRAY).all()


@pytest.mark.parametrize("kind", ["array", "bytes"])
def test_a_full_redis_keeps_no_part_of_what_it_has_not_taken(in_redis, server, kind):
    put = in_redis.put_bytes if kind == "bytes" else in_redis.put
    data = bytes(8 * CHUNK_BYTES) if kind == "bytes" else numpy.zeros(CHUNK_BYTES)
    kept = in_redis.put(ARRAY)
    room = server.client.info("memory")["used_memory"] + 4 * CHUNK_BYTES
    server.client.config_set("maxmemory", room)
    try:
        with pytest.raises(StoreUnavailable, match=r"Redis did not take 8\.0 MiB: OutOfMemory"):
            put(data)
        assert len(server.client.keys()) == 1
        assert (in_redis.get(kept) == ARRAY).all()
    finally:
        server.client.config_set("maxmemory", 0)
    in_redis.get(put(data))


def test_a_redis_that_is_gone_and_comes_back(tmp_path):
    port = free_port()
    first = RedisServer(tmp_path, password="geheim", port=port)
    store = stores(first.url)
    store.put(ARRAY)
    first.kill_group()
    for what in (lambda: store.put(ARRAY), lambda: stores(first.url).put(ARRAY)):
        with pytest.raises(StoreUnavailable, match=r"refused|onnection") as caught:
            what()
        assert "geheim" not in str(caught.value)
    second = RedisServer(tmp_path, password="geheim", port=port)
    try:
        assert (store.get(store.put(ARRAY)) == ARRAY).all()
        with pytest.raises(StoreUnavailable, match="Redis did not take") as caught:
            stores(second.url.replace("geheim", "falsch")).put(ARRAY)
        assert "falsch" not in str(caught.value)
    finally:
        second.kill_group()


def test_an_app_without_redis_says_what_to_set():
    with pytest.raises(StoreUnavailable, match="set BRIDGE_DATA_URL"):
        stores().put(ARRAY)


# ---- files


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.mark.parametrize("url", ["file://{}", "file://{}/", "file://{}/deeper", "memory://bucket"])
def test_files_there_and_back(home, url):
    store = stores(url.format(home))
    array, file = store.put(ARRAY), store.put_bytes(b"1234")
    assert array.url.startswith(url.format(home)) and array.expires_at is None
    assert (store.get(array) == ARRAY).all() and store.get(file) == b"1234"
    for each in (array, file):
        store.delete(each)
        store.delete(each)
        with pytest.raises(DataLost, match="is not there"):
            store.get(each)


def test_a_link_to_the_root_is_fine_and_links_out_of_it_are_not(home, tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "alias").symlink_to(home)
    (home / "out").symlink_to(tmp_path / "secret")
    (home / "up").symlink_to(tmp_path)
    (home / "in").symlink_to(home / "file")
    (home / "file").write_bytes(b"1234")
    store = stores(None, f"file://{tmp_path}/alias")
    assert store.get(BlobRef(url=f"file://{tmp_path}/alias/file")) == b"1234"
    assert store.get(BlobRef(url=f"file://{home}/in")) == b"1234"
    for path in ("out", "up/secret", "../secret", "up/home/../secret"):
        with pytest.raises(DataRefused, match="not below an allowed root"):
            store.get(BlobRef(url=f"file://{home}/{path}"))


def test_only_what_was_put_is_ever_deleted(home, tmp_path):
    """A message that says `once` of a file below a readable root must not delete it."""
    (tmp_path / "shared").mkdir()
    precious = tmp_path / "shared" / "precious"
    precious.write_bytes(b"1234")
    ref = BlobRef(url=f"file://{precious}", size_bytes=4, once=True)
    for store in (stores(f"file://{home}", f"file://{precious.parent}"), stores(None, f"file://{precious.parent}")):
        assert store.get(ref) == b"1234"
        for url in (ref.url, f"file://{home}/../shared/precious"):
            with pytest.raises(DataRefused):
                store.delete(ref.model_copy(update={"url": url}))
    assert precious.exists()


def test_files_that_are_not_what_their_reference_says(home):
    store = stores(f"file://{home}")
    ref = store.put_bytes(b"12345678")
    path = home / ref.url.rpartition("/")[2]
    path.write_bytes(b"1234")
    with pytest.raises(DataCorrupt, match="has 4 bytes, and the reference says 8"):
        store.get(ref)
    path.write_bytes(b"12345679")
    with pytest.raises(DataCorrupt, match="another checksum"):
        store.get(ref)
    unknown = BlobRef(url=ref.url)
    assert store.get(unknown) == b"12345679" == store.get(unknown, 8)
    with pytest.raises(DataRefused, match="has more than 7 B"):
        store.get(unknown, 7)


def test_what_is_no_file_is_not_there(home):
    """A named pipe would be waited for until somebody writes."""
    os.mkfifo(home / "pipe")
    (home / "folder").mkdir()
    (home / "file").touch()
    for name in ("pipe", "folder", "none", "file/below"):
        with pytest.raises(DataLost, match="is not there"):
            stores(None, f"file://{home}").get(BlobRef(url=f"file://{home}/{name}"))


def test_a_place_that_cannot_be_written_to(home):
    (home / "file").touch()
    with pytest.raises(StoreUnavailable, match="there is no such folder or bucket"):
        stores(f"file://{home}/file/below").put(ARRAY)


def test_a_soft_limit_within_a_file_system_is_no_fault_of_it(home, monkeypatch):
    def interrupted(*_):
        raise SoftTimeLimitExceeded

    monkeypatch.setattr(LocalFileSystem, "info", interrupted)
    with pytest.raises(SoftTimeLimitExceeded):
        stores(None, f"file://{home}").get(BlobRef(url=f"file://{home}/file"))


def test_a_full_disk_keeps_no_part(home):
    store, before = stores(f"file://{home}"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
    try:
        with pytest.raises(StoreUnavailable, match="File too large"):
            store.put_bytes(bytes(2 * MIB))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(home.iterdir()) == []


def test_no_text_names_the_roots_or_places_of_the_machine(home, tmp_path):
    (tmp_path / "alias").symlink_to(home)
    store = stores(None, f"file://{tmp_path}/alias", "https://user:geheim@files.example.com/")
    (home / "file").touch()
    for url in (f"file://{tmp_path}/alias/../x", "https://elsewhere.example.com/", f"file://{tmp_path}/alias/none"):
        with pytest.raises((DataRefused, DataLost)) as caught:
            store.get(BlobRef(url=url))
        assert str(home) not in str(caught.value) and "geheim" not in str(caught.value)


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    with pytest.raises(StoreUnavailable, match=r"needs a package that is not installed here: .*s3fs"):
        stores("s3://bucket/data").put(ARRAY)
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(StoreUnavailable, match=r"needs a package that is not installed here: .*fsspec"):
        stores("file:///tmp").put(ARRAY)


# ---- web servers


@pytest.fixture(scope="module")
def web():
    server = WebServer()
    server.files["file"] = b"12345678"
    yield server
    server.stop()


def fetched(web, name, most=100, size=None, **changes):
    return stores(None, web.root, **changes).get(BlobRef(url=web.root + name, size_bytes=size), most)


def test_a_file_by_url(web, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # is not used
    for name in ("file", "plain", "chunked"):
        assert fetched(web, name) == b"12345678" == fetched(web, name, 8) == fetched(web, name, size=8)
    assert fetched(web, "longer") == b"12345678"
    web.files["array"] = ARRAY.tobytes()
    ref = ArrayRef(url=web.root + "array", dtype="<f8", shape=(2, 3), size_bytes=48)
    assert (stores(None, web.root).get(ref) == ARRAY).all()


def test_a_redirect_is_not_followed(web):
    other = WebServer()
    try:
        for place in (f"{other.root}file", web.root + "file"):
            web.elsewhere = place
            with pytest.raises(DataRefused, match="answered with a redirect, which is not followed"):
                fetched(web, "redirect")
        assert other.asked == []
    finally:
        other.stop()


TROUBLE = {
    "missing": (DataLost, "is not there"),
    "forbidden": (DataRefused, r"refused by its server \(403\)"),
    "broken": (StoreUnavailable, "its server answers 500"),
    "cut": (DataCorrupt, "was cut off by its server"),
    "cut_chunk": (DataCorrupt, "was cut off by its server"),
    "endless": (DataRefused, "has more than 100 B"),
    "huge": (DataRefused, "has more than 100 B"),
    "garbage": (StoreUnavailable, "cannot be read"),
    "silent": (StoreUnavailable, "timed out"),
    "stops": (StoreUnavailable, "timed out"),
    "drips": (StoreUnavailable, "timed out"),
    "drips_headers": (StoreUnavailable, "timed out"),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_servers_that_misbehave_are_named_and_never_waited_for_long(web, name):
    error, text = TROUBLE[name]
    hangs = text == "timed out"
    with pytest.raises(error, match=text):
        fetched(web, name, 10**6 if hangs else 100, timeout_s=SHORT_S if hangs else LONG_S)


def test_sizes_that_do_not_match(web):
    with pytest.raises(DataCorrupt, match="not of the 9 bytes"):
        fetched(web, "file", size=9)
    for name in ("file", "plain", "chunked", "endless"):
        with pytest.raises(DataRefused, match="has more than 7 B"):
            fetched(web, name, size=7)
    assert fetched(web, "file", limit_bytes=8) == b"12345678"
    with pytest.raises(DataRefused, match="has more than 7 B"):
        fetched(web, "file", limit_bytes=7)


def test_nobody_at_that_port():
    root = f"http://127.0.0.1:{free_port()}/"
    with pytest.raises(StoreUnavailable, match="Connection refused"):
        stores(None, root).get(BlobRef(url=root + "file"))


def test_a_web_server_is_only_read(web):
    with pytest.raises(DataRefused):
        stores(None, web.root).delete(BlobRef(url=web.root + "file", once=True))


def test_https_asks_for_a_certificate_that_is_trusted(tmp_path, monkeypatch):
    certificate = Certificate(tmp_path, "web")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.file, certificate.key_file)
    server = WebServer(context)
    server.files["file"] = b"1234"
    try:
        with pytest.raises(StoreUnavailable, match="certificate"):
            fetched(server, "file")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.file))
        assert fetched(server, "file") == b"1234"
    finally:
        server.stop()


def test_what_others_have_put_below_the_root_is_never_deleted(tmp_path):
    """A message may say `once` of any file there."""
    store = stores(f"file://{tmp_path}")
    (tmp_path / "deep").mkdir()
    for place in ("dataset.bin", "deep/" + "a" * 32):
        (tmp_path / place).write_bytes(b"12345678")
        ref = BlobRef(url=f"file://{tmp_path}/{place}", size_bytes=8, once=True)
        with pytest.raises(DataRefused, match="only what `put` has made"):
            store.delete(ref)
        assert (tmp_path / place).exists()
    ref = store.put(ARRAY)
    store.delete(ref)
    assert [each.name for each in tmp_path.iterdir()] != [] and not (tmp_path / ref.url.rpartition("/")[2]).exists()
