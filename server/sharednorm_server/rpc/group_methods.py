"""The contract's methods of groups: convert, have the members meet, convert."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, TimeoutError  # noqa: A004 - of Python 3.10 it is not the built-in one
from typing import Any, TypeVar, final

from google.protobuf.message import Message

from sharednorm.codec import convert
from sharednorm.core.limits import MAX_GROUP_MEMBERS, MAX_GROUP_SECONDS
from sharednorm.core.types import NonFinitePolicy
from sharednorm.core.validation import check_group_name, is_finite
from sharednorm.errors import CallCancelled, InvalidConfiguration
from sharednorm.v1 import service_pb2
from sharednorm_server.groups.coordinator import GroupKey, Stepped, Summed, Synchronizer
from sharednorm_server.groups.state_machine import Done, GroupSettings
from sharednorm_server.layers.requests import BackwardCall, Wanted
from sharednorm_server.layers.service import LayerService
from sharednorm_server.rpc import unserved
from sharednorm_server.rpc.converters import key_of, namespace_of
from sharednorm_server.rpc.handlers import Unary

# How often a call that waits for others looks whether its client still does.
_ASK_SECONDS = 0.5

F = TypeVar("F")
M = TypeVar("M", bound=Message)
R = TypeVar("R", Stepped, Summed)


@final
class PendingGroupCall:
    """A call that waits for the other members.

    Args:
        future: Of what they all get.
        tell: Makes a message of that.
    """

    def __init__(self, future: Future[Done[R]], tell: Callable[[Done[R]], Message]) -> None:
        self.future: Future[Any] = future
        self._tell: Callable[[Any], Message] = tell

    def answer(self) -> bytes:
        """Return the answer, once the future is done; the same for all members, and so it is made once.

        Raises:
            SharedNormError: The future's.
        """
        done: Done[Stepped | Summed] = self.future.result()
        if done.replayed:
            return self._tell(done).SerializeToString()
        if done.result.told is None:
            done.result.told = self._tell(done).SerializeToString()
        return done.result.told


class GroupCalls:
    """Serves the groups of one `Synchronizer`.

    Args:
        service: Whose layers they step.
        groups: The groups.
    """

    def __init__(self, service: LayerService, groups: Synchronizer) -> None:
        self._service = service
        self._groups = groups

    def unary(self) -> dict[str, Unary]:
        """Return the methods, bytes in and bytes out. They wait for each other, and must not have to for a thread."""
        return {
            "JoinGroup": _plain(service_pb2.JoinGroupRequest, self.join),
            "LeaveGroup": _plain(service_pb2.LeaveGroupRequest, self.leave),
            "SynchronizeMoments": _waiting(self.moments),
            "SynchronizeGradients": _waiting(self.gradients),
        }

    def join(self, request: service_pb2.JoinGroupRequest, wanted: Wanted) -> service_pb2.JoinGroupResponse:
        """Join a group, once all members have."""
        key = GroupKey(namespace_of(request.namespace), check_group_name("group", request.group))
        size, most = request.size, MAX_GROUP_MEMBERS
        if not 1 <= size <= most or not 1 <= request.min_members <= size:
            raise InvalidConfiguration(
                f"a group of {size} members that goes on with {request.min_members} (expected: 1 to {most}, and 1 to "
                "as many)"
            )
        if not 0 < request.timeout <= MAX_GROUP_SECONDS:
            raise InvalidConfiguration(
                f"the group's timeout is {request.timeout!r} (expected: above 0, at most {MAX_GROUP_SECONDS:g})"
            )
        joining = self._groups.join(
            key,
            check_group_name("member", request.member),
            request.rank if request.HasField("rank") else None,
            GroupSettings(size, request.min_members, request.timeout),
        )
        membership = _awaited(joining, wanted)
        return service_pb2.JoinGroupResponse(
            ticket=membership.ticket,
            generation=membership.generation,
            rank=membership.rank,
            members=membership.members,
        )

    def leave(self, request: service_pb2.LeaveGroupRequest, _: Wanted) -> service_pb2.LeaveGroupResponse:
        """Leave a group in order."""
        self._groups.leave(request.ticket)
        return service_pb2.LeaveGroupResponse()

    def moments(self, message: bytes) -> PendingGroupCall:
        """Take a step together with the other members of a group: bring this one's part."""
        request = unserved.parse(service_pb2.SynchronizeMomentsRequest, message)
        key = key_of(request.ref)
        maps = self._service.layer_config(key).maps
        batch = None
        if request.moments.count or request.moments.mean or request.moments.m2:
            # Whether a value that is not finite is refused, is decided for the union, and so for all members.
            batch = convert.moments_from_proto(request.moments, maps, allow_nonfinite=True)
        return PendingGroupCall(self._groups.moments(key, request.ticket, request.step, batch), _moments_answer)

    def gradients(self, message: bytes) -> PendingGroupCall:
        """Add up the sums of a backward together with the other members of a group: bring this one's part."""
        request = unserved.parse(service_pb2.SynchronizeGradientsRequest, message)
        key = key_of(request.ref)
        config = self._service.layer_config(key)
        call = BackwardCall(
            key,
            param_grads=request.update_param_grads if request.HasField("update_param_grads") else True,
            scale=request.scale if request.HasField("scale") else 1.0,
            momentum=request.momentum,
        )
        for name, value in (("scale", call.scale), ("momentum", call.momentum)):
            if not is_finite(value):
                raise InvalidConfiguration(f"{name} is {value!r} (expected: a finite number)")
        allow = config.nonfinite is NonFinitePolicy.ALLOW
        batch = convert.moments_from_proto(request.moments, config.maps, allow_nonfinite=allow)
        sums = convert.sums_from_proto(request.sums, config.maps) if request.HasField("sums") else None
        return PendingGroupCall(
            self._groups.gradients(call, request.ticket, request.step, sums, batch), _gradients_answer
        )


def _moments_answer(done: Done[Stepped]) -> service_pb2.SynchronizeMomentsResponse:
    result = done.result
    return service_pb2.SynchronizeMomentsResponse(
        moments=convert.moments_to_proto(result.moments),
        version=result.version,
        num_of_props=result.num_of_props,
        scale=convert.vector_to_proto(result.scale),
        bias=convert.vector_to_proto(result.bias),
        ranks=done.ranks,
        replayed=done.replayed,
        waiting=done.waiting,
    )


def _gradients_answer(done: Done[Summed]) -> service_pb2.SynchronizeGradientsResponse:
    return service_pb2.SynchronizeGradientsResponse(
        sums=convert.sums_to_proto(done.result.sums), ranks=done.ranks, replayed=done.replayed, waiting=done.waiting
    )


def _plain(cls: type[M], behaviour: Callable[[M, Wanted], Message]) -> Unary:
    return lambda buffer, wanted: behaviour(unserved.parse(cls, buffer), wanted).SerializeToString()


def _waiting(behaviour: Callable[[bytes], PendingGroupCall]) -> Unary:
    def unary(buffer: bytes, wanted: Wanted) -> bytes:
        meeting = behaviour(buffer)
        _awaited(meeting.future, wanted)
        return meeting.answer()

    return unary


def _awaited(future: Future[F], wanted: Wanted) -> F:
    """Wait for the other members, as long as somebody waits for the answer.

    Raises:
        CallCancelled: Nobody does any more. What the member has brought stays.
    """
    while True:
        try:
            return future.result(_ASK_SECONDS)
        except TimeoutError:
            if future.done():
                raise
        if not wanted():
            raise CallCancelled("the call was given up while it waited for the other members of the group")
