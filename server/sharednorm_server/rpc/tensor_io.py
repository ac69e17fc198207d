"""How the tensors of one call come in and go out: whole, in parts, or in memory that the client shares.

The servicer says what a call means; a transfer moves bytes, and knows nothing of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

from sharednorm.codec import wire
from sharednorm.core.types import Array
from sharednorm.errors import MalformedMessage
from sharednorm.v1 import service_pb2
from sharednorm_server.device.tensor_io import DeviceTensor, Incoming, Output
from sharednorm_server.layers.requests import Wanted
from sharednorm_server.rpc import unserved
from sharednorm_server.rpc.transfer_scheduler import TransferScheduler, Turn


class Here(Protocol):
    """The tensors of a call that are here, all of them."""

    @property
    def keeper(self) -> str:
        """Whose memory they are in, if it goes when they do; "" if it is the server's own."""
        ...

    def arrays(self, layouts: Sequence[wire.TensorLayout]) -> list[Array]:
        """Return them, as the layouts say.

        Raises:
            MalformedMessage: They do not fit the layouts.
        """
        ...

    def out(self, layout: wire.TensorLayout, *, over_input: bool) -> Array | None:
        """Return where the answer has to be, if that is fixed.

        Raises:
            MalformedMessage: It cannot be there; in the place of an input only if `over_input`.
        """
        ...


class InMessage:
    """Tensors in the data of one message, one behind the other.

    Args:
        data: The data.
    """

    keeper = ""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    @property
    def nbytes(self) -> int:
        """How many bytes of data there are."""
        return self._data.nbytes

    def arrays(self, layouts: Sequence[wire.TensorLayout]) -> list[Array]:
        """Return the tensors, where they lie."""
        nbytes = sum(layout.nbytes for layout in layouts)
        if self._data.nbytes != nbytes:
            listed = " and ".join(f"a {layout.dtype_name} tensor of shape {layout.shape}" for layout in layouts)
            raise MalformedMessage(f"the message carries {self._data.nbytes} bytes, and {listed} has {nbytes}")
        found, begin = [], 0
        for layout in layouts:
            found.append(wire.as_array(layout, self._data[begin : begin + layout.nbytes]))
            begin += layout.nbytes
        return found

    def out(self, layout: wire.TensorLayout, *, over_input: bool) -> Array | None:
        """Return None: the answer is a new message."""
        del layout, over_input
        return None


class Arriving:
    """Tensors that arrive in parts.

    Args:
        begin: Called once, with the bytes that will come, when the call has been found to be one that can be done.
        fill: Fills one tensor.
        until_sent: What has to be held until the answer has left.
    """

    keeper = ""

    def __init__(self, begin: Callable[[int], None], fill: Callable[[Incoming], None], until_sent: ExitStack) -> None:
        self.begin = begin
        self._fill = fill
        self._until_sent = until_sent
        self._turn: Turn | None = None

    def hold(self, context: AbstractContextManager[None]) -> None:
        """Enter a context, and leave it when the answer has left."""
        self._until_sent.enter_context(context)

    def take_turn(self, movers: TransferScheduler, wanted: Wanted) -> None:
        """Wait for this call's turn to move its tensors, which ends when the answer has left, or when it is slow.

        Raises:
            DeadlineExceeded: None has come, and nobody waits for the call any more.
        """
        self._turn = self._until_sent.enter_context(movers.turn(wanted))

    def fill(self, incoming: Incoming) -> None:
        """Fill a tensor."""
        self._fill(incoming if self._turn is None else _Counted(incoming, self._turn))

    def leaving(self, output: Output | None) -> Output | None:
        """Return the tensor of the answer, whose parts move in the same turn."""
        return output if output is None or self._turn is None else _Leaving(output, self._turn)


class _Counted:
    # A tensor that arrives in a turn.
    def __init__(self, incoming: Incoming, turn: Turn) -> None:
        self._incoming, self._turn = incoming, turn

    @property
    def nbytes(self) -> int:
        return self._incoming.nbytes

    def space(self, most: int) -> memoryview:
        return self._incoming.space(most)

    def filled(self, nbytes: int) -> None:
        self._turn.moved(nbytes)
        self._incoming.filled(nbytes)

    def finish(self) -> DeviceTensor:
        return self._incoming.finish()


class _Leaving:
    # A tensor that leaves in a turn.
    def __init__(self, output: Output, turn: Turn) -> None:
        self._output, self._turn = output, turn
        self.shape, self.dtype_name, self.nbytes = output.shape, output.dtype_name, output.nbytes

    def array(self) -> Array:
        return self._output.array()

    def parts(self, most: int) -> Iterator[memoryview]:
        for part in self._output.parts(most):
            self._turn.moved(part.nbytes)
            yield part


class InChunks:
    """Tensors in the chunks of a stream of gRPC's, behind its header: the source of an `Arriving`.

    Args:
        cls: Of the stream's messages.
        messages: Those behind the header.
        go_on: Has them come.
    """

    def __init__(
        self,
        cls: type[service_pb2.ForwardStreamRequest | service_pb2.BackwardStreamRequest],
        messages: Iterator[bytes],
        go_on: Callable[[], None],
    ) -> None:
        self._cls = cls
        self._go_on = go_on
        self._messages = messages
        self._order = wire.ChunkOrder(0)
        self._left = 0
        self._rest = memoryview(b"")  # of a chunk in which one tensor ends and another begins

    def begin(self, nbytes: int) -> None:
        """Have so many bytes come."""
        self._order, self._left = wire.ChunkOrder(nbytes), nbytes
        self._go_on()

    def fill(self, incoming: Incoming) -> None:
        """Fill a tensor; behind the last, see that the stream is over."""
        missing = incoming.nbytes
        while missing:
            self._rest = self._rest if self._rest.nbytes else self._next()
            room = incoming.space(min(missing, self._rest.nbytes))
            room[:], self._rest = self._rest[: room.nbytes], self._rest[room.nbytes :]
            incoming.filled(room.nbytes)
            missing -= room.nbytes
            self._left -= room.nbytes
        if not self._left:
            self._next()

    def _next(self) -> memoryview:
        buffer = next(self._messages, None)
        if buffer is None:
            self._order.finish()
            return memoryview(b"")
        message, chunk = unserved.decode(self._cls, buffer)
        if message.HasField("header"):
            raise MalformedMessage("a stream has a second header (expected: chunks)")
        self._order.take(message.offset, chunk.nbytes)
        return chunk
