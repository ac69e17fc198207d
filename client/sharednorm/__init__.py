"""Batch-normalization layers that live on one server and behave like local ones in every process.

from sharednorm import BatchNorm2D            # in this process
hub = sharednorm.connect("gpu-box:50051")     # on a server
bn = hub.BatchNorm2D(64, name="stem/bn")
"""

import os

# Before anything imports gRPC, which reads it once. gRPC's fork handlers are off: they complain on stderr
# whenever a process forks during a call, and then do nothing. See `connect` for what a forked child may do.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from sharednorm._version import __version__
from sharednorm.coordination.group import Group
from sharednorm.errors import (
    BackupFailed,
    BackwardInEval,
    BackwardWithoutForward,
    CallCancelled,
    ConfigurationMismatch,
    DataLoss,
    DeadlineExceeded,
    DeviceLost,
    DeviceOutOfMemory,
    GroupAborted,
    GroupMismatch,
    HubClosed,
    IncompatibleServer,
    InplaceInTraining,
    InputEvicted,
    InternalError,
    InvalidConfiguration,
    InvalidFile,
    InvalidName,
    InvalidPageToken,
    InvalidShape,
    KeyReused,
    LayerEmpty,
    LayerNotFound,
    LimitExceeded,
    MalformedMessage,
    ModuleError,
    NonFiniteInput,
    NotSupported,
    PermissionDenied,
    ServerBusy,
    ServerUnavailable,
    SessionExpired,
    SharedNormError,
    SnapshotNotFound,
    StaleGeneration,
    StepOutOfOrder,
    StoreFailed,
    StoreUnavailable,
    TooFewValues,
    Unauthenticated,
    UnsupportedDType,
)
from sharednorm.layers.batch_norm import Layer
from sharednorm.layers.local import BatchNorm, BatchNorm1D, BatchNorm2D, BatchNorm3D
from sharednorm.layers.statistics import Statistics, StatisticsDelta
from sharednorm.layers.variable import Variable
from sharednorm.remote.connect import connect
from sharednorm.remote.hub import Hub, LayerInfo, Progress, ServerInfo, SnapshotInfo
from sharednorm.transport.credentials import TLS

__all__ = [
    "TLS",
    "BackupFailed",
    "BackwardInEval",
    "BackwardWithoutForward",
    "BatchNorm",
    "BatchNorm1D",
    "BatchNorm2D",
    "BatchNorm3D",
    "CallCancelled",
    "ConfigurationMismatch",
    "DataLoss",
    "DeadlineExceeded",
    "DeviceLost",
    "DeviceOutOfMemory",
    "Group",
    "GroupAborted",
    "GroupMismatch",
    "Hub",
    "HubClosed",
    "IncompatibleServer",
    "InplaceInTraining",
    "InputEvicted",
    "InternalError",
    "InvalidConfiguration",
    "InvalidFile",
    "InvalidName",
    "InvalidPageToken",
    "InvalidShape",
    "KeyReused",
    "Layer",
    "LayerEmpty",
    "LayerInfo",
    "LayerNotFound",
    "LimitExceeded",
    "MalformedMessage",
    "ModuleError",
    "NonFiniteInput",
    "NotSupported",
    "PermissionDenied",
    "Progress",
    "ServerBusy",
    "ServerInfo",
    "ServerUnavailable",
    "SessionExpired",
    "SharedNormError",
    "SnapshotInfo",
    "SnapshotNotFound",
    "StaleGeneration",
    "Statistics",
    "StatisticsDelta",
    "StepOutOfOrder",
    "StoreFailed",
    "StoreUnavailable",
    "TooFewValues",
    "Unauthenticated",
    "UnsupportedDType",
    "Variable",
    "__version__",
    "connect",
]

# The public classes and functions belong to this package, whichever module defines them: tracebacks, help() and pickles
# name `sharednorm`, and survive a move of that module.
for _name in __all__:
    if callable(_public := globals()[_name]):
        _public.__module__ = __name__
del _name, _public
