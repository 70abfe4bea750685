"""Which tasks of an app are GPU tasks, and with which options.

A task is marked by the task option ``gpu=`` or by its name in `BRIDGE_GPU_TASKS`. A mark that means nothing fails here,
at start, not when the task runs. Imports neither ray nor cupy: producers import it.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, Literal, Self

from celery import signals
from celery.utils.log import get_logger
from pydantic import BaseModel, ByteSize, ConfigDict, Field, model_validator

from actors.batching import Batch, batch_of
from actors.bodies import innermost
from actors.executor.errands import add_errands
from bridge.errors import ConfigurationInvalid

logger = get_logger(__name__)

#: Celery's own tasks that call another task's body for each item (`task.map`, `task.starmap`, `task.chunks`): such a
#: message is a GPU task if the task it names is one.
MAPS = ("celery.map", "celery.starmap")


class Gpu(BaseModel):
    """Options of one GPU task: ``@app.task(gpu=Gpu(memory="2GiB"))``. Unknown options fail where they are written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory: ByteSize | None = Field(
        default=None,
        gt=0,
        description="device memory the body needs, in bytes or as '2GiB'; it starts when so much is free",
    )
    streams: int = Field(
        default=1,
        ge=1,
        le=32,
        description="so many bodies of this task may be in flight at once, each on a CUDA stream",
    )
    share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="of one GPU; actors reserve the largest share that any task of the app needs",
    )
    accelerator: str | None = Field(
        default=None, min_length=1, description="GPU model the body needs, as Ray names it: 'H100', 'A100', 'L4'"
    )
    max_crashes: int | None = Field(
        default=None,
        ge=1,
        description="executor deaths charged to one task before it fails; default BRIDGE_MAX_CRASHES",
    )
    result: Literal["value", "ref", "device"] = Field(
        default="value",
        description="how arrays and bytes in a result travel: inside it (arrays as lists), by reference to a store, or "
        "as a handle to the device where they stay",
    )
    keep_copy: bool = Field(
        default=False, description="with result='device': a copy in the store serves when the device has it no more"
    )
    example: tuple[Any, ...] | None = Field(
        default=None,
        description="positional arguments for one real run at warm-up, so that kernels are compiled before work",
    )

    @model_validator(mode="after")
    def _copies_are_of_what_stays(self) -> Self:
        if self.keep_copy and self.result != "device":
            raise ValueError("keep_copy=True means something with result='device' only")
        return self

    def needs(self) -> str:
        """What it asks of a GPU, in words."""
        model = f"a GPU of type {self.accelerator}" if self.accelerator else "a GPU"
        return f"{model} with {self.memory.human_readable()} of memory" if self.memory else model


class Mark(BaseModel):
    """A marked task as the bridge sees it: its options, its vectorised form if it has one, and who marked it."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    name: str
    gpu: Gpu
    batch: Batch | None
    configured: bool  # marked by BRIDGE_GPU_TASKS, so the code knows nothing of the bridge

    @property
    def meets_others(self) -> bool:
        """Whether tasks of this name share runs of their body."""
        return self.batch is not None or self.gpu.streams > 1


def find_marks(tasks: Iterable[Any], patterns: Iterable[str]) -> dict[str, Mark]:
    """The GPU tasks among an app's `tasks`, by name.

    Args:
        tasks: Celery task instances, as in ``app.tasks.values()``.
        patterns: glob patterns on task names, from `BRIDGE_GPU_TASKS`. Celery's own tasks never match a pattern, and a
            task that says ``gpu=False`` stays a CPU task.

    Raises:
        ConfigurationInvalid: a ``gpu=`` that is neither True, False nor a `Gpu`.
    """
    patterns = list(patterns)
    marks: dict[str, Mark] = {}
    for task in tasks:
        gpu = getattr(task, "gpu", None)
        configured = False
        if gpu is None and not task.name.startswith("celery."):
            configured = any(fnmatchcase(task.name, pattern) for pattern in patterns)
        if gpu is False or (gpu is None and not configured):
            continue
        if gpu is True or configured:
            gpu = Gpu()
        if not isinstance(gpu, Gpu):
            raise ConfigurationInvalid(
                f"task {task.name}: gpu={gpu!r} means nothing; write gpu=True or gpu=Gpu(...) (from bridge import Gpu)"
            )
        marks[task.name] = Mark(name=task.name, gpu=gpu, batch=batch_of(innermost(task)), configured=configured)
    return marks


def marks_of(app: Any, patterns: Iterable[str]) -> dict[str, Mark]:
    """The GPU tasks of an app in a worker; where results stay on a device, with our own that fetch and delete them."""
    marks = find_marks(app.tasks.values(), patterns)
    if all(mark.gpu.result != "device" for mark in marks.values()):
        return marks
    add_errands(app)
    return find_marks(app.tasks.values(), patterns)


def map_marks() -> dict[str, Mark]:
    """What `MAPS` are to driver and executor, which get only those over GPU tasks."""
    return {name: Mark(name=name, gpu=Gpu(), batch=None, configured=False) for name in MAPS}


def is_gpu(marks: dict[str, Mark], name: str, args: Any, kwargs: Any) -> bool:
    """Whether a message with these decoded arguments is a GPU task."""
    if name in marks:
        return True
    if name not in MAPS or not marks:
        return False
    try:  # as a producer of any language may have written it
        inner = kwargs["task"] if "task" in kwargs else args[0]
        return inner["task"] in marks
    except (TypeError, LookupError):
        return False  # the child's body will say what is wrong with it


@signals.celeryd_after_setup.connect
def _warn_in_a_plain_worker(instance: Any = None, **_: Any) -> None:
    """A worker without the bridge runs marked bodies itself, on NumPy; it says so once."""
    if instance is None or hasattr(instance.pool_cls, "apply_gpu"):
        return
    marked = sorted(task.name for task in instance.app.tasks.values() if getattr(task, "gpu", None))
    if marked:
        logger.warning(
            "%d GPU tasks (%s, ...) will run in this worker itself, on NumPy: start it with `python -m bridge.worker`, "
            "or set worker_pool = 'bridge.pool:HybridPool'",
            len(marked), marked[0],
        )  # fmt: skip
