"""Changes that are made once, however often they are sent: each has a key, by which the server knows it again.

A call whose answer was lost is made again under its key as long as its deadline allows. When that has passed, nobody
can say whether the change was made. The next change by the same handle and thread settles it, since it takes the same
key: the server makes it; or gives the answer of before, if it is the same one; or says that the key was used.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from sharednorm.errors import KeyReused, MalformedMessage, SessionExpired
from sharednorm.transport.base import RpcClient
from sharednorm.transport.deadline import Deadline
from sharednorm.transport.retry import RetryPolicy
from sharednorm.v1 import service_pb2

_NUMBER_BYTES = _OWN_BYTES = 8
# Keys in doubt whose threads have not come back; each is a change that ended with a deadline.
_MOST_DOUBTFUL = 64

A = TypeVar("A")


class Keyed(Protocol):
    """A request that has a key."""

    @property
    def key(self) -> service_pb2.IdempotencyKey:
        """By which its change is known again."""
        ...


class IdempotencySession:
    """What a hub's changes are known by, opened at the first of them. Any number of threads may use it.

    Args:
        connection: To the server.
    """

    def __init__(self, connection: RpcClient) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._number = b""

    def lane(self, left: Deadline) -> KeySequence:
        """Return a lane that nothing was sent on."""
        with self._lock:
            if not self._number:
                request = service_pb2.OpenSessionRequest()
                answer = self._connection.call(
                    "OpenSession", request, service_pb2.OpenSessionResponse, attempts=RetryPolicy(left)
                )
                if len(answer.session) != _NUMBER_BYTES:
                    raise MalformedMessage(f"the session has {len(answer.session)} bytes (expected: {_NUMBER_BYTES})")
                self._number = answer.session
            return KeySequence(self._number + os.urandom(_OWN_BYTES))

    def renew(self, expired: KeySequence, left: Deadline) -> KeySequence:
        """Return a lane instead of one that a layer does not remember any more, and on which nothing is in doubt."""
        with self._lock:
            if expired.session.startswith(self._number):
                self._number = b""
        return self.lane(left)


@dataclass
class KeySequence:
    """A session of one change at a time, as a layer remembers it.

    Attributes:
        session: Its name.
        seq: Number of the next change.
        doubtful: Whether a change was sent under that number, and may have been made.
    """

    session: bytes
    seq: int = 1
    doubtful: bool = False


class Keys:
    """The keys of one handle's changes of one layer. Any number of threads may use them, each on a lane of its own.

    Args:
        session: The hub's.
    """

    def __init__(self, session: IdempotencySession) -> None:
        self._session = session
        self._lock = threading.Lock()
        self._free: list[KeySequence] = []
        self._doubtful: dict[int, KeySequence] = {}  # by thread

    def once(
        self,
        request: Keyed,
        left: Deadline,
        send: Callable[[RetryPolicy], A],
        changed: Callable[[A], bool] = lambda _: True,
    ) -> A:
        """Make a change once.

        Args:
            request: The call, whose key is set here.
            left: When it has to be over.
            send: Makes the call, as often as it is told to.
            changed: Whether an answer says that there was a change.

        Returns:
            The answer.

        Raises:
            SessionExpired: It, or the change before it, was sent without an answer, and the server does not know any
                more whether that was made. This one was not.
            SharedNormError: What `send` raises.
        """
        lane = self._take(left)
        while True:
            request.key.session, request.key.seq = lane.session, lane.seq
            attempts = RetryPolicy(left)
            try:
                answer = send(attempts)
                break
            except BaseException as error:
                if isinstance(error, KeyReused) and lane.doubtful:
                    lane.seq, lane.doubtful = lane.seq + 1, False  # what was in doubt was made
                elif isinstance(error, SessionExpired):
                    if lane.doubtful or attempts.unknown:
                        raise  # and the keys go with it: nothing can be found out by them any more
                    lane = self._session.renew(lane, left)
                else:
                    lane.doubtful = True
                    self._keep(lane)
                    raise
        if changed(answer):
            lane.seq, lane.doubtful = lane.seq + 1, False
        self._keep(lane)
        return answer

    def take(self, left: Deadline) -> KeySequence:
        """Return a lane for a change that is sent by itself; whoever knows that it was made gives it back."""
        with self._lock:
            if self._free:
                return self._free.pop()
        return self._session.lane(left)

    def give_back(self, lane: KeySequence) -> None:
        """Say that the change on a lane was made."""
        lane.seq += 1
        with self._lock:
            self._free.append(lane)

    def renew(self, lane: KeySequence, left: Deadline) -> KeySequence:
        """Return a lane instead of one whose session the layer does not remember, and on which nothing is in doubt."""
        return self._session.renew(lane, left)

    def _take(self, left: Deadline) -> KeySequence:
        with self._lock:
            mine = self._doubtful.pop(threading.get_ident(), None)
        return mine or self.take(left)

    def _keep(self, lane: KeySequence) -> None:
        with self._lock:
            if not lane.doubtful:
                self._free.append(lane)
                return
            self._doubtful[threading.get_ident()] = lane
            while len(self._doubtful) > _MOST_DOUBTFUL:
                del self._doubtful[next(iter(self._doubtful))]
