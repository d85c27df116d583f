"""A layered model on a server: which files it has and whether they fit together is for
`ppvision.quant.store.model`; they come over `ppvision.remote_cache`, and errors are a layered
model's."""

from ppvision import remote_cache
from ppvision.quant.store.files import LayeredModelError


class FetchError(remote_cache.FetchError, LayeredModelError):
    """A server that does not give what it should; `status` is that of its answer, if any."""


class UnreachableError(remote_cache.UnreachableError, FetchError):
    """A server that does not answer, or has a fault of its own: what is in the cache may do."""


class Remote(remote_cache.RemoteFolder):
    """The folder of a layered model on a server, and its copy in the cache."""

    refused = FetchError
    unreachable = UnreachableError
