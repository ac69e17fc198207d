"""How a tensor is cut into units and tiles, from its shape alone, so that sums have one order on any machine.

A tensor (N, C, S) is seen in one of two ways.

*Rows*, where S is large: a unit is one channel, a tile is a piece of one of its rows (n, c), and a sum runs along it.

*Columns*, where S is small, down to 1: a unit is a group of neighbouring channels, a tile is a block of samples,
and sums run down the columns (c, s) of the block, each with an origin of its own; the columns of a channel are
then merged. When C * S is small too, several samples are folded into one long row of the block.

Every tile leaves its partial result for every channel in a slot of its own. Slots are merged in their order.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

ROW_SPACE = 1024
"""From this S on, rows."""
PIECE = 16384
"""Values in a tile of a row, at most. Its origin is one of them, which keeps float64 sums good to 16384 * 2**-53."""
COLUMNS = 1024
"""Columns of a unit, at least, where there are as many; more if S is not a multiple of 16."""
BLOCK = 65536
"""Values in a tile of columns, about."""
SPREAD_SPACE = 256
"""Below this S, coefficients are spread out, one per column, where enough samples use them."""
FEW_SAMPLES, SHORT_SPACE = 8, 32
"""With fewer samples, only below this S."""
LANES = 16


class Plan(NamedTuple):
    """The cut of one shape; numbers only, as the kernels read it.

    Attributes:
        samples: N.
        channels: C.
        space: S, the product of the sizes behind the channels.
        columns: 1 if seen as columns, 0 if as rows.
        group: Channels of a unit; the last unit may have fewer.
        fold: Samples in one row of a block of columns. More than 1 only if a unit is all channels.
        step: Values in a piece of a row, or rows in a block of columns; the last may have fewer.
        units: Number of units.
        tiles: Number of tiles of a unit. If N is not a multiple of `fold`, the last holds what is left over.
        width: Columns of a full unit, fold included.
        spread: 1 if an output is computed with coefficients spread out, one per column, along rows of a unit;
            0 if with one per channel, along S.
    """

    samples: int
    channels: int
    space: int
    columns: int
    group: int
    fold: int
    step: int
    units: int
    tiles: int
    width: int
    spread: int


@lru_cache(maxsize=1024)
def plan_of(samples: int, channels: int, space: int) -> Plan:
    """Return the plan of a shape (N, C, S), every size at least 1."""
    if space >= ROW_SPACE:
        pieces = -(-space // PIECE)
        return Plan(samples, channels, space, 0, 1, 1, PIECE, channels, samples * pieces, 0, 0)
    group = min(channels, _group(space))
    units = -(-channels // group)
    fold = min(samples, max(1, COLUMNS // (channels * space))) if units == 1 else 1
    width = fold * group * space
    step = max(1, BLOCK // width)
    tiles = -(-(samples // fold) // step) + (samples % fold > 0)
    spread = space < (SHORT_SPACE if samples < FEW_SAMPLES else SPREAD_SPACE)
    return Plan(samples, channels, space, 1, group, fold, step, units, tiles, width, int(spread))


def _group(space: int) -> int:
    # So many channels that a row of the unit is long enough, and, if that takes many, whole vectors of 16.
    even = LANES // math.gcd(space, LANES) if space < COLUMNS // 2 else 1
    return even * -(-COLUMNS // (even * space))
