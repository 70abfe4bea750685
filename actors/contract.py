"""What crosses process boundaries between driver, actor and executor: plain tuples, nothing of the user's app.

Arguments and values travel as pickled bytes that only the driver and the executor open, because only they have the
user's app; the actor passes them on unread. Seconds and bytes everywhere; times are durations or `time.monotonic`.
"""

import math
import signal
from enum import IntEnum, StrEnum
from typing import Any, NamedTuple

from actors.data.ahead import Place, Wanted
from actors.frames import Part

#: Raised with every incompatible change of this file; an actor of another version is not used.
PROTOCOL = 12

#: Tasks in one call, at most; a batch cannot be larger.
MAX_TASKS = 4096


class Release(NamedTuple):
    """One version of the user's code and how an executor loads it; `id` tells releases apart."""

    id: str
    app: str  # "module:attribute"
    script: str  # the file when the app's module was run as a script, else ""
    sys_path: tuple[str, ...]
    workdir: str
    includes: tuple[str, ...]  # task modules beyond what importing the app registers
    tasks: tuple[str, ...]  # the only task names its executor runs
    environment: tuple[tuple[str, str], ...]


class TaskCall(NamedTuple):
    """One task inside a call; `payload` is the pickled (args, kwargs, request context)."""

    token: str  # unique per execution, so that nothing late ever hits a second one; before its last dot: of the task
    name: str
    payload: bytes
    soft_limit_s: float | None
    hard_limit_s: float | None
    stays: bool = False  # arrays in its result may stay on the device: only GPU tasks of the app take them
    texts: tuple[Part, ...] = ()  # of arguments that stay closed, to which the payload refers
    checks: bool = False  # whether the executor checks the arguments, for it alone reads them
    large: tuple[Wanted, ...] = ()  # in Redis, to which its arguments refer

    @property
    def size_bytes(self) -> int:
        """Of its arguments, about."""
        return len(self.payload) + sum(map(len, self.texts))


class Call(NamedTuple):
    """One or many tasks that travel together to one actor."""

    id: str
    driver: str
    release: str
    tasks: tuple[TaskCall, ...]
    estimate_s: float
    may_part: bool = False  # short tasks that share no run of a body: behind an unexpectedly slow one they come back
    waits_s: float = math.inf  # so long it expects to wait for its turn; if that proves far too short, it comes back
    ahead: tuple[Place, ...] = ()  # what its actor has read ahead of it


class FailureKind(StrEnum):
    """Why a task has no value; the driver turns each into an exception."""

    RAISED = "raised"  # the body raised; `exception` holds it when it can be rebuilt
    EXITED = "exited"  # the body raised SystemExit or KeyboardInterrupt, which would have ended a prefork child
    RETRY = "retry"  # the body asked Celery to retry or replace it; `exception` holds the wish
    OUT_OF_MEMORY = "out of memory"
    HARD_LIMIT = "hard limit"
    CANCELLED = "cancelled"
    CRASHED = "crashed"  # the task was running when its executor died by itself: charged
    SUSPECT = "suspect"  # it shared a run with others when its executor died: runs again alone, not yet charged
    LOST = "lost"  # it has not started: runs again, nobody is charged
    HELD_UP = "held up"  # it has not started: what is ahead of it takes far longer than its driver foresaw
    UNSURE = "unsure"  # lost through no fault of its own while it ran, or may have run: again only if it may run twice
    UNKNOWN_TASK = "unknown task"
    NOT_SENDABLE = "not sendable"  # the value cannot be pickled
    NO_ROOM = "no room"  # it has not started: less device memory is free than it asks for


class LogLine(NamedTuple):
    """One log record of a body, re-emitted by the driver."""

    level: int
    logger: str
    text: str
    of_task: bool  # its logger came from `get_task_logger`
    created: float = 0.0  # as `time.time` on the GPU node
    where: tuple[str, int, str] = ("", 0, "")  # file, line and function of the call
    extra: bytes = b""  # what the caller gave as ``extra``, pickled


class Succeeded(NamedTuple):
    """A body's value, pickled; `wishes` are the Celery calls (such as update_state) the body made."""

    token: str
    value: bytes
    run_s: float
    batch: int  # tasks that shared this run of the body
    logs: tuple[LogLine, ...] = ()
    wishes: bytes = b""
    made: bytes = b""  # pickled handles and references made for the value: if nobody wants it, they are deleted


class Failed(NamedTuple):
    """Why a task has no value, as data that any process can read."""

    token: str
    kind: FailureKind
    type_name: str
    message: str
    traceback: str = ""
    exception: bytes | None = None
    run_s: float = 0.0
    logs: tuple[LogLine, ...] = ()
    wishes: bytes = b""


class Large(NamedTuple):
    """The outcome is too large for a shared reply: `fetch` it as a return of its own."""

    token: str
    size_bytes: int


class Pending(NamedTuple):
    """Not finished when the reply left: `collect` it."""

    token: str
    running: bool
    wishes: tuple[bytes, ...] = ()  # what the running body has asked of Celery, or logged, since the last answer
    soft_limit_hit: bool = False  # since the last answer


Outcome = Succeeded | Failed
Answer = Succeeded | Failed | Large | Pending


class Reply(NamedTuple):
    """What a call or a collect returns: one answer per task asked for, and how busy the actor is."""

    answers: tuple[Answer, ...]
    queue_s: float  # estimated seconds of work ahead of a new call


class Busy(NamedTuple):
    """Nothing of the call was taken; `reason` says why."""

    queue_s: float
    reason: str = "its queue is full"


class ActorState(StrEnum):
    """What an actor can do for a release."""

    STARTING = "starting"  # its executor is importing or warming up
    READY = "ready"
    FAILING = "failing"  # its executor does not start; tried again with backoff
    FENCED = "fenced"  # its GPU is not to be trusted; probed with growing pauses
    DRAINING = "draining"  # it takes no new calls and ends when what it has is delivered


class Holdings(NamedTuple):
    """Arrays that bodies have returned and that stay with an executor; bytes."""

    arrays: int = 0
    device_bytes: int = 0
    host_bytes: int = 0


class DeviceState(NamedTuple):
    """What an executor holds on its device, told when it has changed; bytes, 0 where unknown."""

    memory_used: int  # of the device, by all processes
    memory_total: int
    memory_free: int  # what the next body could have: free on the device and in the pool, and below the pool's limit
    residents: dict[str, int]  # name -> bytes
    touched: dict[str, tuple[str, ...]]  # task's name -> residents its last body has used, where that is news
    results: Holdings = Holdings()


class Health(NamedTuple):
    """An actor's own account of itself."""

    protocol: int
    slot: int
    node: str
    pid: int
    state: ActorState
    reason: str  # why it is FAILING or FENCED, or which step STARTING is at
    knows_release: bool  # False after a restart: say hello again
    failed_starts: int  # of its executor, in a row
    device: dict[str, Any]  # DeviceInfo as a dict, empty before the first warm-up
    executor_pid: int
    executor: str  # its random name, in the handles of arrays it holds; "" before its first warm-up
    generation: int  # executors started so far
    warm_s: float
    tasks: int
    calls: int
    crashes: int
    queued: int
    queue_s: float  # a new call would wait about so long, behind the calls of all drivers
    running: str  # name of the task that runs now, or ""
    by_task: dict[str, dict[str, float]]  # name -> tasks, runs, mean_s
    memory_used_bytes: int
    memory_total_bytes: int
    memory_free_bytes: int  # what the next body could have, as last heard
    residents: dict[str, int]  # name -> bytes on the device
    warm_for: tuple[str, ...]  # names of tasks that use residents, all of which are on the device
    results: dict[str, int]  # of bodies, that stay: arrays, device_bytes, host_bytes
    accelerator: str  # the node's accelerator type as Ray names it, such as H100; "" where unknown
    share: float  # of one GPU that the actor reserves
    recycled: int  # executors replaced because bodies had left too much behind
    device_faults: int  # executors that broke their device or could not warm it up
    probe_in_s: float | None  # FENCED: until the next probe


# Between actor and executor, over their pipe.

#: Sent by the actor to its executor; SIGUSR1 is what Celery uses for soft limits, too.
INTERRUPT_SIGNAL = signal.SIGUSR1
#: Ends an executor whose CUDA context is broken; the actor reads it from the exit code.
EXIT_DEVICE_BROKEN = 86
#: The same, and the device has said that its hardware is at fault.
EXIT_DEVICE_FAULTY = 88
#: Ends an executor that could not load the release or warm the device; it has said why.
EXIT_NOT_STARTED = 87


class Reason(IntEnum):
    """Why a body is interrupted, and how a task is cancelled."""

    SOFT_LIMIT = 1  # SoftTimeLimitExceeded, which the body may catch
    CANCEL = 2  # its executor ends if it goes on for longer than the grace time
    KILL = 3  # its executor ends at once


class StoreConfig(NamedTuple):
    """Where large data lie; seconds and bytes."""

    url: str | None = None  # of Redis, a root that fsspec opens, or "ray"; None is the app's own Redis
    roots: tuple[str, ...] = ()  # below which references to files and URLs are read
    keep_s: float = 3600.0
    timeout_s: float = 10.0
    limit_bytes: int = 1 << 34  # one array, at most
    inline_bytes: int = 65_536  # an array that a body wants sent travels inside the message up to this
    ray_bytes: int = 1 << 33  # in Ray's object store, of one namespace, at most


class Config(NamedTuple):
    """What an executor is started with."""

    release: Release
    device: str  # auto, cuda or cpu
    memory_limit: str  # of CuPy's pool, as CUPY_GPU_MEMORY_LIMIT takes it
    log_level: int
    log_limit_bytes: int
    resident_limit: str  # of residents, in bytes or as a share of the device's memory
    left_limit: str = "25%"  # of what bodies leave behind on the device, likewise
    stores: StoreConfig = StoreConfig()
    results_limit: str = "25%"  # of results that stay on the device, likewise
    host_results_limit: str = "4GiB"  # of those that had to move to the host's memory, in bytes
    keep_s: float = 3600.0  # a result stays for so long
    actor: int = 0  # number of the executor's actor


#: The step of start-up in which an executor touches its device for the first time.
STEP_DEVICE = "warming the device"


class Step(NamedTuple):
    """Start-up has come to this point."""

    text: str


class Ready(NamedTuple):
    """Warm: from now on the executor waits for calls."""

    device: dict[str, Any]
    warm_s: float
    executor: str = ""  # its random name


class NotStarted(NamedTuple):
    """Start-up failed; whether the device, the memory free on it, or else the app is the reason."""

    reason: str
    device: bool
    memory: bool = False


class Full(NamedTuple):
    """The executor wants to be replaced after this call: it holds memory that nobody can give back."""

    text: str


class Broken(NamedTuple):
    """The device is broken, and how; the executor ends now."""

    text: str


class Bell(NamedTuple):
    """There is something new in the journal."""


class Asked(NamedTuple):
    """What the running body asks of Celery that is to happen now (progress), or what it has logged so far."""

    token: str
    wishes: bytes


class Done(NamedTuple):
    """The call has ended."""

    call: str
