"""What a request means that brings the moments of a batch, or gradients of parameters, and no tensor."""

from __future__ import annotations

from dataclasses import replace

from sharednorm.core.state import Moments, accumulate_gradients, require_initialized, require_two_values, step
from sharednorm.core.types import Vector
from sharednorm.errors import CallCancelled, StaleGeneration
from sharednorm_server.layers.catalog import LayerCatalog
from sharednorm_server.layers.idempotency import last_change, same_step, step_change, step_in
from sharednorm_server.layers.layer import Layer
from sharednorm_server.layers.requests import BackwardCall, CallKey, PushAnswer, Sums, Together, Wanted, always
from sharednorm_server.store.base import LayerKey, LayerRecord
from sharednorm_server.store.records import LastChange

GROUP_ENDED = b"ended"
"""What a group's last change begins with, instead of what `requests.Together` says, when its members are elsewhere."""


class MomentsService(LayerCatalog):
    """Keeps layers, and takes steps whose tensors are elsewhere. So what it does is the store's, and no device's."""

    def push_moments(
        self, key: LayerKey, train: bool | None, batch: Moments, wanted: Wanted = always, call: CallKey | None = None
    ) -> PushAnswer:
        """Take a step whose tensor somebody else normalizes.

        There is none if the layer's default, where `train` is None, is to evaluate; then nothing has changed.

        Raises:
            TooFewValues: The batch has one value a map.
            LayerEmpty: The layer has no state yet.
            NonFiniteInput: The moments are not finite, and the layer refuses that.
            KeyReused, StepOutOfOrder, SessionExpired: The step cannot be taken under its key.
            CallCancelled: The client does not wait for the step any more.
        """
        layer = self._layers.find(key)

        def act(record: LayerRecord) -> PushAnswer | LastChange:
            require_initialized(record.state, str(key))
            before = None if call is None else layer.find_change(call, step_in(key.domain))
            if before is not None:
                return before
            if not (record.train if train is None else train):
                return _pushed(record, train=False)
            require_two_values(batch)
            stepped = record.with_state(step(record.state, record.config, batch))
            require_wanted(wanted)
            layer.commit(stepped, call, step_change(call, key.domain, batch, stepped.state))
            return _pushed(stepped, train=True)

        found = layer.attempt(act)
        if isinstance(found, PushAnswer):
            return found
        taken = same_step(found, batch)
        version, steps = found.version, found.num_of_props
        return PushAnswer(layer.committed(), True, version, steps, taken.scale, taken.bias, replayed=True)

    def step_together(self, key: LayerKey, union: Moments, together: Together) -> LayerRecord:
        """Take a step of a group, whose parts are in; return the layer after it. Raises what `push_moments` raises."""
        layer = self._layers.find(key)

        def act(record: LayerRecord) -> LayerRecord:
            _require_not_ended(layer, together)
            require_initialized(record.state, str(key))
            require_two_values(union)
            stepped = record.with_state(step(record.state, record.config, union))
            change = replace(step_change(together.key, key.domain, union, stepped.state), content=together.content)
            layer.commit(stepped, together.key, change)
            return stepped

        return layer.attempt(act)

    def end_together(self, key: LayerKey, session: bytes) -> LastChange | None:
        """Return the last change that a group on another server has made to a layer, and see that it makes no more.

        None: none is remembered.
        """

        def ended(last: LastChange | None) -> LastChange:
            if last is None:
                return LastChange(0, GROUP_ENDED, 0, 0)
            if last.content.startswith(GROUP_ENDED):
                return last
            return replace(last, content=GROUP_ENDED + last.content[len(GROUP_ENDED) :])

        return self._layers.find(key).end_session(session, ended)

    def push_gradients(
        self,
        call: BackwardCall,
        scale_grad: Vector,
        bias_grad: Vector,
        wanted: Wanted = always,
    ) -> bool:
        """Add gradients that somebody else has computed, if the layer is affine; return whether that was done before.

        Raises:
            InvalidConfiguration: `scale` or `momentum` of the call is not finite.
            CallCancelled: Nobody waits for that any more.
        """
        layer = self._layers.find(call.key)
        return layer.latest.config.affine and self.accumulate(layer, call, scale_grad, bias_grad, wanted)

    def backward_together(
        self, call: BackwardCall, sums: Sums, gradients: tuple[Vector, Vector] | None, together: Together
    ) -> None:
        """Keep the sums of a group's backward, and add gradients of scale and bias.

        Args:
            call: What to do.
            sums: Over all members.
            gradients: What is added, unless the layer is not affine; None: nothing.
            together: How they are known again.

        Raises:
            InvalidConfiguration: `scale` or `momentum` of the call is not finite.
        """
        layer = self._layers.find(call.key)

        def act(record: LayerRecord) -> None:
            _require_not_ended(layer, together)
            changed = record
            if gradients is not None and record.config.affine:
                state = accumulate_gradients(record.state, *gradients, scale=call.scale, momentum=call.momentum)
                changed = record.with_state(state)
            noted = last_change(together.key, together.content, changed.state)
            layer.commit(changed, together.key, replace(noted, sums=sums))

        layer.attempt(act)

    def accumulate(
        self,
        layer: Layer,
        call: BackwardCall,
        scale_grad: Vector,
        bias_grad: Vector,
        wanted: Wanted,
    ) -> bool:
        """Add gradients to the layer's; return whether that was done before."""

        def change(record: LayerRecord) -> LayerRecord:
            state = accumulate_gradients(record.state, scale_grad, bias_grad, scale=call.scale, momentum=call.momentum)
            require_wanted(wanted)
            return record.with_state(state)

        asked = ("gradients", scale_grad, bias_grad, call.scale, call.momentum)
        return layer.change_once(call.call, asked, change)[1]


def _pushed(record: LayerRecord, *, train: bool) -> PushAnswer:
    state = record.state
    return PushAnswer(record, train, state.version, state.num_of_props, state.scale, state.bias)


def _require_not_ended(layer: Layer, together: Together) -> None:
    last = layer.last_change_of(together.key.session)
    if last is not None and last.content.startswith(GROUP_ENDED):
        raise StaleGeneration(
            "the members of the group have gone on with another server, and this step was not taken here; join again"
        )


def require_wanted(wanted: Wanted) -> None:
    """Raise CallCancelled if nobody waits for a call any more."""
    if not wanted():
        raise CallCancelled("the call was given up before it changed anything")
