"""How data lie in Redis, and how their bytes go from its socket straight to where they are wanted."""

import socket
import struct

#: One value in Redis; a larger array is kept in several, for Redis serves nobody else while it sends one.
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
        sock: a connection on which no answer is due.
        key: of the value.
        target: of the value's size in bytes.

    Returns:
        Whether it is filled. If not, there is no such value, or not of that size, or Redis has said something else or
        nothing: the connection is of no more use then, and `target` may hold anything.

    Raises:
        OSError: as the socket says; TimeoutError where it has a time-out.
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
    end = bytearray(len(_END))
    return head == expected and _fill(sock, target) and _fill(sock, memoryview(end)) and end == _END


def _fill(sock: socket.socket, target: memoryview) -> bool:
    """Whether so many bytes came; a socket that waits by itself is asked once for all of them."""
    if sock.gettimeout() is None:
        return sock.recv_into(target, 0, socket.MSG_WAITALL) == target.nbytes
    while target:
        count = sock.recv_into(target)
        if not count:
            return False
        target = target[count:]
    return True
