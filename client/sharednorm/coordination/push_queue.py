"""Steps that are sent in the background: one sender a hub, and all that wait at a moment in one call."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from sharednorm.codec import convert, frames
from sharednorm.coordination.batching import error_of, grouped, require_results
from sharednorm.coordination.idempotency import Keys, KeySequence
from sharednorm.errors import (
    DeadlineExceeded,
    InternalError,
    MalformedMessage,
    ServerUnavailable,
    SessionExpired,
    SharedNormError,
)
from sharednorm.layers.backend import Parameters
from sharednorm.transport.base import Transport
from sharednorm.transport.retry import RetryPolicy
from sharednorm.v1 import layer_pb2, service_pb2

DEFAULT_MAX_PENDING = 8
MOST_PENDING = 1024


@dataclass
class _Failure:
    # What the steps of a handle have ended with that nobody has been told of.
    error: SharedNormError
    unknown: int = 0  # in a call that has ended without an answer
    lost: int = 0  # refused, or behind one that failed

    def told(self, line: PushStream) -> SharedNormError:
        """Return the error for the handle's next call."""
        name, error = line.ref.name, line.explain(self.error)
        if self.unknown:
            what = (
                f"of the steps of earlier forwards of layer {name!r}, {self.unknown} may or may not have been taken, "
                f"and {self.lost} behind them were not"
            )
        else:
            what = f"the step of an earlier forward of layer {name!r} was not taken, nor were {self.lost - 1} behind it"
        metadata = {**error.metadata, "steps_unknown": str(self.unknown), "steps_lost": str(self.lost)}
        return type(error)(f"{what}: {error.message}", metadata)


@dataclass(eq=False)
class PushStream:
    """The steps of one handle. Its attributes change under the sender's lock only.

    Attributes:
        ref: The layer.
        maps: Its channels.
        answered: Told that steps may have been taken.
        explain: Adds to an error of the server what may have happened to the layer.
        keys: What its steps are known by.
        max_pending: Most steps that have been pushed and not been answered.
        pending: How many there are.
        parameters: Those of the layer that the handle has heard of last; None: it has to ask.
        epoch: How often it was told to ask; an answer to an older step says nothing new.
        failure: What its next call has to raise.
    """

    ref: layer_pb2.LayerRef
    maps: int
    answered: Callable[[], None] = field(repr=False)
    explain: Callable[[SharedNormError], SharedNormError] = field(repr=False)
    keys: Keys = field(repr=False)
    max_pending: int
    pending: int = 0
    parameters: Parameters | None = None
    epoch: int = 0
    failure: _Failure | None = field(default=None, repr=False)


@dataclass(eq=False)
class _Step:
    line: PushStream
    request: service_pb2.PushMomentsRequest
    epoch: int
    lane: KeySequence | None = None


@dataclass
class _Refused:
    error: SharedNormError
    unknown: bool


class PushQueue:
    """Sends the steps of all handles of a hub, in the order in which they were pushed, on one thread.

    The thread is there as long as there is something to send, and the interpreter waits for that at its end. One call
    is on its way at a time; whatever is pushed meanwhile goes with the next.

    Args:
        exchange: With the server.
    """

    def __init__(self, exchange: Transport) -> None:
        self._exchange = exchange
        self._connection = exchange.connection
        self._changed = threading.Condition()
        self._waiting: deque[_Step] = deque()
        self._sending = 0
        self._running = False
        self._closed = False
        self._failed: list[PushStream] = []
        self._threads: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def push(self, line: PushStream, request: service_pb2.PushMomentsRequest) -> None:
        """Have a step sent, behind those that were pushed before; wait while the handle is too far ahead.

        Raises:
            SharedNormError: What an earlier step of the handle has ended with; this one is not sent.
            HubClosed: The hub was closed, or belongs to another process.
        """
        self._connection.require_open()  # first, since a forked child must not touch the lock
        with self._changed:
            while True:
                self._raise_failure(line)
                if self._closed:
                    raise self._connection.was_closed()
                if line.pending < line.max_pending:
                    break
                self._changed.wait()
            if not self._running:
                if self._threads is None:
                    self._threads = ThreadPoolExecutor(1, thread_name_prefix="sharednorm-push")
                self._threads.submit(self._run)
                self._running = True
            self._waiting.append(_Step(line, request, line.epoch))
            line.pending += 1

    def check(self, line: PushStream) -> None:
        """Raise what an earlier step of a handle has ended with; once."""
        self._connection.require_open()
        with self._changed:
            self._raise_failure(line)

    def settle(self, line: PushStream) -> None:
        """Wait until every step of a handle has been answered; raises what `check` does."""
        self._connection.require_open()
        with self._changed:
            self._changed.wait_for(lambda: not line.pending)
            self._raise_failure(line)

    def settle_all(self) -> None:
        """Wait until no step of any handle is pending; raises what the first has ended with that failed."""
        self._connection.require_open()
        with self._changed:
            self._changed.wait_for(self._idle)
            if self._failed:
                self._raise_failure(self._failed[0])

    def learn(self, line: PushStream, parameters: Parameters | None, epoch: int) -> None:
        """Take parameters that were read while the handle was at an epoch; None: they are to be read again."""
        with self._changed:
            if parameters is None:
                line.parameters = None
                line.epoch += 1
            elif epoch == line.epoch:
                line.parameters = parameters

    def finish(self, seconds: float) -> SharedNormError | None:
        """Wait until all steps are answered, at most so long, and take no more.

        Returns:
            What there is to be said: that steps are still unanswered, or have failed, and nobody was told; or None.
        """
        if os.getpid() != self._process:
            return None  # the parent has them
        with self._changed:
            self._changed.wait_for(self._idle, seconds)
            self._closed = True
            unknown, lost = self._sending, len(self._waiting)
            while self._waiting:
                self._waiting.popleft().line.pending -= 1
            self._changed.notify_all()
            if self._threads is not None:
                self._threads.shutdown(wait=False)
            if unknown or lost:
                where = self._connection.text
                return DeadlineExceeded(
                    f"{where} has not answered {unknown + lost} steps of earlier forwards within {seconds:g} s, and "
                    f"the hub was closed: {unknown} may or may not have been taken, and {lost} were not",
                    {"steps_unknown": str(unknown), "steps_lost": str(lost)},
                )
            errors, names = [], [repr(line.ref.name) for line in self._failed]
            while self._failed:
                errors.append(self._failure(self._failed[0]))
        error = errors[0] if errors else None
        if error is None or len(errors) == 1:
            return error
        names, more = names[1:9], ", ..." if len(names) > 9 else ""
        return type(error)(f"{error.message} (and so for handles of {', '.join(names)}{more})", error.metadata)

    def _idle(self) -> bool:
        return not self._waiting and not self._sending

    def _raise_failure(self, line: PushStream) -> None:
        error = self._failure(line)
        if error is not None:
            raise error

    def _failure(self, line: PushStream) -> SharedNormError | None:
        # What nobody has been told of; from now on somebody has.
        failure, line.failure = line.failure, None
        if failure is None:
            return None
        self._failed.remove(line)
        return failure.told(line)

    def _run(self) -> None:
        while True:
            with self._changed:
                steps = next(grouped(self._waiting, lambda step: step.line.maps), [])
                if not steps:
                    self._running = False
                    return
                for _ in steps:
                    self._waiting.popleft()
                self._sending = len(steps)
            results = self._send(steps)
            with self._changed:
                self._settled(steps, results)
                self._sending = 0
                self._changed.notify_all()

    def _send(self, steps: Sequence[_Step]) -> list[Parameters | _Refused]:
        attempts = self._connection.retrying()
        try:
            for step in steps:
                step.lane = step.line.keys.take(attempts.left)
            results = self._call(steps, attempts)
            if not attempts.unknown:
                results = self._with_new_sessions(steps, results, attempts)
        except SharedNormError as error:
            known = error
        except BaseException as error:  # noqa: BLE001 - whoever waits for these steps must not wait for ever
            known = InternalError(f"the steps could not be sent: {error!r}")
        else:
            for step, result in zip(steps, results, strict=True):
                if step.lane is not None and not isinstance(result, _Refused):
                    step.line.keys.give_back(step.lane)
            return results
        return [_Refused(known, unknown=True)] * len(steps)

    def _call(self, steps: Sequence[_Step], attempts: RetryPolicy) -> list[Parameters | _Refused]:
        found: list[Parameters | _Refused | None] = [None] * len(steps)
        for exchange, places in self._exchange.partition(steps, lambda step: step.line.ref.name):
            results = self._call_one(exchange, [steps[place] for place in places], attempts)
            for place, result in zip(places, results, strict=True):
                found[place] = result
        return [result for result in found if result is not None]

    def _call_one(
        self, exchange: Transport, steps: Sequence[_Step], attempts: RetryPolicy
    ) -> list[Parameters | _Refused]:
        for step in steps:
            assert step.lane is not None, "a step is sent under a key"
            step.request.key.session, step.request.key.seq = step.lane.session, step.lane.seq
        request = service_pb2.BatchPushMomentsRequest(pushes=[step.request for step in steps])

        def call() -> list[Parameters | _Refused]:
            answer = exchange.plain(
                "BatchPushMoments", frames.BATCH_PUSH_MOMENTS, request, service_pb2.BatchPushMomentsResponse, attempts
            )
            require_results("BatchPushMoments", len(answer.results), len(steps))
            results = [_result(step, result) for step, result in zip(steps, answer.results, strict=True)]
            for result in results:
                if isinstance(result, _Refused) and isinstance(result.error, ServerUnavailable):
                    raise result.error  # as if nothing had come: what was taken is known again
            return results

        return attempts.run(call)

    def _with_new_sessions(
        self, steps: Sequence[_Step], results: list[Parameters | _Refused], attempts: RetryPolicy
    ) -> list[Parameters | _Refused]:
        # What a layer refuses since it has forgotten the session, and what it has refused for that, was not done.
        refused = [(index, result.error) for index, result in enumerate(results) if isinstance(result, _Refused)]
        expired = {steps[index].line.ref.uid for index, error in refused if isinstance(error, SessionExpired)}
        again = [index for index, _ in refused if steps[index].line.ref.uid in expired]
        if not again:
            return results
        for index in again:
            step = steps[index]
            assert step.lane is not None, "a step is sent under a key"
            step.lane = step.line.keys.renew(step.lane, attempts.left)
        for index, result in zip(again, self._call([steps[index] for index in again], attempts), strict=True):
            results[index] = result
        return results

    def _settled(self, steps: Sequence[_Step], results: Sequence[Parameters | _Refused]) -> None:
        failed: dict[str, SharedNormError] = {}
        for step, result in zip(steps, results, strict=True):
            line = step.line
            line.pending -= 1
            line.answered()
            if isinstance(result, _Refused):
                # Of several of one layer, the first says why: the server has refused the others for that.
                self._fail(line, failed.setdefault(line.ref.uid, result.error), unknown=result.unknown)
            elif step.epoch == line.epoch:
                line.parameters = result
        behind = [step for step in self._waiting if step.line.ref.uid in failed]
        for step in behind:
            self._waiting.remove(step)
            step.line.pending -= 1
            self._fail(step.line, failed[step.line.ref.uid], unknown=False)

    def _fail(self, line: PushStream, error: SharedNormError, *, unknown: bool) -> None:
        if line.failure is None:
            line.failure = _Failure(error)
            self._failed.append(line)
        line.failure.unknown += unknown
        line.failure.lost += not unknown


def _result(step: _Step, result: service_pb2.BatchPushMomentsResult) -> Parameters | _Refused:
    if result.WhichOneof("result") != "moments":
        return _Refused(error_of(result.error), unknown=False)
    moments, maps = result.moments, step.line.maps
    try:
        scale, bias = convert.vector_from_proto(moments.scale, maps), convert.vector_from_proto(moments.bias, maps)
    except MalformedMessage as error:
        return _Refused(error, unknown=True)
    if moments.mode != layer_pb2.MODE_TRAIN:
        return _Refused(MalformedMessage("the answer to a training step is of another mode"), unknown=True)
    return scale, bias
