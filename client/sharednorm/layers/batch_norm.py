"""A handle of a layer: the API, which is PuzzleLib's, over the seam."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sharednorm.core.state import StateUpdate
from sharednorm.core.types import Array, Vector
from sharednorm.core.validation import check_domain, check_flag, is_finite
from sharednorm.errors import BackwardInEval, BackwardWithoutForward, InplaceInTraining, InvalidConfiguration
from sharednorm.layers.backend import Gradients, LayerBackend, SavedForward
from sharednorm.layers.input_checks import check_data, check_grad, check_out, check_writable, dtype_from
from sharednorm.layers.state_view import LayerView

_NO_GRADIENTS = Gradients(None, None, None)


@dataclass(frozen=True, eq=False)
class _Pass:
    # One forward of a handle, replaced as a whole, so that a call that fails leaves the one before.
    in_data: Array | None = None
    data: Array | None = None
    saved: SavedForward | None = None


class Layer(LayerView):
    """A batch-normalization layer: PuzzleLib's API over whatever keeps the state and computes.

    A handle's mode and its last forward (`inData`, `data`, `grad`) are its own, so a forward and its backward
    belong to one thread; parameters, statistics and their gradients are the layer's and may be used from
    any thread. A call that raises has changed neither.

    Args:
        backend: What keeps the state and computes.
        name: The layer's name, for messages and files; None if it has none.
        inplace: Whether the output replaces the input in eval mode. Such a layer refuses to train.
        train: The handle's mode; None if it follows the layer's default until it chooses.

    Raises:
        InvalidConfiguration: `inplace` is neither True nor False.
    """

    def __init__(self, backend: LayerBackend, name: str | None, inplace: bool, train: bool | None) -> None:
        super().__init__(backend, name)
        if not isinstance(inplace, bool):
            raise InvalidConfiguration(f"inplace is {inplace!r} (expected: True or False)")
        self.inplace = inplace
        self._train = train
        self._calctype: np.dtype[Any] | None = None
        self._pass = _Pass()
        self._gradients = _NO_GRADIENTS
        self._token = ""  # of a saved forward that `reset` forgot, for the next forward to release

    def __getstate__(self) -> dict[str, object]:
        """Copy and pickle the layer and the handle's mode; the last forward stays with the original."""
        return {**super().__getstate__(), "_pass": _Pass(), "_gradients": _NO_GRADIENTS, "_token": ""}

    def __call__(self, data: Array, out: Array | None = None) -> Array:
        """Normalize a batch, and remember it for `backward`.

        In train mode by the batch's mean and biased variance, which the running statistics then take in;
        in eval mode by the running statistics, and nothing changes.

        Args:
            data: float32, float16 or bfloat16; (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W) as the kind
                asks. Any strides and either byte order. It is referenced until the next forward and not
                copied, so do not write to it before `backward`: a local layer would differentiate at what was
                written, and a remote one mostly at what was sent, which the server keeps for a while.
            out: Where to write the output: an array of the same shape and type, any strides; what it holds after an
                error is undefined. In eval mode it may be `data`. None: a new array.

        Returns:
            `out`; without it a new array of the same shape and type, in C order and the machine's byte order, or
            `data` itself if the layer is in place.

        Raises:
            UnsupportedDType: Not a NumPy array, or another element type.
            InvalidShape: Wrong rank, another number of maps, an empty axis; read-only and in place; `out` has another
                shape or is read-only.
            TooFewValues: One value a map in training.
            NonFiniteInput: A NaN or an infinity in training, unless the layer allows that.
            InplaceInTraining: The layer is in place and would train; or `out` overlaps `data` in training.
            LayerEmpty: The layer was created empty and has not been loaded.
        """
        self._backend.queue.settle()
        return self._forward(*self._prepared(data, out))

    def forward_async(self, data: Array, out: Array | None = None) -> Future[Array]:
        """Begin to normalize a batch as `bn(data, out)` does, and return a future of its result.

        Calls of one layer are made in the order in which they were begun, those of different layers at the same time.
        `backward`, `reset`, a mode that is set, and another `bn(data)` wait for what was begun before. What is wrong
        with the arguments is raised at once; what happens later, by the future's `result()`.
        """
        arguments = self._prepared(data, out)
        return self._backend.queue.submit(lambda: self._forward(*arguments))

    def inDomain(self, domain: str) -> Layer:
        """Return another handle of the layer, which uses the running statistics of a domain: a site, a camera, a task.

        A layer keeps the statistics of each domain beside its own: mean, var and numOfProps, and whether they are
        frozen. Those of a new domain begin as 0, 1 and 0. Scale, bias, their gradients and the order of the steps are
        the layer's, whatever the domain; `version` counts the steps of all.

        Args:
            domain: Its name, 1 to 256 characters; "": the layer's own statistics.

        Returns:
            The handle, in the mode of this one. Its last forward is its own.

        Raises:
            InvalidName: No domain could have that name.
            LimitExceeded: The layer has 1024 domains.
        """
        state = {**self.__getstate__(), "_backend": self._backend.within(check_domain(domain))}
        inside = object.__new__(type(self))
        inside.__setstate__(state)
        return inside

    def flush(self) -> None:
        """Wait until every step of this handle has been taken.

        Those are what `forward_async` has begun, and with `push="async"` what is on its way to the server.

        Raises:
            SharedNormError: What an earlier step has ended with on its way, if no other call has raised it yet. What
                `forward_async` has ended with, its future raises.
        """
        self._backend.queue.settle()
        self._backend.flush()

    def _prepared(self, data: Array, out: Array | None) -> tuple[Array, Array, Array | None, Array | None, bool | None]:
        # In place, the mode must be known before anything is written, and must not change on the way.
        train = self.train if self.inplace else self._train
        together = self._backend.together
        x = check_data(data, self._backend.config, self._calctype, train=bool(train), together=together)
        target = None if out is None else check_out(out, x, train=bool(train))
        if self.inplace:
            if train:
                raise InplaceInTraining(f"{self}: an in-place layer cannot train (expected: evalMode() first)")
            check_writable(x)
            if out is not None and out is not data:
                raise InvalidConfiguration(f"{self} is in place, and out is another array (expected: none, or data)")
            return data, x, data, x, train
        return data, x, out, target, train

    def _forward(self, data: Array, x: Array, out: Array | None, target: Array | None, train: bool | None) -> Array:
        saved = self._pass.saved
        release = self._token if saved is None else saved.token
        result = self._backend.forward(x, train=train, release=release, out=target)
        output = result.data if out is None else out
        self._token = ""
        self._pass = _Pass(data, output, result.saved)
        return output

    def backward(
        self,
        grad: Array,
        updParamGrads: bool = True,
        updGrad: bool = True,
        scale: float = 1.0,
        momentum: float = 0.0,
    ) -> None:
        """Differentiate the last forward, which must have trained, and leave the result in `grad`.

        The forward is not run again, and the statistics do not change.

        Args:
            grad: Gradient with respect to the output, of the shape and type of the forward's input.
            updParamGrads: Whether to accumulate the gradients of scale and bias in the layer,
                `vars[...].grad = scale * new + momentum * vars[...].grad`.
            updGrad: Whether to compute the gradient with respect to the input. If not, `grad` is None.
            scale: Multiplier of the new gradients of scale and bias.
            momentum: Multiplier of the old ones.

        Raises:
            BackwardInEval: The handle, or its last forward, is in eval mode.
            BackwardWithoutForward: There was no forward since the handle was made, reset, or its mode set.
            InvalidShape: Another shape than the forward's input.
            UnsupportedDType: Not a NumPy array, or another element type than the forward's input.
            InvalidConfiguration: `scale` or `momentum` is not a finite number.
        """
        self._backend.queue.settle()
        saved = self._pass.saved
        if saved is None:
            if self._pass.data is not None or not self.train:
                raise BackwardInEval(f"{self}: no gradients in eval mode (expected: trainMode() and a forward)")
            raise BackwardWithoutForward(f"{self}: nothing to differentiate (expected: a forward in train mode)")
        given = check_grad(grad, saved.x, self._backend.config)
        for name, value in (("scale", scale), ("momentum", momentum)):
            if not is_finite(value):
                raise InvalidConfiguration(f"{name} is {value!r} (expected: a finite number)")
        self._gradients = self._backend.backward(
            saved,
            given,
            param_grads=bool(updParamGrads),
            input_grad=bool(updGrad),
            scale=float(scale),
            momentum=float(momentum),
        )

    def zeroGradParams(self) -> None:
        """Set the accumulated gradients of scale and bias to zero."""
        zeros = np.zeros(self.maps, np.float32)
        self._backend.update(StateUpdate(scale_grad=zeros, bias_grad=zeros))

    def updateParams(self, learnRate: float) -> None:
        """Add `learnRate` times the accumulated gradients to scale and bias.

        The sign is PuzzleLib's: to descend, pass a negative rate, or the negative gradient to `backward`.

        Raises:
            InvalidConfiguration: The rate is not a finite number.
            LayerEmpty: The layer was created empty and has not been loaded.
        """
        if not is_finite(learnRate):
            raise InvalidConfiguration(f"learnRate is {learnRate!r} (expected: a finite number)")
        self._backend.update_params(float(learnRate))

    @property
    def train(self) -> bool:
        """The handle's mode; the layer's default while it has not chosen. Assigning is `trainMode` or `evalMode`.

        Raises:
            InvalidConfiguration: What is assigned is neither True nor False.
        """
        return self._backend.default_train() if self._train is None else self._train

    @train.setter
    def train(self, train: bool) -> None:
        if check_flag("train", train):
            self.trainMode()
        else:
            self.evalMode()

    def trainMode(self) -> None:
        """Set this handle to train mode and forget the last forward."""
        self.reset()
        self._train = True

    def evalMode(self) -> None:
        """Set this handle to eval mode and forget the last forward."""
        self.reset()
        self._train = False

    def reset(self) -> None:
        """Forget the last forward and its gradients; the mode and the layer stay as they are."""
        self._backend.queue.settle()
        if self._pass.saved is not None:
            self._token = self._pass.saved.token
        self._pass = _Pass()
        self._gradients = _NO_GRADIENTS

    @property
    def calctype(self) -> np.dtype[Any] | None:
        """The one element type that the handle takes; None for any of the three."""
        return self._calctype

    def calcMode(self, T: npt.DTypeLike) -> None:
        """Take tensors of one element type only: float32, float16 or bfloat16.

        Raises:
            UnsupportedDType: It is another type.
        """
        self._calctype = dtype_from(T)

    def dataShapeFrom(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the output for an input of that shape: the same."""
        return shape

    def gradShapeFrom(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the input's gradient for an output's gradient of that shape: the same."""
        return shape

    @property
    def inData(self) -> Array | None:
        """The last forward's input itself; None before a forward and after `reset`."""
        return self._pass.in_data

    @property
    def data(self) -> Array | None:
        """The last forward's output; None before a forward and after `reset`."""
        return self._pass.data

    @property
    def grad(self) -> Array | None:
        """The last backward's gradient with respect to the input; None if it was not asked for."""
        return self._gradients.grad

    @property
    def savemean(self) -> Vector | None:
        """Mean of the last forward's batch, of the state's shape; None unless it trained."""
        saved = self._pass.saved
        return None if saved is None else self._shaped(saved.moments.mean.astype(np.float32))

    @property
    def saveinvvar(self) -> Vector | None:
        """1 / sqrt(biased variance + epsilon) of the last forward's batch, like `savemean`."""
        saved = self._pass.saved
        if saved is None:
            return None
        return self._shaped((1.0 / np.sqrt(saved.moments.biased_var + self.epsilon)).astype(np.float32))

    @property
    def scalegrad(self) -> Vector | None:
        """The last backward's own gradient of the scale, of the state's shape; None if not affine."""
        grad = self._gradients.scale_grad
        return None if grad is None else self._shaped(grad)

    @property
    def biasgrad(self) -> Vector | None:
        """The last backward's own gradient of the bias, of the state's shape; None if not affine."""
        grad = self._gradients.bias_grad
        return None if grad is None else self._shaped(grad)
