"""``python -m bridge.worker``: see `command.py`."""

import sys

from bridge.worker.command import main

if __name__ == "__main__":
    main(sys.argv[1:])
