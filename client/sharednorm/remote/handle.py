"""Handles: layers on a server, with the whole API of a local layer."""

from __future__ import annotations

from collections.abc import Callable

from sharednorm.core.validation import check_domain
from sharednorm.layers.batch_norm import Layer
from sharednorm.remote.backends.server_compute import RemoteBackend


class RemoteBatchNorm(Layer):
    """A handle of a layer on a server, which any number of handles in any number of processes share.

    It has the whole API of a local layer. Mode, saved input and gradient w.r.t. the input belong to the
    handle; parameters, statistics and their gradients to the layer. `Hub` makes them.
    """

    def __init__(
        self,
        backend: RemoteBackend,
        name: str,
        inplace: bool,
        train: bool | None,
        again: tuple[Callable[..., RemoteBatchNorm], tuple[object, ...]],
    ) -> None:
        super().__init__(backend, name, inplace, train)
        self._remote = backend
        self._again = again

    def __reduce__(self) -> tuple[object, ...]:
        """Copy and pickle which layer it is, on which server, and the handle's mode.

        What is made of that is a handle of the same layer: by a hub of that place which is open in the process, or else
        by a new one, which raises there what `connect` raises.
        """
        make, arguments = self._again
        return make, (*arguments, self.inplace, self._train), {"_calctype": self._calctype}

    def __copy__(self) -> RemoteBatchNorm:
        """Return another handle of the same layer, in the same mode, by the same hub."""
        copied = RemoteBatchNorm(self._remote, str(self.name), self.inplace, self._train, self._again)
        copied._calctype = self._calctype
        return copied

    def __deepcopy__(self, memo: object) -> RemoteBatchNorm:
        """Return what `copy.copy` does: what the layer is, is on the server."""
        return self.__copy__()

    def inDomain(self, domain: str) -> RemoteBatchNorm:
        """Return another handle of the layer, which uses the statistics of a domain; see `BatchNorm.inDomain`."""
        backend = self._remote.within(check_domain(domain))
        make, (place, _, *rest) = self._again
        again = make, (place, backend.ref.SerializeToString(), *rest)
        inside = RemoteBatchNorm(backend, str(self.name), self.inplace, self._train, again)
        inside._calctype = self._calctype
        return inside

    def __repr__(self) -> str:
        """Name the layer and its server."""
        config, address = self._backend.config, self._remote.connection.text
        domain = f", domain {self.domain!r}" if self.domain else ""
        how = f"{domain} on {address}{self._remote.how}"
        return f"<RemoteBatchNorm {self.name!r}: {config.kind.label}({config.maps}){how}>"


def backend_of(layer: object) -> RemoteBackend | None:
    """Return what is behind a handle of a layer on a server; None of anything else."""
    return layer._remote if isinstance(layer, RemoteBatchNorm) else None
