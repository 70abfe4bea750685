"""``python -m actors.executor``, as `actors/actor/child.py` starts it; see `loop.py`."""

import sys

from actors.executor.loop import main

if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
