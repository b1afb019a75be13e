"""Downloads images from the web, limited in rate, time and bytes, and never from private addresses."""

import asyncio
import ipaddress
import random
import socket
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import aiohttp
from aiohttp.abc import ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from isthmus.data_pipeline.errors import BadSample

MAX_IMAGE_BYTES = 64 << 20
USER_AGENT = "isthmus-ingest/1 (image-caption data sets)"
_AT_ONCE = 64
_AT_ONCE_PER_HOST = 4
_SECONDS = 30.0
"""For one image, with all attempts, redirects and pauses; waiting for a free connection does not count."""
_SILENT_SECONDS = 10.0
_ATTEMPTS = 3
_REDIRECTS = 5
_PIECE_BYTES = 1 << 16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class AddressRefused(OSError):
    """A name leads to an address that is not public."""


class Downloader:
    """Downloads images within one event loop; a context manager.

    Args:
        allow_private: Also fetch from private, link-local and other addresses that are not public. Without it, a
            loopback address is fetched only where a record itself names it, never after a redirect from another host.
    """

    def __init__(self, *, allow_private: bool = False) -> None:
        self._allow_private = allow_private
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._host_slots: dict[str, asyncio.Semaphore] = {}

    async def __aenter__(self) -> Self:
        # For the look-ups of names, of which slow ones must not hold up others.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_AT_ONCE))
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, resolver=_PublicResolver(self._allow_private)),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_SILENT_SECONDS, sock_read=_SILENT_SECONDS),
            headers={"User-Agent": USER_AGENT},
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def get(self, url: str) -> bytes:
        """Return what is at an http or https URL.

        Raises:
            BadSample: it is refused, too large, incomplete on every attempt, or takes too long.
        """
        target = _parsed(url)
        host_slots = self._host_slots.setdefault(target.host or "", asyncio.Semaphore(_AT_ONCE_PER_HOST))
        async with host_slots, self._slots:
            try:
                async with asyncio.timeout(_SECONDS):
                    return await self._with_retries(target)
            except TimeoutError as error:
                raise BadSample("download_failed", f"it took longer than {_SECONDS:g} s") from error

    async def _with_retries(self, url: URL) -> bytes:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return await self._follow(url)
            except aiohttp.InvalidURL as error:
                raise BadSample("bad_url", str(error)) from error
            except (aiohttp.ClientError, OSError) as error:
                refused = getattr(error, "os_error", None)
                if isinstance(refused, AddressRefused):
                    raise BadSample("address_refused", str(refused)) from error
                if attempt == _ATTEMPTS:
                    raise BadSample("download_failed", f"{type(error).__name__}: {error}"[:200]) from error
            await asyncio.sleep(random.uniform(0.2, 0.5) * 2**attempt)  # noqa: S311 - not for security
        raise AssertionError

    async def _follow(self, url: URL) -> bytes:
        named_host = url.host
        for _ in range(_REDIRECTS + 1):
            self._check(url, named_host)
            async with self._session.get(url, allow_redirects=False, proxy=_proxy(url)) as answer:
                if answer.status in (301, 302, 303, 307, 308) and "Location" in answer.headers:
                    url = url.join(_parsed(answer.headers["Location"], relative=True))
                    continue
                if answer.status == 429 or answer.status >= 500:
                    answer.raise_for_status()
                if answer.status != 200:
                    raise BadSample("download_failed", f"HTTP {answer.status}")
                return await _body(answer)
        raise BadSample("download_failed", f"more than {_REDIRECTS} redirects")

    def _check(self, url: URL, named_host: str | None) -> None:
        """Refuse addresses that need no look-up; the resolver refuses the others."""
        if url.scheme not in ("http", "https") or not url.host:
            raise BadSample("bad_url", f"{str(url)[:80]!a} is not an http or https URL")
        address = _address(url.host)
        if url.host == "localhost" or (address and address.is_loopback):
            is_allowed = url.host == named_host
        else:
            is_allowed = address is None or _is_public(address)
        if not (is_allowed or self._allow_private):
            raise BadSample("address_refused", _refusal(url.host))


class _PublicResolver(ThreadedResolver):
    """Resolves names; refuses those that lead to an address that is not public. A connection uses what it returns."""

    def __init__(self, allow_private: bool) -> None:
        super().__init__()
        proxies = {URL(proxy).host for proxy in urllib.request.getproxies().values()}
        self._unchecked = proxies | {"localhost"}
        self._allow_private = allow_private

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await super().resolve(host, port, family)
        if not self._allow_private and host not in self._unchecked:
            for result in found:
                address = _address(result["host"])
                if address is None or not _is_public(address):
                    raise AddressRefused(_refusal(f"{host} ({result['host']})"))
        return found


def _proxy(url: URL) -> str | None:
    """Return the proxy that the environment names for a URL; of `trust_env`, which also reads passwords, only this."""
    if not url.host or urllib.request.proxy_bypass(url.host):
        return None
    return urllib.request.getproxies().get(url.scheme)


def _parsed(url: str, *, relative: bool = False) -> URL:
    """Return a URL, percent-encoded where it is not yet.

    Raises:
        BadSample: it is none.
    """
    try:
        parsed = URL(url, encoded=url.isascii() and url.isprintable() and " " not in url)
        _ = parsed.host, parsed.port  # parsed only now
    except ValueError as error:
        raise BadSample("bad_url", f"{url[:80]!a}: {error}") from error
    if not relative and not parsed.host:
        raise BadSample("bad_url", f"{url[:80]!a} has no host")
    return parsed


async def _body(answer: aiohttp.ClientResponse) -> bytes:
    data = bytearray()
    if (answer.content_length or 0) <= MAX_IMAGE_BYTES:
        async for piece in answer.content.iter_chunked(_PIECE_BYTES):
            data += piece
            if len(data) > MAX_IMAGE_BYTES:
                break
        else:
            return bytes(data)
    raise BadSample("image_too_large", f"more than {MAX_IMAGE_BYTES} bytes")


def _address(host: str) -> Any:
    """Return the IPv4 or IPv6 address that is written or embedded in a host; None if it is a name."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return address.ipv4_mapped or address.sixtofour or address
    return address


def _is_public(address: Any) -> bool:
    return bool(address.is_global and not address.is_multicast)


def _refusal(host: str) -> str:
    return f"{host} is not a public address; use --allow-private-addresses to fetch from it"
