"""``python -m bridge.dead``: see `command.py`."""

import sys

from bridge.dead.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
