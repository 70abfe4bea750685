"""Every error the bridge raises, in one tree.

    BridgeError
    ├── StartupError                what stops a worker at start: one line on stderr and an exit code of its own
    │   ├── ConfigurationInvalid      64  a setting, option or mark that means nothing
    │   ├── AppNotImportable          65  -A names nothing that can be imported
    │   ├── BrokerUnreachable         66  Redis or another broker, or the result backend, does not answer or refuses
    │   ├── TransportUnsupported      67  a broker transport without an event loop
    │   ├── ClusterNotFound           68  no Ray cluster at the address
    │   ├── ClusterAuthFailed         69  the cluster refused the token
    │   ├── ClusterMismatch           70  Ray or Python differ between cluster and worker
    │   ├── GpuNotFound               71  the cluster offers no GPU
    │   ├── ActorNotReady             72  an actor's executor does not start: import, device or warm-up
    │   └── StandaloneFailed          73  --standalone could not start Redis or Ray
    └── TaskError                   what one task ends with
        ├── PayloadInvalid            arguments that do not fit the task's signature
        ├── MessageInvalid            a header of the message that means nothing
        ├── PayloadTooLarge           a message body beyond BRIDGE_MAX_BODY_BYTES
        ├── GpuOutOfMemory            the device (or host) had too little memory for this task alone
        ├── TaskPoisoned              the task ended its executor too often
        ├── TaskNotOnActor            the executor's copy of the app does not know the task
        ├── ResultInvalid             the body returned what cannot be sent
        ├── ResultRefused             the result is too large for the result backend
        ├── RemoteTaskError           the body raised what cannot be rebuilt here
        ├── NoSuitableGpu             GPUs are there, and none has what the task asks for
        ├── ClusterUnavailable        no cluster for too long
        └── DataError                 data that travel by reference
            ├── DataLost                the reference points to nothing any more
            ├── DataCorrupt             truncated, or another checksum
            ├── DataRefused             a place or a size that is not allowed
            ├── StoreUnavailable        the store does not answer
            └── HandleLost              an array that stayed on a device is gone with it

Every class passes all its arguments to ``super().__init__`` and makes its text in ``__str__``: so it survives pickle
and Celery's JSON results. `retryable` says whether sending the same task again can help.
"""

from typing import ClassVar

from actors.errors import BridgeError as BridgeError
from actors.errors import DataCorrupt as DataCorrupt
from actors.errors import DataError as DataError
from actors.errors import DataLost as DataLost
from actors.errors import DataRefused as DataRefused
from actors.errors import HandleLost as HandleLost
from actors.errors import PayloadInvalid as PayloadInvalid
from actors.errors import StoreUnavailable as StoreUnavailable
from actors.errors import TaskError as TaskError


class StartupError(BridgeError):
    """The worker cannot start; the text is one line that says what to do."""

    exit_code: ClassVar[int] = 1


class ConfigurationInvalid(StartupError):
    """A setting, option or mark that means nothing."""

    exit_code = 64


class AppNotImportable(StartupError):
    """``-A`` names nothing that can be imported."""

    exit_code = 65


class BrokerUnreachable(StartupError):
    """The broker or the result backend does not answer, or refuses."""

    exit_code = 66


class TransportUnsupported(StartupError):
    """A broker transport without an event loop."""

    exit_code = 67


class ClusterNotFound(StartupError):
    """No Ray cluster at the address."""

    exit_code = 68


class ClusterAuthFailed(StartupError):
    """The Ray cluster refused the token."""

    exit_code = 69


class ClusterMismatch(StartupError):
    """Ray or Python differ between the cluster and this worker."""

    exit_code = 70


class GpuNotFound(StartupError):
    """The cluster offers no GPU."""

    exit_code = 71


class ActorNotReady(StartupError):
    """An actor's executor does not start; the text carries the reason from the GPU node."""

    exit_code = 72


class StandaloneFailed(StartupError):
    """``--standalone`` could not start Redis or Ray."""

    exit_code = 73


class MessageInvalid(TaskError):
    """A header of the task's message that means nothing, such as a time limit that is no number."""


class PayloadTooLarge(TaskError):
    """A message whose body is larger than BRIDGE_MAX_BODY_BYTES, as it is or decompressed; nothing of it was decoded.

    Args:
        task: the task's name, or empty.
        limit: bytes.
    """

    def __init__(self, task: str, limit: int) -> None:
        super().__init__(task, limit)
        self.task, self.limit = task, limit

    def __str__(self) -> str:
        return (
            f"{self.task or 'a task'}: the message's body is larger than {self.limit} bytes: store the data and send "
            "where it lies, or raise BRIDGE_MAX_BODY_BYTES for the worker"
        )


class GpuOutOfMemory(TaskError):
    """Too little memory for this task, also when it ran alone. Not a MemoryError: that would end the Celery worker."""

    retryable = True


class TaskPoisoned(TaskError):
    """The task was running each time its executor died.

    Args:
        task: the task's name.
        crashes: executor deaths charged to it.
        last: how the last one ended, for example "signal 11 (SIGSEGV)".
    """

    def __init__(self, task: str, crashes: int, last: str) -> None:
        super().__init__(task, crashes, last)
        self.task, self.crashes, self.last = task, crashes, last

    def __str__(self) -> str:
        return (
            f"{self.task} was running each of the {self.crashes} times its executor died (last: {self.last}); "
            "it will not run again. Run its body alone under a debugger, or raise BRIDGE_MAX_CRASHES"
        )


class TaskNotOnActor(TaskError):
    """The executor's copy of the app does not know the task: the code on the GPU node differs from the worker's."""


class ResultInvalid(TaskError):
    """The body returned something that cannot be sent back."""


class ResultRefused(TaskError):
    """The result backend takes other results and not this one, which is too large.

    Args:
        task: the task's name.
        size: of the result as it would be stored, in bytes.
        cause: what the backend has answered.
    """

    def __init__(self, task: str, size: int, cause: str) -> None:
        super().__init__(task, size, cause)
        self.task, self.size, self.cause = task, size, cause

    def __str__(self) -> str:
        return (
            f"{self.task} has run, and the result backend takes no result of {self.size} bytes: {self.cause}. Return "
            "less, return arrays by reference (docs/howto/large-arrays.md), or give the backend more room"
        )


class RemoteTaskError(TaskError):
    """The body raised an exception that cannot be rebuilt in this process.

    Args:
        type_name: the exception's qualified name.
        message: its text.
    """

    def __init__(self, type_name: str, message: str) -> None:
        super().__init__(type_name, message)
        self.type_name, self.message = type_name, message

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message}"


class NoSuitableGpu(TaskError):
    """GPU actors are there, and none has what the task's mark asks for; nothing has run.

    Args:
        task: the task's name.
        needed: what its mark asks for.
        found: what the ready actors have.
    """

    retryable = True

    def __init__(self, task: str, needed: str, found: str) -> None:
        super().__init__(task, needed, found)
        self.task = task
        self.needed = needed
        self.found = found

    def __str__(self) -> str:
        return (
            f"{self.task} needs {self.needed}, and no GPU actor has it ({self.found}): "
            "join a node that has, or change the task's gpu=Gpu(...)"
        )


class ClusterUnavailable(TaskError):
    """No Ray cluster for longer than BRIDGE_CLUSTER_WAIT_S; the task may be sent again."""

    retryable = True


def as_text(error: BaseException, limit: int = 400) -> str:
    """One line about any exception, bounded, for logs and health."""
    text = f"{type(error).__name__}: {error}".replace("\n", " ")
    return text if len(text) <= limit else text[: limit - 1] + "…"
