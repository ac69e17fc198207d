"""Which device has which layer, where there are several."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

from sharednorm_server.device.base import Device
from sharednorm_server.store.base import LayerKey


class Placement:
    """Spreads layers over devices by their names: a name has the same device on every server of as many devices.

    Args:
        devices: At least one.
    """

    def __init__(self, *devices: Device) -> None:
        if not devices:
            raise ValueError("there is no device (expected: at least one)")
        self._devices: Sequence[Device] = devices

    @property
    def description(self) -> str:
        """For people: all devices."""
        return ", ".join(device.description for device in self._devices)

    @property
    def used_bytes(self) -> int:
        """Bytes that are held of all devices' memory."""
        return sum(device.used_bytes for device in self._devices)

    def of(self, key: LayerKey) -> Device:
        """Return the device of a layer."""
        if len(self._devices) == 1:
            return self._devices[0]
        # Not hash(), which differs from process to process.
        name = f"{key.namespace}\0{key.name}".encode()
        return self._devices[zlib.crc32(name) % len(self._devices)]

    def warm_up(self) -> None:
        """Get every device ready."""
        for device in self._devices:
            device.warm_up()

    def on_lost(self, callback: Callable[[str], None]) -> None:
        """Have a function called once a device has failed for good; it gets the reason."""
        for device in self._devices:
            device.on_lost(callback)

    def close(self) -> None:
        """Let go of every device, after the last call."""
        for device in self._devices:
            device.close()
