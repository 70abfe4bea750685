"""Ray's token authentication, turned on before Ray is imported: Ray reads RAY_AUTH_MODE once, at import."""

import os
import stat
from pathlib import Path

#: Where Ray keeps a host's token when neither RAY_AUTH_TOKEN nor RAY_AUTH_TOKEN_PATH says otherwise.
TOKEN_FILE = Path("~/.ray/auth_token")


def use_token() -> str:
    """Turn token authentication on when a token can be found; Ray does not do it by itself for an explicit address.

    Returns where the token came from, or "" without one. A token does no harm at a cluster that asks for none.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if os.environ.get("RAY_AUTH_TOKEN"):
        source = "RAY_AUTH_TOKEN"
    elif os.environ.get("RAY_AUTH_TOKEN_PATH"):
        source = os.environ["RAY_AUTH_TOKEN_PATH"]
    elif TOKEN_FILE.expanduser().is_file():
        source = str(TOKEN_FILE.expanduser())  # whose home, is the question when it is refused
    else:
        source = ""
    if source and not mode:
        os.environ["RAY_AUTH_MODE"] = "token"
    return source


def lacks_token(source: str) -> bool:
    """Whether Ray is told to use a token and there is none; `source` as `use_token` returns it."""
    return not source and os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def exposed(source: str) -> bool:
    """Whether other users of this machine may read the token; `source` as `use_token` returns it."""
    path = Path(source).expanduser()
    return bool(source) and path.is_file() and bool(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))


def is_unreadable(source: str) -> bool:
    """Whether the token's file, if it is in one, gives no token; `source` as `use_token` returns it."""
    if source in ("", "RAY_AUTH_TOKEN"):
        return False
    try:
        return not Path(source).expanduser().read_text().strip()
    except OSError:
        return True
