"""The data: scikit-learn's handwritten digits and two photographs, cut into four shards that do not look alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.float32]

DIGITS, PHOTOS = "digits/bn", "photos/bn"
CHANNELS = {DIGITS: ("ink", "stroke", "left", "top"), PHOTOS: ("red", "green", "blue")}
BATCH_SIZE = {DIGITS: 16, PHOTOS: 8}
PATCH = 32

# Who gets what: the digits of each worker, and its part of a photograph as (file, rows, columns) of patches.
OWN_DIGITS = ((0, 5), (1, 4, 8), (3, 7, 9), (2, 6))
OWN_PATCHES = (
    ("china.jpg", slice(0, 5), slice(0, 20)),
    ("china.jpg", slice(5, 13), slice(0, 20)),
    ("flower.jpg", slice(0, 13), slice(0, 7)),
    ("flower.jpg", slice(0, 13), slice(7, 20)),
)
DESCRIPTIONS = ("sky", "temple", "leaves", "flower")


@dataclass(frozen=True)
class Shard:
    """What one worker trains on.

    Attributes:
        name: For people.
        digits: For people: which digits.
        photo: For people: which part of a photograph.
        batches: For each layer its batches, float32 (N, C, H, W), all with the N of `BATCH_SIZE`.
        samples: For each layer nine images to show, float32, gray (9, H, W) or in color (9, H, W, 3), 0 to 1.
    """

    name: str
    digits: str
    photo: str
    batches: dict[str, list[Images]]
    samples: dict[str, Images]

    def schedule(self) -> list[tuple[str, Images]]:
        """Return (layer, batch) in the order in which a worker trains, both layers spread over its time."""
        steps = [
            ((index + 0.5) / len(batches), layer, batch)
            for layer, batches in self.batches.items()
            for index, batch in enumerate(batches)
        ]
        return [(layer, batch) for _, layer, batch in sorted(steps, key=lambda step: step[:2])]


@dataclass(frozen=True)
class Statistics:
    """Mean and variance of each channel, float64 (C,)."""

    mean: npt.NDArray[np.float64]
    var: npt.NDArray[np.float64]

    @classmethod
    def of(cls, batches: list[Images]) -> Statistics:
        """Average the batches' means and unbiased variances, in float64 and with NumPy alone.

        As the batches have one size, the mean is also the mean of all values.
        """
        wide = [batch.astype(np.float64) for batch in batches]
        means = [batch.mean(axis=(0, 2, 3)) for batch in wide]
        variances = [batch.var(axis=(0, 2, 3), ddof=1) for batch in wide]
        return cls(np.mean(means, axis=0), np.mean(variances, axis=0))


def load() -> tuple[list[Shard], dict[str, Images]]:
    """Return the four shards, and for each layer a batch that no worker sees."""
    rng = np.random.default_rng(7)
    digits, patches = [rng.permutation(d) for d in _digits()], [rng.permutation(p) for p in _patches()]
    shards = [
        Shard(
            f"worker {number}",
            " ".join(map(str, OWN_DIGITS[number - 1])),
            DESCRIPTIONS[number - 1],
            {DIGITS: _batches(_filtered(own[4:]), DIGITS), PHOTOS: _batches(np.moveaxis(part[2:], 3, 1), PHOTOS)},
            {DIGITS: own[4:13], PHOTOS: part[2:11]},
        )
        for number, (own, part) in enumerate(zip(digits, patches, strict=True), 1)
    ]
    held_out = {
        DIGITS: _filtered(np.concatenate([own[:4] for own in digits])),
        PHOTOS: np.ascontiguousarray(np.moveaxis(np.concatenate([part[:2] for part in patches]), 3, 1)),
    }
    return shards, held_out


def _digits() -> list[Images]:
    from sklearn.datasets import load_digits  # noqa: PLC0415 - the spawned processes do without

    data = load_digits()
    images = (data.images / 16).astype(np.float32)
    return [images[np.isin(data.target, own)] for own in OWN_DIGITS]


def _patches() -> list[Images]:
    from sklearn.datasets import load_sample_image  # noqa: PLC0415 - the spawned processes do without

    found = []
    for file, rows, columns in OWN_PATCHES:
        image = (load_sample_image(file) / 255).astype(np.float32)
        height, width = image.shape[0] // PATCH, image.shape[1] // PATCH
        grid = image[: height * PATCH, : width * PATCH].reshape(height, PATCH, width, PATCH, 3).swapaxes(1, 2)
        found.append(grid[rows, columns].reshape(-1, PATCH, PATCH, 3))
    return found


def _filtered(images: Images) -> Images:
    """Return four feature maps of each image: its ink, its upright strokes, and its left and its upper half."""
    padded = np.pad(images, ((0, 0), (1, 1), (0, 0)))
    upright = np.minimum(images, np.minimum(padded[:, 2:], padded[:, :-2]))
    left, top = images.copy(), images.copy()
    left[:, :, images.shape[2] // 2 :] = 0
    top[:, images.shape[1] // 2 :] = 0
    return np.stack([images, upright, left, top], axis=1)


def _batches(images: Images, layer: str) -> list[Images]:
    size = BATCH_SIZE[layer]
    return [np.ascontiguousarray(images[i : i + size]) for i in range(0, len(images) - size + 1, size)]
