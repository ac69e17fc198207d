"""Administration of a server's layers: lists, default modes, snapshots, rollback, backup."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TypeAlias

from google.protobuf.message import Message

from sharednorm.codec import convert
from sharednorm.coordination.idempotency import Keys
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.validation import check_flag, is_integer
from sharednorm.errors import InvalidConfiguration
from sharednorm.remote.context import HubContext
from sharednorm.transport.base import RpcClient
from sharednorm.v1 import layer_pb2, service_pb2

Request: TypeAlias = service_pb2.SetTrainRequest | service_pb2.RollbackRequest


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
        stats_frozen: Whether training steps leave the running statistics as they are.
        domains: Domains that it keeps statistics of beside its own, which those above are.
    """

    name: str
    config: LayerConfig
    train: bool
    version: int
    num_of_props: int
    initialized: bool
    stats_frozen: bool
    domains: int


def list_layers(connection: RpcClient, namespace: str) -> list[LayerInfo]:
    """Return all layers of a namespace, in the order of their names."""
    found: list[LayerInfo] = []
    token = ""
    while True:
        request = service_pb2.ListLayersRequest(namespace=namespace, page_size=1000, page_token=token)
        answer = connection.call("ListLayers", request, service_pb2.ListLayersResponse, attempts=connection.retrying())
        found += map(_info, answer.layers)
        token = answer.next_page_token
        if not token:
            return found


def _info(layer: layer_pb2.Layer) -> LayerInfo:
    return LayerInfo(
        layer.ref.name,
        convert.config_from_proto(layer.config),
        convert.is_train(layer.default_mode),
        layer.version,
        layer.num_of_props,
        layer.initialized,
        layer.stats_frozen,
        layer.domains,
    )


@dataclass(frozen=True)
class SnapshotInfo:
    """An earlier state of a layer, to which it can be brought back.

    Attributes:
        version: The layer's version then: steps that it had applied.
        taken: When it was taken.
        num_of_props: Steps that its running statistics had taken in.
    """

    version: int
    taken: datetime
    num_of_props: int


def set_train(context: HubContext, ref: layer_pb2.LayerRef, train: bool) -> None:
    """Set the mode of calls that choose none."""
    request = service_pb2.SetTrainRequest(ref=ref, train=check_flag("train", train))
    _once(context, ref, "SetTrain", request, service_pb2.SetTrainResponse)


def list_snapshots(connection: RpcClient, ref: layer_pb2.LayerRef) -> list[SnapshotInfo]:
    """Return the snapshots of a layer, the oldest first."""
    request, attempts = service_pb2.ListSnapshotsRequest(ref=ref), connection.retrying()
    answer = connection.call("ListSnapshots", request, service_pb2.ListSnapshotsResponse, attempts=attempts)
    return [
        SnapshotInfo(each.version, datetime.fromtimestamp(each.taken, timezone.utc), each.num_of_props)
        for each in answer.snapshots
    ]


def roll_back(context: HubContext, ref: layer_pb2.LayerRef, version: int) -> None:
    """Bring a layer back to a snapshot.

    Raises:
        InvalidConfiguration: That is no version.
    """
    if not (is_integer(version) and 0 <= version < 1 << 64):
        raise InvalidConfiguration(f"version is {ascii(version)[:60]} (expected: that of a snapshot)")
    request = service_pb2.RollbackRequest(ref=ref, version=int(version))
    _once(context, ref, "Rollback", request, service_pb2.RollbackResponse)


def back_up(connection: RpcClient) -> str:
    """Have the server copy all that it keeps to a file; return the file's path."""
    return connection.call("Backup", service_pb2.BackupRequest(), service_pb2.BackupResponse).path


def _once(context: HubContext, ref: layer_pb2.LayerRef, method: str, request: Request, answer: type[Message]) -> None:
    connection = context.exchange.of("layer", ref.name).connection
    Keys(context.session).once(
        request, connection.deadline(), lambda attempts: connection.call(method, request, answer, attempts=attempts)
    )
