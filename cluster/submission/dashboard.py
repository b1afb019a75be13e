"""The cluster's dashboard over HTTP: is it reachable, which nodes it has, what is free on them."""

import logging
import os
import re
from typing import Any
from urllib.parse import urlsplit

import ray
import requests

from isthmus.cluster.errors import ClusterError
from isthmus.cluster.ray_nodes.auth import MODE_VARIABLE, TOKEN_REMEDY, read_token

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_SECONDS = 4.0
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
NODE_KEYS = ("ip", "hostname", "now", "bootTime", "cpus", "cpu", "mem", "gpus", "disk", "loadAvg")
USED = re.compile(r"^([\d.]+)/[\d.]+ (\S+)$", re.MULTILINE)
"""A line such as `1.5/2.0 CPU` of the dashboard's summary."""


def address_of_environment() -> str | None:
    """Return the dashboard's address that the environment names, as for `ray job`; None if it names none."""
    return os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")


def dashboard_url(address: str | None) -> str:
    """Return the dashboard's URL for an address; host:port is taken for http.

    Raises:
        ClusterError: a Ray client address, or not a URL at all.
    """
    text = address or address_of_environment() or DEFAULT_ADDRESS
    if text.startswith("ray://") or text in ("auto", "local"):
        raise ClusterError(f"{text}: give the dashboard's address, such as http://HOST:8265")
    url = text if "://" in text else f"http://{text}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ClusterError(f"{text}: not an address; give the dashboard's, such as http://HOST:8265")
    return url.rstrip("/")


def is_on_this_machine(url: str) -> bool:
    """Return whether a dashboard is reached by this machine's loopback."""
    return urlsplit(url).hostname in LOOPBACK


def check_reachable(url: str) -> None:
    """Check within seconds that a dashboard answers, accepts our token, and runs our version of Ray.

    Raises:
        ClusterError: one line with the remedy.
    """
    token = _token()
    try:
        answer = ask(f"{url}/api/version")
    except requests.RequestException as error:
        raise ClusterError(
            f"{url}: no Ray dashboard answers ({_reason(error)}); check --address, or forward the port: "
            "kubectl port-forward service/NAME-head-svc 8265"
        ) from error
    if answer.status_code in (401, 403):
        problem = "refused the token: it is not this cluster's" if token else "wants a token, and there is none here"
        raise ClusterError(f"{url}: the cluster {problem}; {TOKEN_REMEDY}")
    try:
        version = str(answer.json()["ray_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"{url}: responds, but not as a Ray dashboard (HTTP {answer.status_code}); check --address"
        ) from error
    if version != ray.__version__:
        raise ClusterError(
            f"{url}: the cluster runs Ray {version}, this machine {ray.__version__}; "
            f"install ray=={version} here or use an image with Ray {ray.__version__}"
        )
    if not token:
        logger.warning("%s: the cluster has no token authentication; anyone who reaches it can run code there", url)


def ask(url: str, *, stream: bool = False, timeout: float | None = CONNECT_TIMEOUT_SECONDS) -> requests.Response:
    """Send one GET with our token; `timeout` limits each wait for bytes, in seconds."""
    token = _token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    limits = (CONNECT_TIMEOUT_SECONDS, timeout)
    return requests.get(url, headers=headers, timeout=limits, stream=stream)


def nodes(url: str) -> list[dict[str, Any]]:
    """Return address, state and resources of every node; nothing of their processes."""
    summary = ask(f"{url}/nodes?view=summary").json().get("data", {}).get("summary", [])
    return [{key: node.get(key) for key in NODE_KEYS} for node in summary]


def resources(url: str) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Return free and total resources of every live node, as last reported to the dashboard."""
    data = ask(f"{url}/nodes?view=summary").json().get("data", {})
    used = data.get("nodeLogicalResources", {})
    free, total = [], []
    for raylet in (node.get("raylet", {}) for node in data.get("summary", [])):
        if raylet.get("state") == "ALIVE":
            has = {key: float(amount) for key, amount in raylet.get("resourcesTotal", {}).items()}
            taken = {name: float(amount) for amount, name in USED.findall(used.get(raylet.get("nodeId"), ""))}
            total.append(has)
            free.append({key: amount - taken.get(key, 0.0) for key, amount in has.items()})
    return free, total


def _token() -> str | None:
    return read_token() if os.environ.get(MODE_VARIABLE, "token") == "token" else None


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.Timeout):
        return f"no answer within {CONNECT_TIMEOUT_SECONDS:g} s"
    return "connection refused" if "refused" in str(error) else type(error).__name__
