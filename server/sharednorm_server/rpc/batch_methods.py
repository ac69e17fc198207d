"""Calls of many small requests: each is done by itself, in order, and has an answer or an error of its own."""

from __future__ import annotations

from collections.abc import Callable

from sharednorm.codec import convert
from sharednorm.core.limits import DEFAULT_NAMESPACE, MAX_BATCH_ENTRIES, MAX_BATCH_MAPS
from sharednorm.errors import CallCancelled, LimitExceeded
from sharednorm.v1 import layer_pb2, service_pb2
from sharednorm_server.layers.requests import LayerRecord
from sharednorm_server.rpc.errors import known_error


def push_many(
    request: service_pb2.BatchPushMomentsRequest,
    push: Callable[[service_pb2.PushMomentsRequest], service_pb2.PushMomentsResponse],
) -> service_pb2.BatchPushMomentsResponse:
    """Take many steps. One that is refused takes with it those of the same layer and domain that come behind.

    Args:
        request: The steps.
        push: Takes one.

    Raises:
        LimitExceeded: They are too many, or have too many maps; none was taken.
    """
    require_few("pushes", len(request.pushes), sum(len(each.moments.mean) for each in request.pushes))
    results: list[service_pb2.BatchPushMomentsResult] = []
    refused: set[tuple[str, str, str]] = set()
    for each in request.pushes:
        name = _name(each.ref)
        try:
            _require_none_before(name, refused)
            results.append(service_pb2.BatchPushMomentsResult(moments=push(each)))
        except Exception as error:  # noqa: BLE001 - the edge: everything becomes the answer to this one
            refused.add(name)
            results.append(service_pb2.BatchPushMomentsResult(error=_detail("BatchPushMoments", error)))
    return service_pb2.BatchPushMomentsResponse(results=results)


def get_many_stats(
    request: service_pb2.BatchGetStatsRequest,
    find: Callable[[layer_pb2.LayerRef], LayerRecord],
    read: Callable[[LayerRecord, service_pb2.GetStatsRequest], service_pb2.GetStatsResponse],
) -> service_pb2.BatchGetStatsResponse:
    """Read many layers.

    Args:
        request: Which.
        find: Returns a layer as it is now.
        read: Makes the answer.

    Raises:
        LimitExceeded: They are too many, or have too many maps.
    """
    require_few("reads", len(request.reads), 0)  # before they are looked at
    found: list[LayerRecord | Exception] = []
    for each in request.reads:
        try:
            found.append(find(each.ref))
        except Exception as error:  # noqa: BLE001, PERF203 - the edge: everything becomes the answer to this one
            found.append(error)
    require_few("reads", len(found), sum(one.config.maps for one in found if isinstance(one, LayerRecord)))
    answer = service_pb2.BatchGetStatsResponse()
    for each, one in zip(request.reads, found, strict=True):
        if isinstance(one, LayerRecord):
            answer.results.add(stats=read(one, each))
        else:
            answer.results.add(error=_detail("BatchGetStats", one))
    return answer


def require_few(what: str, entries: int, maps: int) -> None:
    """Check the size of a call of many requests.

    Raises:
        LimitExceeded: They are too many, or have too many maps together.
    """
    for limit, value, most in (
        ("max_batch_entries", entries, MAX_BATCH_ENTRIES),
        ("max_batch_maps", maps, MAX_BATCH_MAPS),
    ):
        if value > most:
            words = what if limit == "max_batch_entries" else f"maps in its {what}"
            raise LimitExceeded(
                f"the call has {value} {words} (expected: at most {most}, {limit}; send several calls)",
                {"limit": limit, "value": str(value), "maximum": str(most)},
            )


def _require_none_before(name: tuple[str, str, str], refused: set[tuple[str, str, str]]) -> None:
    if name in refused:
        raise CallCancelled("not taken, since an earlier push of this layer in the same call was not")


def _name(ref: layer_pb2.LayerRef) -> tuple[str, str, str]:
    return ref.namespace or DEFAULT_NAMESPACE, ref.name, ref.domain


def _detail(method: str, error: Exception) -> service_pb2.ErrorDetail:
    return convert.error_to_detail(known_error(method, error))
