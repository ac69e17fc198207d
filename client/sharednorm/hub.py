"""The connection to a server, and the layers that stand there.

hub = sharednorm.connect("gpu-box:50051")
bn = hub.BatchNorm2D(64, name="stem/bn")    # creates the layer, or attaches to the one of that name
y = bn(x)
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import final

import numpy as np

from sharednorm import convert
from sharednorm._address import parse_address
from sharednorm._calls import Connection, ServerInfo
from sharednorm.config import MAX_SECONDS, LayerConfig, LayerKind, check_flag, check_name, check_namespace, is_finite
from sharednorm.errors import InvalidConfiguration
from sharednorm.remote import RemoteBackend, RemoteBatchNorm, is_train
from sharednorm.state import StateUpdate, initial_state
from sharednorm.v1 import layer_pb2, service_pb2

__all__ = ["Hub", "LayerInfo", "ServerInfo", "connect"]


@dataclass(frozen=True)
class LayerInfo:
    """A layer as it was when the server was asked.

    Attributes:
        name: Its name.
        config: Its configuration.
        train: The mode of handles that have not chosen one: True for train.
        version: Steps applied since it was created.
        num_of_props: Steps that its running statistics have taken in.
        initialized: False if it was created with `empty=True` and has not been loaded yet.
    """

    name: str
    config: LayerConfig
    train: bool
    version: int
    num_of_props: int
    initialized: bool


def connect(
    address: str, *, namespace: str = "default", token: None = None, tls: None = None, timeout: float = 30.0
) -> Hub:
    """Connect to a server.

    Processes that use one are spawned, not forked: a child that is forked after the first `connect` can neither
    use its parent's hubs nor connect anew, and is told so. (It can connect if GRPC_ENABLE_FORK_SUPPORT=1 was in
    the environment when gRPC was imported, as far as gRPC's own support of that goes.)

    Args:
        address: Where it listens: "host:port", "[::1]:port" or "unix:/path/of/socket".
        namespace: Whose layers these are; two namespaces never see each other's.
        token: Must be None: servers of this release ask for no token.
        tls: Must be None: servers of this release speak plaintext only.
        timeout: Seconds that any one call may take, a large tensor's way there and back included; > 0,
            at most 1e8.

    Raises:
        InvalidConfiguration: An argument is not what it should be.
        InvalidName: The namespace is too long, or has control characters.
        ServerUnavailable: Nobody listens there.
        DeadlineExceeded: Whoever listens there did not answer in time.
        IncompatibleServer: It is not a sharednorm server, or one that speaks another protocol.
        HubClosed: This process was forked from one that was connected.
    """
    where = parse_address(address)
    for name, value in (("token", token), ("tls", tls)):
        if value is not None:
            raise InvalidConfiguration(
                f"{name} is given, and this release has neither tokens nor TLS (expected: None; keep the server on "
                "loopback or a unix socket, and reach it through an SSH tunnel or the like)"
            )
    if not (is_finite(timeout) and 0 < timeout <= MAX_SECONDS):
        raise InvalidConfiguration(
            f"timeout is {ascii(timeout)[:120]} (expected: a finite number of seconds > 0, at most {MAX_SECONDS:g})"
        )
    checked = check_namespace(namespace)
    connection = Connection(where, float(timeout))
    try:
        connection.greet()
    except BaseException:
        connection.close()
        raise
    return Hub(connection, checked)


@final
class Hub:
    """One server, seen from one namespace. Made by `connect`; any number of threads may use it.

    It belongs to the process that made it; see `connect` about forks. As a context manager it closes
    itself. Handles of its layers stay usable as long as it is open.

    Every method raises ServerUnavailable, DeadlineExceeded or IncompatibleServer if the server does not
    answer as it should, and HubClosed after `close`.
    """

    def __init__(self, connection: Connection, namespace: str) -> None:
        self._connection = connection
        self._namespace = namespace

    def __repr__(self) -> str:
        """Name the server, the namespace, and whether the hub is closed."""
        info = self._connection.info
        server = f", server {info.version}, device {info.device}, state {info.store}" if info else ""
        closed = ", closed" if self._connection.closed else ""
        return f"<Hub {self.address}, namespace {self._namespace!r}{server}{closed}>"

    def __enter__(self) -> Hub:
        """Return the hub itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the hub."""
        self.close()

    @property
    def address(self) -> str:
        """Where the server listens, as `connect` was told."""
        return self._connection.address.text

    @property
    def namespace(self) -> str:
        """Whose layers these are."""
        return self._namespace

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._connection.closed

    @property
    def info(self) -> ServerInfo:
        """What the server is and what it accepts. Asks it anew."""
        return self._connection.greet()

    def close(self) -> None:
        """Let go of the connection. Running calls end with HubClosed; the layers stay on the server."""
        self._connection.close()

    def layers(self) -> list[LayerInfo]:
        """Return all layers of the namespace, in the order of their names."""
        found: list[LayerInfo] = []
        token = ""
        while True:
            request = service_pb2.ListLayersRequest(namespace=self._namespace, page_size=1000, page_token=token)
            answer = self._connection.call("ListLayers", request, service_pb2.ListLayersResponse)
            found += map(_info, answer.layers)
            token = answer.next_page_token
            if not token:
                return found

    def layer(self, name: str) -> RemoteBatchNorm:
        """Return a handle of an existing layer.

        Raises:
            LayerNotFound: There is none of that name.
            InvalidName: No layer could have it.
        """
        ref = self._ref(name)
        answer = self._connection.call("GetLayer", service_pb2.GetLayerRequest(ref=ref), service_pb2.GetLayerResponse)
        return self._handle(answer.layer, inplace=False)

    def delete(self, name: str) -> None:
        """Forget a layer and all that it has learned, for everybody.

        Raises:
            LayerNotFound: There is none of that name.
            InvalidName: No layer could have it.
        """
        request = service_pb2.DeleteLayerRequest(ref=self._ref(name))
        self._connection.call("DeleteLayer", request, service_pb2.DeleteLayerResponse)

    def set_train(self, name: str, train: bool) -> None:
        """Set the mode of all handles, of whatever process, that have chosen none by trainMode() or evalMode().

        Raises:
            LayerNotFound: There is none of that name.
            InvalidName: No layer could have it.
            InvalidConfiguration: `train` is neither True nor False.
        """
        request = service_pb2.SetTrainRequest(ref=self._ref(name), train=check_flag("train", train))
        self._connection.call("SetTrain", request, service_pb2.SetTrainResponse)

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
    ) -> RemoteBatchNorm:
        """Return a handle of a layer for matrices, (N, C). See `BatchNorm2D`."""
        config = LayerConfig.parse(
            LayerKind.BATCH_NORM, size, epsilon, initFactor, minFactor, affine, averaging, nonfinite
        )
        return self._create(config, sscale, name, empty, inplace)

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
    ) -> RemoteBatchNorm:
        """Return a handle of a layer for sequences, (N, C, L). See `BatchNorm2D`."""
        config = LayerConfig.parse(
            LayerKind.BATCH_NORM_1D, maps, epsilon, initFactor, minFactor, affine, averaging, nonfinite
        )
        return self._create(config, sscale, name, empty, inplace)

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

        Raises:
            InvalidConfiguration: An argument is out of its range.
            InvalidName: There is no name, or not one that a layer could have.
            ConfigurationMismatch: The name is taken by a layer of another configuration; the message names
                the fields that differ.
        """
        config = LayerConfig.parse(
            LayerKind.BATCH_NORM_2D, maps, epsilon, initFactor, minFactor, affine, averaging, nonfinite
        )
        return self._create(config, sscale, name, empty, inplace)

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
    ) -> RemoteBatchNorm:
        """Return a handle of a layer for volumes, (N, C, D, H, W). See `BatchNorm2D`."""
        config = LayerConfig.parse(
            LayerKind.BATCH_NORM_3D, maps, epsilon, initFactor, minFactor, affine, averaging, nonfinite
        )
        return self._create(config, sscale, name, empty, inplace)

    def _create(
        self, config: LayerConfig, sscale: float, name: str | None, empty: bool, inplace: bool
    ) -> RemoteBatchNorm:
        ref = self._ref(name)
        # Drawn here, and as a local layer draws it: after np.random.seed both begin alike.
        state = initial_state(config, sscale, np.random, empty=empty)
        request = service_pb2.CreateLayerRequest(
            ref=ref, config=convert.config_to_proto(config), sscale=float(sscale), empty=empty
        )
        if not empty:
            # Bias, mean and variance begin on the server as they begin here: 0, 0 and 1.
            request.initial_state.CopyFrom(convert.update_to_proto(StateUpdate(scale=state.scale)))
        answer = self._connection.call("CreateLayer", request, service_pb2.CreateLayerResponse)
        return self._handle(answer.layer, inplace)

    def _handle(self, layer: layer_pb2.Layer, inplace: bool) -> RemoteBatchNorm:
        # The answer's ref has the layer's uid: a handle stays with this layer, whoever gets its name later.
        backend = RemoteBackend(self._connection, layer.ref, convert.config_from_proto(layer.config))
        return RemoteBatchNorm(backend, layer.ref.name, inplace, train=None)

    def _ref(self, name: str | None) -> layer_pb2.LayerRef:
        return convert.ref_to_proto(self._namespace, check_name(name))


def _info(layer: layer_pb2.Layer) -> LayerInfo:
    return LayerInfo(
        layer.ref.name,
        convert.config_from_proto(layer.config),
        is_train(layer.default_mode),
        layer.version,
        layer.num_of_props,
        layer.initialized,
    )
