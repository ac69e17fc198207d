"""The messages of protocol 2, as a client that was generated from it has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

_POOL = DescriptorPool()
for _file in FileDescriptorSet.FromString(Path(__file__).with_name("protocol2.binpb").read_bytes()).file:
    _POOL.AddSerializedFile(_file.SerializeToString())

SERVICE = _POOL.FindServiceByName("sharednorm.v1.BatchNormService")
"""Its methods."""


def message(name: str) -> Any:
    """Return the class of a message."""
    return GetMessageClass(_POOL.FindMessageTypeByName(f"sharednorm.v1.{name}"))
