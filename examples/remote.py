"""A layer on a server. Run it in two terminals at once, and both train one layer.

First, in a third one: sharednorm serve. Then: python examples/remote.py [ADDRESS] [STEPS].
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np

import sharednorm


def main(address: str = "127.0.0.1:50051", steps: str = "20") -> None:
    """Train the layer "example/bn" on random data that is this process's own."""
    rng = np.random.default_rng(os.getpid())
    own_mean = rng.uniform(-5, 5)
    with sharednorm.connect(address) as hub:
        bn = hub.BatchNorm2D(3, name="example/bn", minFactor=0.0)
        for _ in range(int(steps)):
            bn(rng.normal(own_mean, 1, (8, 3, 16, 16)).astype(np.float32))
            state = bn.snapshot()
            print(f"mine {own_mean:+.3f}, shared {state.mean.mean():+.3f} after {state.num_of_props} steps of all")
            time.sleep(0.2)


if __name__ == "__main__":
    main(*sys.argv[1:])
