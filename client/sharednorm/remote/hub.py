"""A server's layers.

hub = sharednorm.connect("gpu-box:50051")
bn = hub.BatchNorm2D(64, name="stem/bn")    # creates the layer, or attaches to the one of that name
y = bn(x)
"""

from __future__ import annotations

import operator
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from sharednorm.codec import convert
from sharednorm.coordination.group import Group
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import StateUpdate, initial_state
from sharednorm.core.types import Array, LayerKind
from sharednorm.core.validation import check_domain, check_name
from sharednorm.errors import InvalidShape, SharedNormError
from sharednorm.layers.input_checks import dtype_from
from sharednorm.remote.admin import LayerInfo, SnapshotInfo, back_up, list_layers, list_snapshots, roll_back, set_train
from sharednorm.remote.backends.server_compute import create_domain
from sharednorm.remote.context import HubContext
from sharednorm.remote.handle import RemoteBatchNorm
from sharednorm.remote.options import HandleOptions
from sharednorm.remote.refresh import refresh
from sharednorm.transport.base import ServerInfo, Transport
from sharednorm.transport.progress import Progress
from sharednorm.v1 import layer_pb2, service_pb2

__all__ = ["Hub", "LayerInfo", "Progress", "ServerInfo", "SnapshotInfo"]


class HubSpec(NamedTuple):
    """What `connect` needs to know to make the same hub again."""

    address: str
    namespace: str
    timeout: float
    transport: str
    consistency: str


@final
class Hub:
    """One server, seen from one namespace. Made by `connect`; any number of threads may use it.

    It belongs to the process that made it; see `connect` about forks. As a context manager it closes
    itself. Handles of its layers stay usable as long as it is open.

    Every method raises ServerUnavailable, DeadlineExceeded or IncompatibleServer if the server does not
    answer as it should, and HubClosed after `close`.
    """

    def __init__(
        self,
        exchange: Transport,
        namespace: str,
        attach_again: Callable[..., RemoteBatchNorm],
        *,
        strong: bool = False,
    ) -> None:
        self._context = HubContext(exchange)
        self._attach_again = attach_again  # how a pickled handle finds its hub, which only `connect` knows
        self._exchange = exchange
        self._strong = strong
        self._connection = exchange.connection
        self._namespace = namespace
        self._groups: weakref.WeakSet[Group] = weakref.WeakSet()

    def __repr__(self) -> str:
        """Name the server, the namespace, and whether the hub is closed."""
        info = self._connection.info
        server = f", server {info.version}, device {info.device}, state {info.store}" if info else ""
        server += f", tensors by {self.transport}"
        closed = ", closed" if self._connection.closed else ""
        return f"<Hub {self.address}, namespace {self._namespace!r}{server}{closed}>"

    def __enter__(self) -> Hub:
        """Return the hub itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the hub; after an exception without leaving groups, whose other members hear that one is missing.

        After an exception, what `close` would raise is a RuntimeWarning instead.
        """
        if kind is None:
            self.close()
            return
        self._groups.clear()
        unsaid = self._close()
        if unsaid is not None:
            warnings.warn(str(unsaid), RuntimeWarning, stacklevel=2)

    @property
    def address(self) -> str:
        """Where the server listens, as `connect` was told."""
        return self._connection.text

    @property
    def namespace(self) -> str:
        """Whose layers these are."""
        return self._namespace

    @property
    def place(self) -> HubSpec:
        """What it takes to make the same hub again."""
        timeout, requested_transport = self._connection.timeout, self._exchange.requested_transport
        return HubSpec(
            self.address, self._namespace, timeout, requested_transport, "strong" if self._strong else "bounded"
        )

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._connection.closed

    @property
    def info(self) -> ServerInfo:
        """What the server is and what it accepts. Asks it anew."""
        return self._connection.handshake()

    @property
    def transport(self) -> str:
        """How tensors travel now: "shm", "direct" or "grpc"; see `connect`."""
        return self._exchange.transport

    def close(self) -> None:
        """Leave the groups, and let go of the connection. Running calls end with HubClosed; the layers stay.

        Steps of handles with `push="async"` are waited for first, as long as the hub's timeout.

        Raises:
            SharedNormError: The hub is closed, and steps were not answered in time, or an earlier one has failed and
                no call has raised that yet; the message says how many.
        """
        unsaid = self._close()
        if unsaid is not None:
            raise unsaid

    def flush(self) -> None:
        """Wait until the server has answered every step of this hub's handles with `push="async"`.

        Raises:
            SharedNormError: What a step has ended with, if no other call has raised it yet. Of several handles, the
                first one's; the others raise theirs at their next calls.
        """
        self._context.sender.settle_all()

    def empty(self, shape: int | Sequence[int], dtype: npt.DTypeLike = np.float32) -> Array:
        """Return an array for a tensor: what is computed into it is sent with as little copying as there can be.

        With transport "shm" it lies in memory that the server reads, and results written there (`bn(x, out=y)`) come
        without any copy; so do `hub.empty` arrays, and results of layers, that are passed on to other layers of this
        hub. By any other transport it is an ordinary array. It stays valid as long as somebody holds it, also when the
        hub is closed. After a call that ended without the server's answer (a deadline, Ctrl-C), the server may still
        read and write the arrays of that call for a moment: let go of them, and take new ones.

        Args:
            shape: Its shape.
            dtype: float32, float16 or bfloat16.

        Returns:
            A C-contiguous, writable array that holds whatever its memory did.

        Raises:
            UnsupportedDType: Another element type.
            InvalidShape: A size is negative or not an integer.
            LimitExceeded: The server shares no more memory with this process, and the transport has to be "shm".
        """
        kind = dtype_from(dtype)
        try:
            sizes = tuple(operator.index(size) for size in ((shape,) if isinstance(shape, int) else shape))
        except TypeError:
            sizes = (-1,)
        if min(sizes, default=1) < 0:
            raise InvalidShape(f"the shape is {ascii(shape)[:120]} (expected: sizes, each an integer >= 0)")
        return self._exchange.empty(sizes, kind)

    def refresh(self, *layers: RemoteBatchNorm) -> None:
        """Read what many handles keep of their layers in one call, so that none has to before it gets too old.

        Parameters and statistics come of those layers alone that have changed since they were read; each is of a
        moment of its own. More than 1024 handles, or 131,072 maps, take another call.

        Args:
            layers: Handles of this hub with `compute="client"` and a `max_staleness`, which begins anew with this call.

        Raises:
            InvalidConfiguration: One is something else; nothing was read.
            LayerNotFound, LayerEmpty: So is the first layer that could not be read; the others have been.
        """
        refresh(self._context, layers)

    def layers(self) -> list[LayerInfo]:
        """Return all layers of the namespace, in the order of their names."""
        return list_layers(self._connection, self._namespace)

    def layer(
        self,
        name: str,
        *,
        compute: str = "server",
        max_staleness: float = 0.0,
        wire_dtype: str | None = None,
        group: Group | None = None,
        push: str = "sync",
        max_pending: int | None = None,
        domain: str = "",
    ) -> RemoteBatchNorm:
        """Return a handle of an existing layer.

        Args:
            name: The layer's.
            compute: Where this handle's tensors are computed with; see `BatchNorm2D`. So for the others.
            max_staleness: Seconds for which evaluation may use cached parameters and statistics.
            wire_dtype: What float32 tensors travel in.
            group: With whose batches this handle's are normalized.
            push: Whether training waits for the server.
            max_pending: How far training may be ahead of it.
            domain: Whose statistics the handle uses.

        Raises:
            LayerNotFound: There is none of that name, or it has no such domain.
            InvalidName: No layer could have it.
            InvalidConfiguration: One of the others is none of those that there are.
        """
        handling = HandleOptions.parse(compute, max_staleness, wire_dtype, group, push, max_pending)
        ref = self._ref(name, domain)
        request, attempts = service_pb2.GetLayerRequest(ref=ref), self._connection.retrying()
        answer = self._for(name).connection.call("GetLayer", request, service_pb2.GetLayerResponse, attempts=attempts)
        return self._handle(answer.layer, False, handling)

    def delete(self, name: str) -> None:
        """Forget a layer and all that it has learned, for everybody.

        Raises:
            LayerNotFound: There is none of that name.
            InvalidName: No layer could have it.
        """
        request = service_pb2.DeleteLayerRequest(ref=self._ref(name))
        self._for(name).connection.call("DeleteLayer", request, service_pb2.DeleteLayerResponse)

    def set_train(self, name: str, train: bool) -> None:
        """Set the mode of all handles, of whatever process, that have chosen none by trainMode() or evalMode().

        Raises:
            LayerNotFound: There is none of that name.
            InvalidName: No layer could have it.
            InvalidConfiguration: `train` is neither True nor False.
        """
        set_train(self._context, self._ref(name), train)

    def snapshots(self, name: str) -> list[SnapshotInfo]:
        """Return the states of a layer that the server has kept, the oldest first; raises what `delete` raises."""
        return list_snapshots(self._for(name).connection, self._ref(name))

    def rollback(self, name: str, version: int) -> None:
        """Bring a layer back to a snapshot, for everybody: parameters, and statistics with those of all domains.

        What it has now becomes a snapshot first. Accumulated gradients are 0 then, and `version` goes on as it was.

        Raises:
            SnapshotNotFound: There is none of that version.
            LayerNotFound, InvalidName: There is no layer of that name, or could be none.
        """
        roll_back(self._context, self._ref(name), version)

    def backup(self) -> str:
        """Have the server copy all that it keeps to a file, while it works; return the file's path on its machine.

        Raises:
            BackupFailed: It could not, or keeps nothing.
        """
        return back_up(self._connection)

    def BatchNorm(
        self,
        size: int,
        epsilon: float = 1e-5,
        initFactor: float = 1.0,
        minFactor: float = 0.1,
        sscale: float = 0.01,
        affine: bool = True,
        name: str | None = None,
        empty: bool = False,
        inplace: bool = False,
        *,
        averaging: str = "standard",
        nonfinite: str = "refuse",
        compute: str = "server",
        max_staleness: float = 0.0,
        wire_dtype: str | None = None,
        group: Group | None = None,
        push: str = "sync",
        max_pending: int | None = None,
        domain: str = "",
    ) -> RemoteBatchNorm:
        """Return a handle of a layer for matrices, (N, C). See `BatchNorm2D`."""
        config = LayerConfig.parse(
            LayerKind.BATCH_NORM, size, epsilon, initFactor, minFactor, affine, averaging, nonfinite
        )
        handling = HandleOptions.parse(compute, max_staleness, wire_dtype, group, push, max_pending)
        return self._create(config, sscale, name, empty, inplace, handling, domain)

    def BatchNorm1D(
        self,
        maps: int,
        epsilon: float = 1e-5,
        initFactor: float = 1.0,
        minFactor: float = 0.1,
        sscale: float = 0.01,
        affine: bool = True,
        name: str | None = None,
        empty: bool = False,
        inplace: bool = False,
        *,
        averaging: str = "standard",
        nonfinite: str = "refuse",
        compute: str = "server",
        max_staleness: float = 0.0,
        wire_dtype: str | None = None,
        group: Group | None = None,
        push: str = "sync",
        max_pending: int | None = None,
        domain: str = "",
    ) -> RemoteBatchNorm:
        """Return a handle of a layer for sequences, (N, C, L). See `BatchNorm2D`."""
        config = LayerConfig.parse(
            LayerKind.BATCH_NORM_1D, maps, epsilon, initFactor, minFactor, affine, averaging, nonfinite
        )
        handling = HandleOptions.parse(compute, max_staleness, wire_dtype, group, push, max_pending)
        return self._create(config, sscale, name, empty, inplace, handling, domain)

    def BatchNorm2D(
        self,
        maps: int,
        epsilon: float = 1e-5,
        initFactor: float = 1.0,
        minFactor: float = 0.1,
        sscale: float = 0.01,
        affine: bool = True,
        name: str | None = None,
        empty: bool = False,
        inplace: bool = False,
        *,
        averaging: str = "standard",
        nonfinite: str = "refuse",
        compute: str = "server",
        max_staleness: float = 0.0,
        wire_dtype: str | None = None,
        group: Group | None = None,
        push: str = "sync",
        max_pending: int | None = None,
        domain: str = "",
    ) -> RemoteBatchNorm:
        """Create a layer for images, (N, C, H, W), or attach to the one of that name.

        The arguments are those of the local `sharednorm.BatchNorm2D`. A new layer's scale is drawn here by
        `np.random`, as a local layer draws it, so that both begin alike after `np.random.seed`; a layer that
        exists keeps what it has.

        Args:
            maps: Channels, C.
            epsilon: Added to the variance before the square root, > 0.
            initFactor: Numerator of the averaging factor f = max(initFactor / n, minFactor) at step n, >= 0.
            minFactor: Lower bound of f, 0 to 1.
            sscale: Standard deviation of the initial scale, >= 0.
            affine: Whether scale and bias are parameters.
            name: What the layer is shared by: 1 to 512 bytes of UTF-8.
            empty: Whether a new layer waits for `load` instead of beginning with a random scale.
            inplace: Whether this handle's output replaces its input, in eval mode. Training is then refused.
            averaging: "standard", where f weighs the batch, or "printed", where it weighs the old average.
            nonfinite: What a training batch with a NaN or an infinity does: "refuse" or "allow".
            compute: "server", or "client": tensors stay in this process, which computes with numba or NumPy, and only
                the moments of its batches travel, 16 bytes a map, and gradients of scale and bias. The numbers are
                those of a server that computes on its processor, bit for bit.
            max_staleness: With `compute="client"`: seconds for which evaluation may use the parameters and statistics
                that this handle has cached; 0 reads them for each batch. After a step or change of its own the handle
                reads them again.
            wire_dtype: What this handle's float32 tensors travel in, both ways: "bfloat16" or "float16", each value
                rounded to nearest, ties to even; None: as they are. The layer computes with what arrives, and its
                statistics are those of what arrives: relative rounding errors of up to 2^-9 or 2^-12 in each value.
                float16 has no values beyond 65504, which are refused on their way there and become infinities on
                their way back, and none but 0 below 6e-8.
            group: With `compute="client"`: the processes whose training batches are normalized by their union; see
                `Group`. Such a handle begins in train mode, whatever the layer's default.
            push: With `compute="client"`: "sync", or "async": a training forward does not wait until the server has
                taken its step. Its output is normalized with the scale and bias that this handle has heard of last,
                which are the layer's unless somebody else changes them. Whatever else reads or changes the layer by
                this handle waits for its steps, which are taken in their order. A step that fails raises its error
                at the handle's next call, once; those behind it are not taken. Such a handle begins in train mode.
            max_pending: With `push="async"`: how many steps may not have been answered, 1 to 1024, before a forward
                waits; None: 8.
            domain: Whose running statistics this handle uses: those that the layer keeps of a site, a camera, a task,
                of that name, which is made if it is not there; see `inDomain`. "": the layer's own.

        Raises:
            InvalidConfiguration: An argument is out of its range.
            InvalidName: There is no name, or not one that a layer could have.
            ConfigurationMismatch: The name is taken by a layer of another configuration; the message names
                the fields that differ.
        """
        config = LayerConfig.parse(
            LayerKind.BATCH_NORM_2D, maps, epsilon, initFactor, minFactor, affine, averaging, nonfinite
        )
        handling = HandleOptions.parse(compute, max_staleness, wire_dtype, group, push, max_pending)
        return self._create(config, sscale, name, empty, inplace, handling, domain)

    def BatchNorm3D(
        self,
        maps: int,
        epsilon: float = 1e-5,
        initFactor: float = 1.0,
        minFactor: float = 0.1,
        sscale: float = 0.01,
        affine: bool = True,
        name: str | None = None,
        empty: bool = False,
        inplace: bool = False,
        *,
        averaging: str = "standard",
        nonfinite: str = "refuse",
        compute: str = "server",
        max_staleness: float = 0.0,
        wire_dtype: str | None = None,
        group: Group | None = None,
        push: str = "sync",
        max_pending: int | None = None,
        domain: str = "",
    ) -> RemoteBatchNorm:
        """Return a handle of a layer for volumes, (N, C, D, H, W). See `BatchNorm2D`."""
        config = LayerConfig.parse(
            LayerKind.BATCH_NORM_3D, maps, epsilon, initFactor, minFactor, affine, averaging, nonfinite
        )
        handling = HandleOptions.parse(compute, max_staleness, wire_dtype, group, push, max_pending)
        return self._create(config, sscale, name, empty, inplace, handling, domain)

    def _close(self) -> SharedNormError | None:
        unsaid = None
        try:
            if not self._connection.closed:
                for group in list(self._groups):
                    group.say_goodbye()
                unsaid = self._context.sender.finish(self._connection.timeout)
        finally:  # also if whoever waits is interrupted
            self._connection.close()
            self._exchange.close()
        return unsaid

    def _create(
        self,
        config: LayerConfig,
        sscale: float,
        name: str | None,
        empty: bool,
        inplace: bool,
        handling: HandleOptions,
        domain: str,
        begin: StateUpdate | None = None,
    ) -> RemoteBatchNorm:
        inside = self._ref(name, domain)
        # Drawn here, and as a local layer draws it: after np.random.seed both begin alike.
        state = initial_state(config, sscale, np.random, empty=empty)
        request = service_pb2.CreateLayerRequest(
            ref=self._ref(name), config=convert.config_to_proto(config), sscale=float(sscale), empty=empty
        )
        if not empty:
            # Bias, mean and variance begin on the server as they begin here: 0, 0 and 1.
            first = StateUpdate(scale=state.scale) if begin is None else replace(begin, scale=state.scale)
            request.initial_state.CopyFrom(convert.update_to_proto(first))
        attempts = self._connection.retrying()
        connection = self._for(name).connection
        answer = connection.call("CreateLayer", request, service_pb2.CreateLayerResponse, attempts=attempts)
        layer = answer.layer
        if domain:
            inside.uid = layer.ref.uid
            layer = create_domain(connection, inside, begin)
        return self._handle(layer, inplace, handling)

    def _handle(self, layer: layer_pb2.Layer, inplace: bool, handling: HandleOptions) -> RemoteBatchNorm:
        # The answer's ref has the layer's uid: a handle stays with this layer, whoever gets its name later.
        config = convert.config_from_proto(layer.config)
        return self.attach(layer.ref, config, handling, inplace, handling.train)

    def attach(
        self, ref: layer_pb2.LayerRef, config: LayerConfig, handling: HandleOptions, inplace: bool, train: bool | None
    ) -> RemoteBatchNorm:
        """Return a handle of a layer that is known; for this library."""
        if handling.group is not None:
            handling.group.settle(self._exchange, self._namespace)
            self._groups.add(handling.group)
        ref.strong = self._strong
        backend = handling.backend(self._context, ref, config)
        again = self._attach_again, (self.place, ref.SerializeToString(), config, handling)
        return RemoteBatchNorm(backend, ref.name, inplace, train, again)

    def _for(self, name: str | None) -> Transport:
        return self._exchange.of("layer", check_name(name))

    def _ref(self, name: str | None, domain: str = "") -> layer_pb2.LayerRef:
        ref = convert.ref_to_proto(self._namespace, check_name(name), domain=check_domain(domain))
        ref.strong = self._strong
        return ref
