"""Frames: pickles with parts beside them, through memory and through a pipe."""

import os
import pickle
import threading

import pytest

from actors import frames
from actors.contract import Call, TaskCall
from actors.frames import Part

BYTES = bytes(range(256)) * 4096


def call(*texts):
    task = TaskCall("1.0", "shop.total", b"payload", None, 2.5, texts=tuple(map(Part, texts)), checks=True)
    return Call("own", "driver", "release", (task, task._replace(texts=())), 0.1)


@pytest.mark.parametrize("texts", [(), (b"",), (BYTES,), (BYTES, b"x", memoryview(BYTES)[5:])])
def test_there_and_back(texts):
    again = frames.load(memoryview(b"".join(frames.dump(call(*texts)))))
    assert again._replace(tasks=()) == call()._replace(tasks=())
    assert [bytes(part.view) for part in again.tasks[0].texts] == [bytes(text) for text in texts]
    assert again.tasks[0].size_bytes == len(b"payload") + sum(map(len, texts))
    assert again.tasks[1] == call().tasks[0]


def test_parts_are_copied_neither_in_nor_out():
    source = bytearray(BYTES)
    pieces = frames.dump(call(source))
    frame = bytearray(b"".join(pieces))
    again = frames.load(memoryview(frame)).tasks[0].texts[0].view
    source[0], frame[-1] = 99, 77
    assert pieces[1][0] == 99 and memoryview(again)[-1] == 77


def test_apart_for_somebody_who_carries_the_parts_himself():
    data, parts = frames.dump_apart(call(BYTES))
    assert len(data) < 500 and len(parts) == 1
    assert bytes(pickle.loads(data, buffers=parts).tasks[0].texts[0].view) == BYTES


def test_a_part_in_a_common_pickle():
    assert bytes(pickle.loads(pickle.dumps(Part(BYTES), 5)).view) == BYTES


def test_through_a_pipe_in_many_pieces():
    read, write = os.pipe()
    pieces = frames.dump(call(BYTES))

    def send():
        for piece in (frames.length_of(pieces), *pieces):
            os.write(write, piece) if len(piece) < 4096 else [
                os.write(write, piece[n : n + 9999]) for n in range(0, len(piece), 9999)
            ]
        os.close(write)

    thread = threading.Thread(target=send)
    thread.start()
    assert bytes(frames.receive(read).tasks[0].texts[0].view) == BYTES
    with pytest.raises(EOFError):
        frames.receive(read)
    thread.join()
    os.close(read)


def test_a_frame_of_two_gibibytes_is_announced_in_eight_bytes():
    class Huge:
        def __len__(self):
            return 1 << 31

    assert frames.length_of([Huge()]) == b"\xff\xff\xff\xff" + (1 << 31).to_bytes(8, "big")
    assert frames.length_of([b"abc"]) == b"\0\0\0\3"
