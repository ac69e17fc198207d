"""Every error that a layer, local or remote, raises on purpose.

    SharedNormError
    ├── ModuleError                     the layer was used in a way that it does not allow
    │   ├── InvalidShape                rank, channels or sizes of a tensor     (also a ValueError)
    │   ├── UnsupportedDType            element type of a tensor                (also a TypeError)
    │   ├── TooFewValues                one value a channel in training         (also a ValueError)
    │   ├── NonFiniteInput              NaN or infinity in training             (also a ValueError)
    │   ├── InplaceInTraining           `inplace=True` and train mode
    │   ├── BackwardWithoutForward      nothing to differentiate
    │   ├── BackwardInEval              gradients asked for in eval mode
    │   ├── LayerEmpty                  created empty, not loaded yet
    │   └── InvalidFile                 `load` of a file that does not fit
    ├── InvalidName                     of a layer or a namespace               (also a ValueError)
    ├── InvalidConfiguration            of a layer or a connection              (also a ValueError)
    ├── InvalidPageToken                                                        (also a ValueError)
    ├── ConfigurationMismatch           the name is taken by another configuration
    ├── LayerNotFound                                                           (also a LookupError)
    ├── SnapshotNotFound                                                        (also a LookupError)
    ├── BackupFailed                    the state could not be copied, and is as it was
    ├── DataLoss                        the server has lost steps that it had answered
    ├── Unauthenticated                 the server asks for a token, and this is none of its
    ├── PermissionDenied                the token is not for that, or not here
    ├── InputEvicted                    the server no longer keeps a forward's input
    ├── MalformedMessage                a message contradicts itself
    ├── LimitExceeded                   larger than the server's limit
    ├── ServerBusy                      too much is on its way to the server now; later it may not be
    ├── DeviceOutOfMemory               the server's GPU has no room for the call now
    ├── GroupMismatch                   a group has other settings, or no place (also a ValueError)
    ├── GroupAborted                    a member of the group is missing
    │   └── StaleGeneration             the group has gone on without this member
    ├── StepOutOfOrder                  steps did not come one after the other
    ├── KeyReused                       another change was made under the key of this one
    ├── SessionExpired                  whether a change was made before cannot be said any more
    ├── ServerUnavailable               not there, gone, or stopping            (also a ConnectionError)
    │   ├── DeviceLost                  the server's GPU has failed, and the server ends
    │   ├── StoreFailed                 the server cannot keep its state any more, and ends
    │   └── StoreUnavailable            what keeps the layers of several servers does not answer now
    ├── DeadlineExceeded                no answer in time                       (also a TimeoutError)
    ├── CallCancelled                   the call was given up
    ├── IncompatibleServer              another protocol, or not a sharednorm server
    ├── NotSupported                    in the contract, and not in the server's release
    ├── HubClosed                       used after `close`
    └── InternalError                   a defect on the server; its log has the details

With `push="async"` an error may be that of an earlier forward's step. Its message says so, and its metadata has
"steps_lost", how many steps of the handle were not taken, and "steps_unknown", how many may or may not have been.

This is the one table. Each class declares its reason, an UPPER_SNAKE word that identifies it on the
wire, and its gRPC status code, by number so that this module needs no gRPC; a class registers itself
by being defined. The server turns an exception into (code, reason, message, metadata), and the
client turns those back into the same class.
"""

from __future__ import annotations

from typing import ClassVar

MAX_MESSAGE_BYTES = 4096

# gRPC status codes, https://grpc.io/docs/guides/status-codes/
CANCELLED = 1
UNKNOWN = 2
INVALID_ARGUMENT = 3
DEADLINE_EXCEEDED = 4
NOT_FOUND = 5
ALREADY_EXISTS = 6
PERMISSION_DENIED = 7
RESOURCE_EXHAUSTED = 8
FAILED_PRECONDITION = 9
ABORTED = 10
UNIMPLEMENTED = 12
INTERNAL = 13
UNAVAILABLE = 14
DATA_LOSS = 15
UNAUTHENTICATED = 16

STEP_OVER = "group_step"
"""Metadata of an error with which a group's step has ended for all members: its number."""

GENERATION_GONE = "generation_gone"
"""Metadata of a StaleGeneration: the generation is gone for all its members, and this step was not taken."""

_registry: dict[str, type[SharedNormError]] = {}


class SharedNormError(Exception):
    """Base of all of them.

    Args:
        message: What was wrong, what was expected, what to do. Cut to 4 KiB of UTF-8. Any object that `str` takes:
            some libraries raise the error of a worker again as `type(error)(error)`.
        metadata: Values that a program may want; they survive the wire. None: those of `message`, if it has some.
    """

    reason: ClassVar[str]
    code: ClassVar[int]
    message: str
    metadata: dict[str, str]

    def __init_subclass__(cls, *, reason: str, code: int) -> None:
        """Register the class under its reason, which no other class may have."""
        super().__init_subclass__()
        if reason in _registry:
            raise TypeError(f"{cls.__name__} and {_registry[reason].__name__} share the reason {reason}")
        cls.reason, cls.code = reason, code
        _registry[reason] = cls

    def __init__(self, message: object = "", metadata: dict[str, str] | None = None) -> None:
        if metadata is None and isinstance(message, SharedNormError):
            metadata = message.metadata
        encoded = str(message).encode("utf-8", "backslashreplace")[:MAX_MESSAGE_BYTES]
        self.message = encoded.decode("utf-8", "ignore")
        self.metadata = dict(metadata or {})
        super().__init__(self.message)

    def __reduce__(self) -> tuple[type[SharedNormError], tuple[str, dict[str, str]]]:
        """Pickle with the metadata, so that an error crosses a process boundary whole."""
        return type(self), (self.message, self.metadata)


def error_class(reason: str) -> type[SharedNormError] | None:
    """Return the class that declares a reason, or None if no class does."""
    return _registry.get(reason)


def error_classes() -> tuple[type[SharedNormError], ...]:
    """Return all classes of the table, in the order of their definition."""
    return tuple(_registry.values())


class ModuleError(SharedNormError, reason="MODULE_ERROR", code=INVALID_ARGUMENT):
    """A layer was used in a way that it does not allow. The name is PuzzleLib's."""


class InvalidShape(ModuleError, ValueError, reason="INVALID_SHAPE", code=INVALID_ARGUMENT):
    """A tensor's or vector's rank, channels or sizes are not what the layer takes."""


class UnsupportedDType(ModuleError, TypeError, reason="UNSUPPORTED_DTYPE", code=INVALID_ARGUMENT):
    """A tensor's element type is not float32, float16 or bfloat16, or not the layer's `calctype`."""


class TooFewValues(ModuleError, ValueError, reason="TOO_FEW_VALUES", code=INVALID_ARGUMENT):
    """A training batch has one value a channel, of which no variance can be taken."""


class NonFiniteInput(ModuleError, ValueError, reason="NON_FINITE_INPUT", code=INVALID_ARGUMENT):
    """A training batch holds a NaN or an infinity, or its variance does not fit float32."""


class InplaceInTraining(ModuleError, reason="INPLACE_IN_TRAINING", code=FAILED_PRECONDITION):
    """An in-place layer was asked to train; backward would need the input that it overwrites."""


class BackwardWithoutForward(ModuleError, reason="BACKWARD_WITHOUT_FORWARD", code=FAILED_PRECONDITION):
    """Backward was called before any forward, or after the mode was set again."""


class BackwardInEval(ModuleError, reason="BACKWARD_IN_EVAL", code=FAILED_PRECONDITION):
    """Backward was called in eval mode, or for a forward in eval mode."""


class LayerEmpty(ModuleError, reason="LAYER_EMPTY", code=FAILED_PRECONDITION):
    """The layer was created with `empty=True` and has not been loaded yet."""


class InvalidFile(ModuleError, ValueError, reason="INVALID_FILE", code=INVALID_ARGUMENT):
    """A file is not one that `save` or PuzzleLib wrote, or is of another layer."""


class InvalidName(SharedNormError, ValueError, reason="INVALID_NAME", code=INVALID_ARGUMENT):
    """A layer's or namespace's name is empty, too long, or has control characters."""


class InvalidConfiguration(SharedNormError, ValueError, reason="INVALID_CONFIGURATION", code=INVALID_ARGUMENT):
    """A constructor's or setting's value is out of its range."""


class InvalidPageToken(SharedNormError, ValueError, reason="INVALID_PAGE_TOKEN", code=INVALID_ARGUMENT):
    """A page token is not one that the server gave."""


class ConfigurationMismatch(SharedNormError, reason="CONFIGURATION_MISMATCH", code=ALREADY_EXISTS):
    """The name is taken by a layer of another configuration; `metadata` names the fields that differ."""


class LayerNotFound(SharedNormError, LookupError, reason="LAYER_NOT_FOUND", code=NOT_FOUND):
    """No layer has that name, or it was deleted."""


class SnapshotNotFound(SharedNormError, LookupError, reason="SNAPSHOT_NOT_FOUND", code=NOT_FOUND):
    """The layer has no snapshot of that version; the message names those that it has."""


class BackupFailed(SharedNormError, reason="BACKUP_FAILED", code=FAILED_PRECONDITION):
    """The server could not copy its state to a file, or keeps none. The state itself is as it was."""


class DataLoss(SharedNormError, reason="DATA_LOSS", code=DATA_LOSS):
    """The server's layer is older than what it has told this handle: steps that were answered are lost."""


class Unauthenticated(SharedNormError, reason="UNAUTHENTICATED", code=UNAUTHENTICATED):
    """The server asks for a token, and the call had none, an unknown one, or one that has expired."""


class PermissionDenied(SharedNormError, reason="PERMISSION_DENIED", code=PERMISSION_DENIED):
    """The token is not for such a call in that namespace, whatever there is in it."""


class InputEvicted(SharedNormError, reason="INPUT_EVICTED", code=FAILED_PRECONDITION):
    """The server no longer keeps a forward's input. Remote layers send it again by themselves."""


class MalformedMessage(SharedNormError, reason="MALFORMED_MESSAGE", code=INVALID_ARGUMENT):
    """A message cannot be parsed, or its parts contradict each other."""


class LimitExceeded(SharedNormError, reason="LIMIT_EXCEEDED", code=RESOURCE_EXHAUSTED):
    """A request is larger than the server allows; the message says which limit."""


class ServerBusy(SharedNormError, reason="SERVER_BUSY", code=RESOURCE_EXHAUSTED):
    """The server has as much to do as it allows itself. Remote layers try again by themselves until their timeout."""


class DeviceOutOfMemory(SharedNormError, reason="DEVICE_OUT_OF_MEMORY", code=RESOURCE_EXHAUSTED):
    """The GPU has no room for a call, also without the inputs that were kept for backwards. Later it may have."""


class GroupMismatch(SharedNormError, ValueError, reason="GROUP_MISMATCH", code=FAILED_PRECONDITION):
    """A group has other settings than this member expects, or no place for it."""


class GroupAborted(SharedNormError, reason="GROUP_ABORTED", code=ABORTED):
    """A member of the group is missing: nobody's step was applied. The next step joins the group again."""


class StaleGeneration(GroupAborted, reason="STALE_GENERATION", code=FAILED_PRECONDITION):
    """The group has gone on without this member, or the server was started anew. The next step joins it again."""


class StepOutOfOrder(SharedNormError, reason="STEP_OUT_OF_ORDER", code=FAILED_PRECONDITION):
    """The steps of a group's member, or the changes of a session, did not come one after the other."""


class KeyReused(SharedNormError, reason="KEY_REUSED", code=FAILED_PRECONDITION):
    """Another change was made under the key that this one came with; this one was not made."""


class SessionExpired(SharedNormError, reason="SESSION_EXPIRED", code=FAILED_PRECONDITION):
    """The layer has forgotten the session of a call whose answer was lost: whether its change was made is not known."""


class ServerUnavailable(SharedNormError, ConnectionError, reason="UNAVAILABLE", code=UNAVAILABLE):
    """The server is not there, has gone in the middle of a call, or is stopping."""


class DeviceLost(ServerUnavailable, reason="DEVICE_LOST", code=UNAVAILABLE):
    """The server's GPU has failed and cannot be used any more by that process, which ends; nothing was changed."""


class StoreFailed(ServerUnavailable, reason="STORE_FAILED", code=UNAVAILABLE):
    """The server cannot keep its state any more, and ends; whether it has kept this change is not known."""


class StoreUnavailable(ServerUnavailable, reason="STORE_UNAVAILABLE", code=UNAVAILABLE):
    """The server cannot reach what keeps its layers, or that refuses. Remote layers try again until their timeout."""


class DeadlineExceeded(SharedNormError, TimeoutError, reason="DEADLINE_EXCEEDED", code=DEADLINE_EXCEEDED):
    """The answer did not come within the timeout."""


class CallCancelled(SharedNormError, reason="CANCELLED", code=CANCELLED):
    """The call was given up before its answer came."""


class IncompatibleServer(SharedNormError, reason="INCOMPATIBLE_SERVER", code=UNIMPLEMENTED):
    """The server speaks another protocol version, or is not a sharednorm server."""


class NotSupported(SharedNormError, reason="NOT_SUPPORTED", code=UNIMPLEMENTED):
    """The server's release does not serve, or does not know, a method or a field of the call; nothing was done."""


class HubClosed(SharedNormError, reason="HUB_CLOSED", code=FAILED_PRECONDITION):
    """The hub was closed, or belongs to the process that this one was forked from."""


class InternalError(SharedNormError, reason="INTERNAL", code=INTERNAL):
    """A defect. On the server, its log has the details under the id in the message."""
