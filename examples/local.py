"""A layer in this process: PuzzleLib's own example, and a step of training: python examples/local.py."""

from __future__ import annotations

import numpy as np

from sharednorm import BatchNorm2D


def main() -> None:
    """Normalize a batch, then differentiate and take an optimizer's step."""
    data = np.arange(5 * 3 * 10 * 10, dtype=np.float32).reshape(5, 3, 10, 10)
    bn = BatchNorm2D(3)
    out = bn(data)
    print("output ", out.shape, out.dtype, "of mean", out.mean(axis=(0, 2, 3)).round(3))
    print("mean   ", bn.mean.ravel())
    print("var    ", bn.var.ravel())
    print("scale  ", bn.scale.ravel())
    print("bias   ", bn.bias.ravel())

    bn.backward(out - 1)  # the gradient of a loss that wants every output to be 1
    bn.updateParams(-1e-3)  # adds -0.001 times the accumulated gradients
    print("bias   ", bn.bias.ravel(), "after a step against the gradient")


if __name__ == "__main__":
    main()
