"""A link to a layer on a server, which can be unpickled where the server cannot be reached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from sharednorm.core.layer_config import LayerConfig
from sharednorm.remote.backends.client_compute import ClientComputeBackend
from sharednorm.remote.backends.server_compute import RemoteBackend
from sharednorm.remote.handle import RemoteBatchNorm, backend_of


class LayerLink:
    """A handle of a layer; once it was pickled, what it takes to make one, which is done when it is first used.

    So whoever loads a model and never calls it needs no server, and nobody waits for one while unpickling. A copy has
    another handle of the same layer, by the same hub.

    Args:
        layer: The handle.

    Attributes:
        name: The layer's name.
        config: The layer's configuration, which never changes.
        compute: Where tensors are computed with, "client" or "server".
        text: The handle in words.
    """

    def __init__(self, layer: RemoteBatchNorm) -> None:
        self._layer: RemoteBatchNorm | None = layer
        self._again: tuple[object, ...] = ()
        backend = cast("RemoteBackend", backend_of(layer))
        self.name = str(layer.name)
        self.config: LayerConfig = backend.config
        self.compute = "client" if isinstance(backend, ClientComputeBackend) else "server"
        self.text = repr(layer)

    @property
    def layer(self) -> RemoteBatchNorm:
        """The handle, which is made first if there is none yet.

        Raises:
            SharedNormError: What `connect` raises, if there is none yet and no hub of that place is open here.
        """
        if self._layer is None:
            make = cast("Callable[..., RemoteBatchNorm]", self._again[0])
            layer = make(*cast("tuple[object, ...]", self._again[1]))
            layer.__dict__.update(cast("dict[str, Any]", self._again[2]))
            self._layer = layer
        return self._layer

    @property
    def backend(self) -> RemoteBackend:
        """What is behind the handle."""
        return cast("RemoteBackend", backend_of(self.layer))

    def __getstate__(self) -> dict[str, object]:
        """Pickle where the layer is, and no connection."""
        again = self._again if self._layer is None else self._layer.__reduce__()
        return {**self.__dict__, "_layer": None, "_again": again}

    def __deepcopy__(self, memo: object) -> LayerLink:
        """Return a link to the same layer, by the same hub."""
        copied = LayerLink.__new__(LayerLink)
        copied.__dict__.update(self.__dict__)
        copied._layer = None if self._layer is None else self._layer.__copy__()
        return copied
