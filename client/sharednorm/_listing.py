"""The layers of a server, as a list."""

from __future__ import annotations

from dataclasses import dataclass

from sharednorm import convert
from sharednorm._server import Caller
from sharednorm.config import LayerConfig
from sharednorm.remote import is_train
from sharednorm.v1 import layer_pb2, service_pb2


@dataclass(frozen=True)
class LayerInfo:
    """A layer as it was when the server was asked.

    Attributes:
        name: Its name.
        config: Its configuration.
        train: The mode of handles that have not chosen one: True for train.
        version: Steps applied since it was created.
        num_of_props: Steps that its running statistics have taken in.
        initialized: False if it was created with `empty=True` and has not been loaded yet.
        stats_frozen: Whether training steps leave the running statistics as they are.
        domains: Domains that it keeps statistics of beside its own, which those above are.
    """

    name: str
    config: LayerConfig
    train: bool
    version: int
    num_of_props: int
    initialized: bool
    stats_frozen: bool
    domains: int


def list_layers(connection: Caller, namespace: str) -> list[LayerInfo]:
    """Return all layers of a namespace, in the order of their names."""
    found: list[LayerInfo] = []
    token = ""
    while True:
        request = service_pb2.ListLayersRequest(namespace=namespace, page_size=1000, page_token=token)
        answer = connection.call("ListLayers", request, service_pb2.ListLayersResponse, attempts=connection.patience())
        found += map(_info, answer.layers)
        token = answer.next_page_token
        if not token:
            return found


def _info(layer: layer_pb2.Layer) -> LayerInfo:
    return LayerInfo(
        layer.ref.name,
        convert.config_from_proto(layer.config),
        is_train(layer.default_mode),
        layer.version,
        layer.num_of_props,
        layer.initialized,
        layer.stats_frozen,
        layer.domains,
    )
