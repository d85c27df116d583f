"""HTTP sessions with limits that `requests` does not have (`ppvision.remote`).

This is a separate module, because the rest of the package works without `requests`.
"""

import http.client
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection

from ppvision.errors import InputError

MAX_INTERIM = 10  # answers "100 Continue" before the real one; servers send at most one


class _Answer(http.client.HTTPResponse):
    """Skips only a few answers "100 Continue"; Python's own class skips any number of them."""

    _interim = 0

    def _read_status(self) -> tuple[str, int, str]:
        # Not a public method; otherwise `begin` would have to be rewritten. `test_remote.py` fails
        # if a later Python does not have it.
        if self._interim > MAX_INTERIM:
            raise InputError(f"more than {MAX_INTERIM} times the word to wait (100 Continue)")
        self._interim += 1
        return super()._read_status()


class _Http(urllib3.HTTPConnectionPool):
    ConnectionCls = type("_Connection", (HTTPConnection,), {"response_class": _Answer})


class _Https(urllib3.HTTPSConnectionPool):
    ConnectionCls = type("_Connection", (HTTPSConnection,), {"response_class": _Answer})


_POOLS = {"http": _Http, "https": _Https}


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, *arguments: Any, **options: Any) -> urllib3.ProxyManager:
        manager = super().proxy_manager_for(*arguments, **options)
        if type(manager) is urllib3.ProxyManager:  # a manager for SOCKS has its own connections
            manager.pool_classes_by_scheme = _POOLS
        return manager


class BoundedSession(requests.Session):
    """Ignores redirects: even if it must not follow them, `requests` reads their bodies."""

    def __init__(self) -> None:
        super().__init__()
        for scheme in _POOLS:
            self.mount(f"{scheme}://", _Adapter())

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None
