"""``python -m bridge.doctor``: see `command.py`."""

import sys

from bridge.doctor.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
