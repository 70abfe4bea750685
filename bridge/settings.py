"""Every knob of the bridge, once: name with its unit, default, bounds, reason. Read from the environment as BRIDGE_*.

No other file reads the environment, but `bridge/health.py`, which has no time for this one. Seconds and bytes.
"""

from functools import cache
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from actors.contract import StoreConfig
from actors.data.roots import RAY, is_redis
from bridge.errors import ConfigurationInvalid


class Settings(BaseSettings):
    """The bridge's settings; for example `gpu_slots` is set by BRIDGE_GPU_SLOTS."""

    model_config = SettingsConfigDict(env_prefix="BRIDGE_", frozen=True, extra="ignore")

    # what users set
    gpu_tasks: list[str] = Field([], description="JSON list of glob patterns on task names that are GPU tasks")
    validate_configured: bool = Field(
        False, description="check payloads of tasks marked by BRIDGE_GPU_TASKS alone, as of tasks marked in code"
    )
    ray_address: str | None = Field(
        None, description="host:port of the Ray head; default: the cluster `ray start` brought up on this host"
    )
    namespace: str | None = Field(
        None, description="actors are shared by the workers of a namespace; default: bridge-<name of the app>"
    )
    device: Literal["auto", "cuda", "cpu"] = Field(
        "auto", description="auto takes the GPU if it can be used, cuda refuses to start without one, cpu never looks"
    )
    gpu_slots: int | None = Field(
        None, ge=1, description="GPU tasks one worker holds at once; default 32, or thrice the largest batch"
    )
    max_crashes: int = Field(2, ge=1, description="executor deaths charged to one task before it fails")
    crash_memory_s: float = Field(
        604_800.0, gt=0, description="Redis remembers a task's crashes for this long after the last one"
    )
    dead_letters: int = Field(
        1000, ge=0, description="poisoned tasks kept in Redis for `python -m bridge.dead`, at most; the oldest goes"
    )
    dead_letters_bytes: int = Field(67_108_864, ge=1, description="what they may hold together; the oldest goes")
    dead_letters_s: float = Field(1_209_600.0, gt=0, description="a poisoned task is kept for this long")
    gpu_memory_limit: str = Field(
        "90%",
        description="limit of CuPy's memory pool: bytes such as 8GiB, or a share of what the actor reserves, such as "
        "90%; bytes give a NumPy device a memory of that size, for tests",
    )
    resident_limit: str = Field(
        "50%", description="what residents may hold on a device together: bytes such as 8GiB, or a share such as 50%"
    )
    device_results_limit: str = Field(
        "25%",
        description="what results that stay (`Gpu(result='device')`) may hold on a device together; those used longest "
        "ago move to the host's memory: bytes such as 8GiB, or a share such as 25%",
    )
    host_results_limit: str = Field(
        "4GiB", description="what results that had to leave the device may hold of the host's memory; the oldest goes"
    )
    device_result_s: float = Field(3600.0, gt=0, description="a result stays on the device for this long")
    left_limit: str = Field(
        "25%",
        description="an executor whose bodies have left more than this behind on the device is replaced: bytes such as "
        "8GiB, or a share such as 25%; 0 for never",
    )
    min_actors: int | None = Field(
        None, ge=0, description="actors that stay although nothing is to do; default one for each GPU of the cluster"
    )
    max_actors: int | None = Field(
        None,
        ge=1,
        description="actors at most, also of GPUs that Ray's autoscaler is to bring; default one for each GPU there is",
    )
    keep_idle_s: float = Field(300.0, gt=0, description="actors above the minimum end after this long without a task")
    drivers: int = Field(1, ge=1, le=64, description="driver processes of one worker; more for hosts with many cores")
    actor_cpus: float = Field(1.0, ge=0, description="CPUs each GPU actor reserves in Ray")
    environment: list[str] = Field(
        [],
        description="JSON list of glob patterns: variables of the worker that executors get beyond CELERY_*, DJANGO_*, "
        "FLASK_*; all others they have from `ray start`",
    )
    release: str | None = Field(
        None,
        description="name of the code version; default: a digest of the modules the app has imported and of the "
        "settings that executors start with",
    )

    # waiting
    start_wait_s: float = Field(60.0, gt=0, description="start-up waits this long for the first warm actor")
    connect_wait_s: float = Field(10.0, gt=0, description="start-up waits this long for Ray or the broker to answer")
    cluster_wait_s: float = Field(
        300.0, gt=0, description="tasks wait this long for a cluster that is gone, then fail as ClusterUnavailable"
    )
    head_wait_s: float = Field(
        50.0, gt=0, description="drivers go on this long without Ray's head; Ray ends its nodes' processes after 60 s"
    )
    grace_s: float = Field(5.0, gt=0, description="a cancelled body that goes on is ended with its executor after this")
    keep_warm_s: float = Field(300.0, gt=0, description="actors outlive the last worker by this")
    lease_s: float = Field(10.0, gt=0, description="queued tasks of a driver not heard of for this long are dropped")
    fence_after: int = Field(
        3, ge=1, description="a GPU is fenced after this many faults of different tasks within BRIDGE_FENCE_WINDOW_S"
    )
    fence_window_s: float = Field(600.0, gt=0, description="older faults of a GPU do not count")
    fence_good_tasks: int = Field(
        100, ge=1, description="after so many tasks without a fault the earlier faults of a GPU are forgotten"
    )
    fence_probe_s: list[float] = Field(
        [60.0, 300.0, 1800.0],
        min_length=1,
        description="JSON list: a fenced GPU is tried again after the first pause, then the second, then ever the last",
    )
    beat_s: float = Field(2.0, gt=0, description="how often the driver asks actors for their health")

    # health (bridge/health.py)
    health_address: str | None = Field(
        None,
        description="host:port where the worker answers /livez, /readyz and /health over HTTP; a port alone means "
        "127.0.0.1; default: no port, `python -m bridge.health` asks over a private socket",
    )
    runtime_dir: str | None = Field(
        None,
        description="folder of the workers' private sockets, for `python -m bridge.health`; default "
        "/tmp/celery-gpu-bridge-UID",
    )
    hung_after_s: float = Field(
        15.0, gt=2, description="a worker whose main thread has not turned for this long is not live any more"
    )

    # large data (bridge/data.py)
    data_url: str | None = Field(
        None,
        description="where arrays and files by reference are put: redis://..., or a root that fsspec opens, such as "
        "s3://bucket/prefix or file:///mnt/shared, or `ray`, the object store of the cluster, which producers join; "
        "default: the Redis of the result backend, else of the broker",
    )
    data_roots: list[str] = Field(
        [],
        description="JSON list of roots below which references to files and URLs are read, such as "
        "https://images.example.com/public/; all others are refused, nothing below them is written or deleted",
    )
    data_keep_s: float = Field(3600.0, gt=0, description="data in Redis and in Ray's object store expire after this")
    data_inline_bytes: int = Field(
        65_536, ge=0, description="arrays given to delay() travel in the message up to this size, by reference above"
    )
    data_limit_bytes: int = Field(1 << 34, ge=1, description="one array or file by reference, at most")
    data_timeout_s: float = Field(
        10.0, gt=0, description="Redis, Ray or a web server has this long for one answer with large data"
    )
    data_ray_bytes: int = Field(
        1 << 33, ge=0, description="data of a namespace in Ray's object store, together, at most; more is refused"
    )

    # how calls are shared between tasks (bridge/driver/scheduler.py)
    call_budget_s: float = Field(0.005, gt=0, description="estimated run time up to which tasks share one call")
    call_gap_s: float = Field(0.004, ge=0, description="under load the next call of tiny tasks waits this long")
    call_tasks: int = Field(256, ge=1, le=4096, description="tasks in one shared call, at most; a batch may be larger")
    starve_after_s: float = Field(
        10.0, gt=0, description="a task that has waited this long goes before all others, whatever their priority"
    )
    calls_outstanding: int = Field(2, ge=1, le=4, description="calls per driver and actor not answered yet, at most")

    # sizes
    max_body_bytes: int = Field(
        64 << 20,
        ge=1024,
        description="messages with a larger body, as it is or decompressed, are refused before they are decoded",
    )
    raw_body_bytes: int = Field(
        65_536, ge=0, description="of GPU tasks' messages with a larger JSON body only the executor reads the arguments"
    )
    inline_limit_bytes: int = Field(65_536, ge=1, description="larger payloads and values travel on their own")
    queued_tasks: int = Field(4096, ge=1, description="an actor with this many waiting tasks refuses calls as busy")
    log_limit_bytes: int = Field(
        65_536, ge=0, description="what one task's logging and printing may add to its outcome"
    )

    # how long calls wait inside actors
    reply_after_s: float = Field(0.02, gt=0, description="a call answers after this as soon as any task of it has news")
    collect_wait_s: float = Field(1.0, gt=0, description="a call without news is asked again this often")

    @field_validator("ray_address")
    @classmethod
    def _is_a_head(cls, address: str | None) -> str | None:
        if address in (None, "", "auto"):  # "auto" is Ray's word for the default
            return None
        host, _, port = address.rpartition(":")
        if "://" in address or not host or not _is_port(port):
            raise ValueError(
                "write host:port of the head, as `ray start --head` prints it; Ray Client (ray://) is not needed, "
                "for a worker joins the cluster itself"
            )
        return address

    @field_validator("health_address")
    @classmethod
    def _is_a_place(cls, address: str | None) -> str | None:
        if address is not None:
            _place(address)
        return address

    @field_validator("data_url")
    @classmethod
    def _is_a_store(cls, url: str | None) -> str | None:
        if url in (None, RAY) or is_redis(url):
            return url
        if url.startswith(("http://", "https://")):
            raise ValueError(
                "web servers are only read from; write redis://..., ray, or a root such as s3://bucket/prefix"
            )
        return _root(url)

    @field_validator("data_roots")
    @classmethod
    def _are_roots(cls, roots: list[str]) -> list[str]:
        return [_root(root) for root in roots]

    @property
    def health_place(self) -> tuple[str, int] | None:
        """Host and port of `health_address`."""
        return _place(self.health_address) if self.health_address is not None else None

    @property
    def stores(self) -> StoreConfig:
        """Where large data lie, as executors are told."""
        return StoreConfig(
            self.data_url, tuple(self.data_roots), self.data_keep_s, self.data_timeout_s, self.data_limit_bytes,
            self.data_inline_bytes,
            self.data_ray_bytes,
        )  # fmt: skip

    def namespace_of(self, app: Any) -> str:
        """The namespace of an app's workers: as set, or of the app's name."""
        return self.namespace or f"bridge-{app.main or 'app'}"

    @model_validator(mode="after")
    def _bounds_of_the_fleet(self) -> Self:
        if self.min_actors is not None and self.max_actors is not None and self.min_actors > self.max_actors:
            raise ValueError("BRIDGE_MIN_ACTORS is larger than BRIDGE_MAX_ACTORS")
        return self


def _root(url: str) -> str:
    scheme, _, rest = url.partition("://")
    if scheme in ("", "local") or not rest.strip("/") or any(odd in url for odd in ("%", "?", "#", "@", "::", "\\")):
        raise ValueError("write a root such as s3://bucket/prefix, file:///mnt/shared or https://host/path")
    return url


def _place(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not _is_port(port):
        raise ValueError("write host:port, such as 127.0.0.1:8080, 0.0.0.0:8080 or [::1]:8080, or the port alone")
    return host.strip("[]") or "127.0.0.1", int(port)


def _is_port(text: str) -> bool:
    return text.isdecimal() and 0 < int(text) < 65536


@cache
def settings() -> Settings:
    """The settings of this process.

    Raises:
        ConfigurationInvalid: a BRIDGE_* variable that means nothing; the text names it.
    """
    try:
        return Settings()
    except ValidationError as error:
        problems = [_problem(e["loc"], e["msg"].removeprefix("Value error, ")) for e in error.errors()]
        raise ConfigurationInvalid("; ".join(problems)) from error
    except Exception as error:  # pydantic-settings: a JSON value that cannot be parsed
        name = str(error).partition('"')[2].partition('"')[0]
        raise ConfigurationInvalid(
            f"BRIDGE_{name.upper()} is not valid JSON; write a list such as BRIDGE_{name.upper()}='[\"shop.images.*\"]'"
        ) from error


def _problem(place: tuple[int | str, ...], text: str) -> str:
    name = ".".join(map(str, place)).upper()
    return f"BRIDGE_{name}: {text}" if name else text
