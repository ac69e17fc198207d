"""Which changes of a layer have been made: what makes a call that comes twice one change.

A session changes a layer under the numbers 1, 2, 3 and so on, and waits for the answer to one before it sends the
next; so its last change is all that it can ask for again. That is remembered of so many sessions a layer. A session
that had to be forgotten is never taken for a new one: sessions have numbers, a layer knows the highest of those that it
has forgotten, and up to that one it takes no first change.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np

from sharednorm.core.state import LayerState, Moments
from sharednorm.errors import KeyReused, SessionExpired, StepOutOfOrder
from sharednorm_server.store.records import NUMBER_BYTES, CallKey, LastChange, Note, Remembered, TakenStep

DEFAULT_MAX_SESSIONS = 1024

Content = str | bytes | float | bool | Sequence["Content"] | np.ndarray | None


class IdempotencyTable:
    """The last change of each session that has changed a layer. Whoever calls holds the layer.

    Args:
        most: Sessions that are remembered, at least 1.
        opened: Says of a session's number whether it was given: who makes one up would make others look forgotten.
        known: What is known already.
    """

    def __init__(self, most: int, opened: Callable[[int], bool], known: Remembered | None = None) -> None:
        self._most = most
        self._opened = opened
        self._known = known or Remembered()

    def find(self, key: CallKey, content: bytes) -> LastChange | None:
        """Return the change that was made under a key; None: it is to be made now.

        Raises:
            KeyReused: It was another one.
            StepOutOfOrder: The session has made other changes since, or has left one out.
            SessionExpired: The session is not remembered any more.
        """
        last = self._known.changes.get(key.session)
        if last is None:
            number = _number(key.session)
            if key.seq > 1 or number <= self._known.floor or not self._opened(number):
                raise SessionExpired(
                    "the layer does not remember this session any more: whether the change was made before cannot be "
                    "said, and it was not made now (expected: a new session, for what has not been sent yet)"
                )
            return None
        if key.seq == last.seq + 1:
            return None
        if key.seq != last.seq:
            raise StepOutOfOrder(
                f"the change has number {key.seq} in its session, whose last one of this layer was {last.seq} "
                f"(expected: {last.seq + 1}; or {last.seq}, to ask for the last one again)",
                {"seq": str(key.seq), "last": str(last.seq)},
            )
        if last.content != content:
            raise KeyReused(_REUSED)
        return last

    def last(self, session: bytes) -> LastChange | None:
        """Return the last change of a session, if one is remembered."""
        return self._known.changes.get(session)

    def learn(self, session: bytes, change: LastChange | None, floor: int) -> None:
        """Take what the store knows of one session, of a ledger that knows some only."""
        self._known.floor = max(self._known.floor, floor)
        if change is not None:
            self._known.changes[session] = change

    def forget(self) -> None:
        """Know nothing any more: somebody else has changed the layer."""
        self._known = Remembered()

    def note(self, key: CallKey, change: LastChange) -> Note:
        """Return what has to be kept with a change that is made now; nothing is remembered yet."""
        forgotten: tuple[bytes, ...] = ()
        floor = self._known.floor
        if key.session not in self._known.changes and len(self._known.changes) >= self._most:
            forgotten = tuple(list(self._known.changes)[: len(self._known.changes) - self._most + 1])
            floor = max(floor, *map(_number, forgotten))
        return Note(key.session, change, forgotten, floor)

    def remember(self, note: Note) -> None:
        """Remember a change that was made."""
        self._known.take(note)


def last_change(call: CallKey, content: bytes, state: LayerState) -> LastChange:
    """Return what is remembered of a change that has made a state."""
    return LastChange(call.seq, content, state.version, state.num_of_props)


@functools.lru_cache(4096)
def step_in(domain: str) -> bytes:
    """Return the content of a step in a domain; its batch is known by the moments that are kept beside it."""
    return digest("step", domain)


def step_change(call: CallKey | None, domain: str, batch: Moments, state: LayerState) -> LastChange:
    """Return what is remembered of a step that has made a state: enough to give its answer again."""
    seq, content = (0, b"") if call is None else (call.seq, step_in(domain))
    taken = TakenStep(batch, state.scale, state.bias)
    return LastChange(seq, content, state.version, state.num_of_props, taken)


def same_step(change: LastChange, batch: Moments) -> TakenStep:
    """Return the step that comes again, if it is of the same batch, whose moments tell.

    Raises:
        KeyReused: It is of another.
    """
    step = change.step
    if step is None or _bytes(step.moments) != _bytes(batch):
        raise KeyReused(_REUSED)
    return step


def digest(*content: Content) -> bytes:
    """Return 16 bytes that stand for what a change was asked to do."""
    hashed = blake2b(digest_size=16)
    _feed(hashed, content)
    return hashed.digest()


_REUSED = (
    "another change was made under this key, and this one was not (expected: the same content, to ask for that change "
    "again; or the next number, for a new one)"
)


def _feed(hashed: blake2b, content: Content) -> None:
    # Each part with its kind and its length, so that no two contents are of the same bytes.
    if isinstance(content, (bytes, str)):
        data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    elif isinstance(content, np.ndarray):
        data = content.tobytes()
    elif isinstance(content, (bool, float, int)) or content is None:
        data = b"" if content is None else struct.pack("<d", content)
    else:
        hashed.update(struct.pack("<cQ", b"(", len(content)))
        for part in content:
            _feed(hashed, part)
        return
    hashed.update(struct.pack("<cQ", b"-" if content is None else b"'", len(data)))
    hashed.update(data)


def _bytes(moments: Moments) -> tuple[int, bytes, bytes]:
    return moments.count, moments.mean.tobytes(), moments.m2.tobytes()


def _number(session: bytes) -> int:
    return int.from_bytes(session[:NUMBER_BYTES], "big")
