"""What the doctor asks broker and result backend: whether they let us in, take writes, and keep what they have."""

import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from redis.exceptions import RedisError

from bridge.doctor.findings import Finding, fail, ok, warn
from bridge.errors import as_text
from bridge.worker.command import advice_on, ping_backend, ping_broker
from bridge.worker.readiness import clean
from bridge.worker.redis_channel import GroupedChannel, ask_in_groups
from bridge.worker.taking import REMEDY, trial

#: The tests run with this Redis and newer ones.
OLDEST = (6, 2)
#: A trial write goes away by itself after this, in seconds.
WRITE_S = 10
#: Clocks of hosts may differ so much, in seconds: `countdown`, `eta` and `expires` are dates.
APART_S = 5
_SET_CLOCKS = "have all hosts set their clocks by NTP, those of producers, too"
_MANAGE = "ask whoever runs this Redis"


def broker(app: Any) -> Iterator[Finding]:
    """The broker, and what of its settings may lose tasks."""
    address = app.connection_for_read().as_uri()
    try:
        ping_broker(app)
    except Exception as error:
        yield fail("broker", f"{address} cannot be used: {clean(as_text(error, 160))}", advice_on(error))
        return
    yield ok("broker", f"{address} answers")
    with app.connection_for_read() as connection:
        ask_in_groups(connection)
        channel = connection.default_channel
        client = getattr(channel, "client", None)
        if client is not None and hasattr(client, "info"):
            key = f"_kombu.bridge-doctor.{uuid.uuid4().hex}"
            yield from _redis("broker", client, key)
            if isinstance(channel, GroupedChannel):
                yield from _waiting(channel, channel.prefixed(key))


def backend(app: Any) -> Iterator[Finding]:
    """The result backend."""
    address = app.backend.as_uri()
    if not app.conf.result_backend:
        yield warn("result backend", "there is none: results are not kept", "set result_backend, if you want them")
        return
    try:
        ping_backend(app)
    except Exception as error:
        yield fail("result backend", f"{address} cannot be used: {clean(as_text(error, 160))}", advice_on(error))
        return
    client = getattr(app.backend, "client", None)
    if client is None or not hasattr(client, "info"):
        yield ok("result backend", f"{address} is no Redis, and was not looked into")
        return
    yield ok("result backend", f"{address} answers")
    yield from _redis("result backend", client, app.backend.get_key_for_task(f"bridge-doctor-{uuid.uuid4().hex}"))


def _redis(about: str, client: Any, key: Any) -> Iterator[Finding]:
    """One Redis; `key` is written and taken away again."""
    try:
        client.set(key, b"", ex=WRITE_S)
        client.delete(key)
    except RedisError as error:
        yield fail(about, f"it takes no writes: {clean(as_text(error, 160))}", _about_writes(str(error)))
    try:
        info = client.info()
    except RedisError as error:
        yield warn(about, f"it does not tell about itself: {clean(as_text(error, 160))}", "allow INFO to its user")
        return
    if info.get("redis_mode") == "cluster":
        text = "it is a Redis Cluster: Celery neither finds the node of a key nor keeps the keys of a command on one"
        yield fail(about, text, "use one Redis, with replicas behind sentinel:// URLs if it must be highly available")
    version = str(info.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST:
        yield warn(about, f"Redis {version} is old: the tests run with 6.2 and newer", "use a newer Redis")
    yield from _clock(about, info)
    yield from _memory(about, info, version)
    yield from _persistence(about, client, info)


def _waiting(channel: GroupedChannel, key: str) -> Iterator[Finding]:
    """How a worker waits for messages; those in its hands are safe in any case."""
    try:
        why = trial(channel.async_pool.get_connection(), key)  # type: ignore[attr-defined]
    except (RedisError, OSError) as error:
        why = as_text(error, 160)
    if why:
        text = f"workers take messages by BRPOP, which loses one on its way to a worker that is killed: {clean(why)}"
        yield warn("broker", text, REMEDY)
    else:
        yield ok("broker", "workers wait for messages without taking any: none is lost on its way")


def _about_writes(text: str) -> str:
    if "READONLY" in text:
        return "it is a replica: name the primary in the URL, or use sentinel:// URLs"
    if "OOM" in text:
        return "it is full: raise its maxmemory, or lower result_expires"
    if "NOPERM" in text:
        return "give its user the rights to write"
    if "MISCONF" in text:
        return "it cannot save to its disk: make room there"
    return _MANAGE


def _clock(about: str, info: dict[str, Any]) -> Iterator[Finding]:
    """The producers' clocks cannot be asked; Redis' can, and whichever is wrong, one of the two is."""
    ahead_s = info.get("server_time_usec", time.time() * 1e6) / 1e6 - time.time()
    if abs(ahead_s) > APART_S:
        text = f"its clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} this host's"
        yield warn(about, f"{text}: tasks with countdown, eta or expires may start or expire wrongly", _SET_CLOCKS)


def _memory(about: str, info: dict[str, Any], version: str) -> Iterator[Finding]:
    policy, limit, used = (info.get(key) for key in ("maxmemory_policy", "maxmemory", "used_memory"))
    do = "set maxmemory-policy noeviction"
    if policy and policy != "noeviction":
        if str(policy).startswith("allkeys") and limit:
            yield fail(about, f"maxmemory-policy is {policy}: when it is full it drops waiting tasks", do)
        else:
            yield warn(about, f"maxmemory-policy is {policy}: when it is full it drops what it should keep", do)
    else:
        size = f"{used / limit:.0%} of {limit / 2**20:.0f} MiB used" if limit and used else "no maxmemory"
        yield ok(about, f"Redis {version}, noeviction, {size}")


def _persistence(about: str, client: Any, info: dict[str, Any]) -> Iterator[Finding]:
    saves: Any = None
    with suppress(RedisError):  # managed ones forbid CONFIG
        saves = client.config_get("save").get("save")
    if info.get("aof_enabled") or saves:
        how = "appendonly" if info.get("aof_enabled") else f"save {saves}"
        yield ok(about, f"it is kept on disk ({how})")
    elif saves is not None:
        yield warn(about, "it keeps nothing on disk: a restart loses what is in it", "set appendonly yes")
