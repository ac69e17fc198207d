"""The line to Redis: one connection for all threads, whose commands travel together; and who looks after it.

Whoever comes first sends: all commands that wait at that moment in one piece, and reads their answers; those who came
meanwhile are for the next, which one of them sends. So a command that comes alone pays for one round trip and for no
change of threads, and many share one.

A line that breaks, or is silent for too long, is given up: what was on its way has an unknown fate, which its callers
are told. Until there is another one, whoever asks is refused at once. A thread looks for it, and asks Redis once a
second whether it still is what it was. Another connection hears of what others change.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import redis

from sharednorm.errors import StoreUnavailable

_LOOK_SECONDS = 1.0
"""How often Redis is asked whether it is there."""
_POLL_SECONDS, _POLLS = 0.25, 4
"""How long whoever listens waits before it looks whether it should end, and after how many of them it asks as well."""
_PAUSE_SECONDS = 0.1
"""Between two attempts to reach it again."""
_MOST_COMMANDS = 128
"""In one piece; others wait for the next."""

# What Redis says when it cannot do what it is asked for now, and may be able to later.
_PASSING = ("MASTERDOWN", "MISCONF", "BUSY", "TRYAGAIN", "NOREPLICAS", "UNBLOCKED", "-OOM", "OOM")
_PASSING_TYPES = (
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.NoPermissionError,
    redis.exceptions.BusyLoadingError,
)

Command = Sequence[bytes | str | int | float]

_log = logging.getLogger(__name__)


class Wire(Protocol):
    """What a connection of redis-py does, as far as it is needed here."""

    def connect(self) -> None:
        """Connect, and say who we are."""
        ...

    def disconnect(self) -> None:
        """Let go of the socket."""
        ...

    def pack_commands(self, commands: Sequence[Command]) -> Sequence[bytes]:
        """Return the bytes of commands."""
        ...

    def send_packed_command(self, command: Sequence[bytes]) -> None:
        """Send bytes."""
        ...

    def send_command(self, *args: bytes | str | float) -> None:
        """Send a command."""
        ...

    def read_response(self) -> Any:
        """Return the next answer, or raise it."""
        ...

    def can_read(self, timeout: float) -> bool:
        """Return whether there is one, after so many seconds at the latest."""
        ...


class _Request:
    # A command, and the thread that waits for its answer, or until it is to send itself.
    __slots__ = ("_signal", "command", "done", "leads", "reply")

    def __init__(self, command: Command) -> None:
        self.command = command
        self.reply: Any = None
        self.done = self.leads = False
        self._signal = threading.Lock()
        self._signal.acquire()

    def wait(self) -> None:
        self._signal.acquire()

    def wake(self) -> None:
        self._signal.release()


class RedisConnection:
    """A line to one Redis, for any number of threads.

    Args:
        make: Makes a connection that is not connected yet.
        where: What it is called in messages, without secrets.
        probe: A key that may be written, to see whether Redis takes changes.
        prepare: Called with what runs a command, on each new connection: sees that this is the Redis that is meant, and
            raises RedisError or StoreUnavailable if it cannot be used.
        channels: What is listened to.
        heard: Called with channel and message, in the line's own thread; with None when something may have been missed.
        on_trouble: Called with the reason when Redis cannot be used, and with "" when it can again.
    """

    def __init__(
        self,
        make: Callable[[], Wire],
        where: str,
        probe: str,
        prepare: Callable[[Callable[..., Any]], None],
        channels: Sequence[str],
        heard: Callable[[bytes, Any], None],
        on_trouble: Callable[[str], None],
    ) -> None:
        self._make, self._where, self._probe, self._prepare = make, where, probe, prepare
        self._channels, self._heard, self._on_trouble = channels, heard, on_trouble
        self._lock = threading.Lock()
        self._waiting: list[_Request] = []
        self._led = False
        self._using = threading.Lock()  # the connection
        self._connection: Wire | None = None
        self._trouble = self._complaint = ""
        self._closed = threading.Event()
        self._wanted = threading.Event()  # that somebody looks after it now
        self.commands = self.pieces = 0
        self.seconds = 0.0
        self._connection = self._opened()
        self._threads = [
            threading.Thread(target=self._look_after, name="redis-line", daemon=True),
            threading.Thread(target=self._listen, name="redis-heard", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def trouble(self) -> str:
        """Why Redis cannot be used now, or not fully; "" if it can."""
        return self._trouble or self._complaint

    def ask(self, *command: bytes | str | float) -> Any:
        """Run a command, and return the answer.

        Raises:
            StoreUnavailable: Redis does not answer, or cannot do that now. Unless it has refused, it may have done it.
            redis.ResponseError: Redis does not take the command.
        """
        return self.ask_all([command])[0]

    def ask_all(self, commands: Sequence[Command]) -> list[Any]:
        """Run several commands, and return the answers; raises what `ask` raises, for the first that fails."""
        requests = [_Request(command) for command in commands]
        with self._lock:
            if self._trouble:
                raise self._refused(self._trouble)
            self._waiting += requests
            leads = not self._led
            self._led = True
        for request in requests:
            if not leads and not request.done:
                request.wait()
            if not request.done:
                self._send(request)
                leads = False
        return [self._answer(request.reply) for request in requests]

    def _answer(self, reply: Any) -> Any:
        if (isinstance(reply, redis.ResponseError) and str(reply).startswith(_PASSING)) or isinstance(
            reply, _PASSING_TYPES
        ):
            why = f"it says {str(reply)[:200]!r}"
            self._complain(why)
            raise self._refused(why) from None
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _complain(self, why: str) -> None:
        # Redis is there, and refuses what others may be allowed; `_look` finds out when that is over.
        if not self._complaint:
            _log.warning("the store %s refuses changes: %s", self._where, why)
            self._complaint = why
            self._on_trouble(why)

    def close(self) -> None:
        """Let go of the connections."""
        self._closed.set()
        self._wanted.set()
        for thread in self._threads:
            thread.join(10)
        with self._using:
            self._drop()

    def give_up(self, why: str) -> StoreUnavailable:
        """Use the connection no more, until another one is found to be to what it should; return what callers get."""
        with self._using:
            self._fail(why)
        return self._refused(why)

    def _refused(self, why: str) -> StoreUnavailable:
        return StoreUnavailable(
            f"the store {self._where} cannot be used now: {why} (expected: a Redis that answers; calls are made again "
            "by themselves until their timeout)"
        )

    def _send(self, mine: _Request) -> None:
        try:
            while not mine.done:
                with self._lock:
                    batch, self._waiting = self._waiting[:_MOST_COMMANDS], self._waiting[_MOST_COMMANDS:]
                replies = self._together([request.command for request in batch])
                for request, reply in zip(batch, replies, strict=True):
                    request.reply, request.done = reply, True
                    if request is not mine:
                        request.wake()
        finally:
            with self._lock:
                if self._waiting:
                    self._waiting[0].wake()  # to send for itself, and for those behind it
                else:
                    self._led = False

    def _together(self, commands: Sequence[Command]) -> list[Any]:
        began = time.perf_counter()
        with self._using:
            connection = self._connection
            if connection is None:
                error = self._refused(self._trouble)
                return [error] * len(commands)
            try:
                connection.send_packed_command(connection.pack_commands(commands))
                replies = [_reply(connection) for _ in commands]
            except (redis.RedisError, OSError) as error:
                self._fail(_words(error))
                unknown = self._refused(f"{_words(error)}, in the middle of a command, which it may have done or not")
                return [unknown] * len(commands)
            except Exception as error:  # noqa: BLE001 - a defect, or no memory: other threads' commands are in here, too
                _log.exception("a command to the store failed here")
                self._fail(f"{type(error).__name__} in this server")
                return [self._refused(f"{type(error).__name__} in this server")] * len(commands)
            self.commands += len(commands)
            self.pieces += 1
            self.seconds += time.perf_counter() - began
        return replies

    def _fail(self, why: str) -> None:
        # While using the connection.
        self._drop()
        if not self._closed.is_set() and not self._trouble:
            self._trouble = why
            _log.warning("the store %s cannot be used: %s", self._where, why)
            self._on_trouble(why)
        self._wanted.set()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()

    def _opened(self) -> Wire:
        connection = self._make()
        try:
            connection.connect()

            def run(*command: bytes | str | float) -> Any:
                connection.send_command(*command)
                return connection.read_response()

            self._prepare(run)
        except BaseException:
            connection.disconnect()
            raise
        return connection

    def _look_after(self) -> None:
        while not self._closed.is_set():
            self._wanted.wait(_PAUSE_SECONDS if self._trouble else _LOOK_SECONDS)
            self._wanted.clear()
            if self._closed.is_set():
                return
            if not self._trouble:
                self._look()
                continue
            try:
                connection = self._opened()  # which may take long: callers are refused meanwhile, and do not wait
                with self._using:
                    if self._closed.is_set():
                        connection.disconnect()
                        return
                    self._connection = connection
                    self._trouble = ""
            except Exception as error:  # noqa: BLE001 - this thread has to live, or Redis is never used again
                why = _words(error)
                if why != self._trouble:
                    self._trouble = why
                    self._on_trouble(why)
                self._closed.wait(_PAUSE_SECONDS)
            else:
                _log.warning("the store %s can be used again", self._where)
                self._heard(b"", None)
                self._on_trouble("")

    def _look(self) -> None:
        # As one of the commands, so that a Redis that has stopped is found out also while nobody asks for anything.
        try:
            role = self.ask("ROLE")
            if self._complaint:
                self.ask("SET", self._probe, b"", "PX", 1000)
                self._complaint = ""
                _log.warning("the store %s takes changes again", self._where)
                self._on_trouble("")
        except (StoreUnavailable, redis.ResponseError):  # the latter where ROLE is not allowed: then it is not known
            return
        if role and role[0] != b"master":
            with self._using:
                self._fail("it is a replica now")

    def _listen(self) -> None:
        while not self._closed.is_set():
            connection, idle = self._make(), 0
            try:
                connection.connect()
                for channel in self._channels:
                    connection.send_command("SUBSCRIBE", channel)
                while not self._closed.is_set():
                    if not connection.can_read(timeout=_POLL_SECONDS):
                        idle += 1
                        if idle % _POLLS:
                            continue
                        connection.send_command("PING")  # whose answer has to come in time
                    kind, channel, *message = connection.read_response()
                    if kind == b"message":
                        self._heard(channel, message[0])
                    elif kind == b"subscribe" and message[0] == len(self._channels):
                        self._heard(b"", None)  # whatever came before this was missed
            except Exception as error:  # noqa: BLE001 - this thread has to live, or copies get as old as they may
                if not isinstance(error, (redis.RedisError, OSError)):
                    _log.warning("what the store %s has published was not understood: %r", self._where, error)
                self._heard(b"", None)
                self._closed.wait(_PAUSE_SECONDS)
            finally:
                connection.disconnect()


def _reply(connection: Wire) -> Any:
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return error


def _words(error: BaseException) -> str:
    if isinstance(error, (redis.TimeoutError, TimeoutError)):
        return "it does not answer"
    return str(error)[:300] or type(error).__name__
