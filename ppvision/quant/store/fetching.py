"""Fetch a layered model from a server. `ppvision.quant.store.model` decides which files it has and
whether they fit together; `ppvision.remote_cache` downloads them; errors are those of a layered
model."""

from ppvision import remote_cache
from ppvision.quant.store.files import LayeredModelError


class FetchError(remote_cache.FetchError, LayeredModelError):
    """A server gives a wrong answer; `status` is that of the answer, if there is one."""


class UnreachableError(remote_cache.UnreachableError, FetchError):
    """A server does not answer, or has an internal error: cached files may be sufficient."""


class Remote(remote_cache.RemoteFolder):
    """The folder of a layered model on a server, and its copy in the cache."""

    refused = FetchError
    unreachable = UnreachableError
