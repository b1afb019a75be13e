"""Ray's token authentication, enabled unless the operator disabled it, for clusters that we start or connect to.

The token itself is read by Ray from RAY_AUTH_TOKEN, the file at RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token.
"""

import importlib
import os
import secrets
import sys
from pathlib import Path

MODE_VARIABLE = "RAY_AUTH_MODE"
TOKEN_VARIABLE = "RAY_AUTH_TOKEN"  # noqa: S105 - the name of a variable, not a token
PATH_VARIABLE = "RAY_AUTH_TOKEN_PATH"
TOKEN_REMEDY = (
    f"set {TOKEN_VARIABLE}, or {PATH_VARIABLE} to a file that holds the token "
    "(on Kubernetes: kubectl get secret NAME -o jsonpath={.data.auth_token} | base64 -d)"
)


def has_token() -> bool:
    """Return whether this user has a token where Ray looks for it."""
    return bool(read_token())


def read_token() -> str | None:
    """Return the token from where Ray looks for it, in Ray's order; None if there is none."""
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if token:
        return token
    path = Path(os.environ.get(PATH_VARIABLE) or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def use_tokens(*, create: bool) -> None:
    """Turn token authentication on for this process and its children, unless RAY_AUTH_MODE says otherwise.

    With `create`, a process that has no token gets a fresh one, for the embedded cluster that it is about to start.
    """
    if os.environ.get(MODE_VARIABLE, "token") == "token" and (create or has_token()):
        os.environ[MODE_VARIABLE] = "token"
        if not has_token():
            os.environ[TOKEN_VARIABLE] = secrets.token_hex(32)
    if "ray" in sys.modules:
        reread()


def reread() -> None:
    """Make Ray read the environment again: it reads mode and token once, when it is imported."""
    raylet = importlib.import_module("ray._raylet")
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()
