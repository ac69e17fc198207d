"""What whoever looks after a server's layers asks for: modes, snapshots, a way back, a copy of all."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TypeAlias

from google.protobuf.message import Message

from sharednorm._once import Keys
from sharednorm._server import Caller, Exchanger
from sharednorm.config import check_flag, is_integer
from sharednorm.errors import InvalidConfiguration
from sharednorm.v1 import layer_pb2, service_pb2

Request: TypeAlias = service_pb2.SetTrainRequest | service_pb2.RollbackRequest


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


def set_train(exchange: Exchanger, ref: layer_pb2.LayerRef, train: bool) -> None:
    """Set the mode of calls that choose none."""
    request = service_pb2.SetTrainRequest(ref=ref, train=check_flag("train", train))
    _once(exchange, "SetTrain", request, service_pb2.SetTrainResponse)


def list_snapshots(connection: Caller, ref: layer_pb2.LayerRef) -> list[SnapshotInfo]:
    """Return the snapshots of a layer, the oldest first."""
    request, attempts = service_pb2.ListSnapshotsRequest(ref=ref), connection.patience()
    answer = connection.call("ListSnapshots", request, service_pb2.ListSnapshotsResponse, attempts=attempts)
    return [
        SnapshotInfo(each.version, datetime.fromtimestamp(each.taken, timezone.utc), each.num_of_props)
        for each in answer.snapshots
    ]


def roll_back(exchange: Exchanger, ref: layer_pb2.LayerRef, version: int) -> None:
    """Bring a layer back to a snapshot.

    Raises:
        InvalidConfiguration: That is no version.
    """
    if not (is_integer(version) and 0 <= version < 1 << 64):
        raise InvalidConfiguration(f"version is {ascii(version)[:60]} (expected: that of a snapshot)")
    request = service_pb2.RollbackRequest(ref=ref, version=int(version))
    _once(exchange, "Rollback", request, service_pb2.RollbackResponse)


def back_up(connection: Caller) -> str:
    """Have the server copy all that it keeps to a file; return the file's path."""
    return connection.call("Backup", service_pb2.BackupRequest(), service_pb2.BackupResponse).path


def _once(exchange: Exchanger, method: str, request: Request, answer: type[Message]) -> None:
    connection = exchange.connection
    Keys(exchange.session).once(
        request, connection.deadline(), lambda attempts: connection.call(method, request, answer, attempts=attempts)
    )
