"""How data lie in Redis, and how their bytes go from its socket straight to where they are wanted."""

import socket
import struct

#: One value in Redis; a larger array is kept in several, for Redis serves nobody else while it sends one. redis-py's
#: parser copies each four times in buffers of this size: with 4 MiB, or several values at once, reading costs twice.
CHUNK_BYTES = 1 << 20
#: What keys of data begin with, after the app's own prefix.
KEY = "bridge-data-"
#: What follows a value.
_END = b"\r\n"
_TIMEOUT = struct.Struct("@ll")


def key_of(prefix: str, name: str, number: int) -> str:
    """The key of one value."""
    return f"{prefix}{KEY}{name}-{number}"


def wait_at_most(sock: socket.socket, timeout_s: float) -> None:
    """Have the kernel bound each wait: Python's own time-outs would wake us for every few packets of a value."""
    sock.settimeout(None)
    whole, part = divmod(timeout_s, 1)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, _TIMEOUT.pack(int(whole), int(part * 1e6)))


def get_into(sock: socket.socket, key: str, target: memoryview) -> bool:
    """Have Redis send a value into `target`.

    Args:
        sock: a connection that waits; see `wait_at_most`.
        key: of the value.
        target: of the value's size in bytes.

    Returns:
        Whether it is filled. If not, there is no such value, or not of that size, or Redis has said something else or
        nothing in time: the connection is of no more use then, and `target` may hold anything.

    Raises:
        OSError: as the socket says.
    """
    name = key.encode()
    sock.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name))
    expected = b"$%d\r\n" % target.nbytes
    head = sock.recv(len(expected))
    while head and len(head) < len(expected) and not head.endswith(_END):
        more = sock.recv(len(expected) - len(head))
        if not more:
            return False
        head += more
    return (
        head == expected
        and sock.recv_into(target, 0, socket.MSG_WAITALL) == target.nbytes
        and sock.recv(len(_END), socket.MSG_WAITALL) == _END
    )
