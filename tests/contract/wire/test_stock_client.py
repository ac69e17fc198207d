"""A client made of the generated stubs alone, as one in another language would be, gets correct answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from sharednorm.v1 import layer_pb2, service_pb2, tensor_pb2
from sharednorm_server.config.options import ServerConfig
from sharednorm_server.rpc import unserved
from tests.support import oracle
from tests.support.processes import server
from tests.support.stock import (
    MAPS,
    SECONDS,
    SERVICE,
    Floats,
    StockClient,
    channel_to,
    code_of,
    config,
    detail_of,
    doubles,
    floats,
    raw,
    raw_stream,
    ref,
    spec,
)

SHAPE = (4, MAPS, 5, 2)
ONES, ZEROS = np.ones(MAPS), np.zeros(MAPS)


@pytest.fixture(scope="module", params=["in process, tcp", "in process, unix", "real process"])
def channel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[grpc.Channel]:
    if request.param == "real process":
        with server.server_process() as process, channel_to(process.address) as opened:
            yield opened
        return
    path = tmp_path_factory.mktemp("socket") / "s"
    listen = f"unix:{path}" if request.param.endswith("unix") else "127.0.0.1:0"
    with server.in_process(ServerConfig(listen=listen)) as running, channel_to(running.address) as opened:
        yield opened


@pytest.fixture
def client(channel: grpc.Channel) -> StockClient:
    return StockClient.on(channel)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """Name a layer of this test alone."""
    return str(request.node.name)


def tensor(seed: int, shape: tuple[int, ...] = SHAPE) -> Floats:
    return oracle.random_tensor(seed, shape)


def trained(x: Floats) -> tuple[Floats, int]:
    count, mean, m2 = oracle.batch_moments(x)
    return oracle.normalized(x, mean, m2 / count, ONES, ZEROS, 1e-5).astype(np.float32), count


def test_server_information(client: StockClient) -> None:
    info = client.stub.GetServerInfo(service_pb2.GetServerInfoRequest(), timeout=SECONDS)
    assert (info.protocol, info.store) == (3, "memory:")
    assert info.device.startswith("cpu (")
    assert len(info.version.split(".")) >= 3
    assert info.max_unary_bytes == 1 << 20
    assert info.max_tensor_bytes == 8 << 30
    assert info.chunk_bytes == 1 << 20


def test_create_get_and_attach(client: StockClient, name: str) -> None:
    made = client.create(name, bias=[1, 2, 3])
    assert made.created
    assert (made.layer.ref.namespace, made.layer.ref.name) == ("default", name)
    assert made.layer.ref.uid
    assert made.layer.config.kind == layer_pb2.LAYER_KIND_BATCH_NORM_2D
    assert made.layer.config.averaging == layer_pb2.AVERAGING_STANDARD
    assert (made.layer.version, made.layer.num_of_props, made.layer.initialized) == (0, 0, True)
    assert made.layer.default_mode == layer_pb2.MODE_TRAIN
    again = client.create(name)
    assert not again.created
    assert again.layer == made.layer
    got = client.stub.GetLayer(service_pb2.GetLayerRequest(ref=ref(name, "default")), timeout=SECONDS)
    assert got.layer == made.layer
    assert list(client.stats(name).state.bias.values) == [1, 2, 3]


def test_forward_in_one_message(client: StockClient, name: str) -> None:
    client.create(name)
    x = tensor(1)
    answer = client.forward(name, x)
    expected, count = trained(x)
    np.testing.assert_allclose(floats(answer.data, answer.output.shape), expected, rtol=2e-6, atol=2e-6)
    assert answer.output == spec(SHAPE)
    assert (answer.mode, answer.version, answer.num_of_props) == (layer_pb2.MODE_TRAIN, 1, 1)
    assert (list(answer.moments.count), answer.saved_input) == ([count], "")
    np.testing.assert_allclose(answer.moments.mean, oracle.batch_moments(x)[1], rtol=1e-7)
    assert list(answer.scale.values) == [1, 1, 1]


def test_evaluation(client: StockClient, name: str) -> None:
    client.create(name, mean=[1, 2, 3], var=[4, 5, 6])
    x = tensor(1)
    answer = client.forward(name, x, layer_pb2.MODE_EVAL)
    expected = oracle.normalized(x, np.array([1.0, 2, 3]), np.array([4.0, 5, 6]), ONES, ZEROS, 1e-5)
    np.testing.assert_allclose(floats(answer.data, SHAPE), expected, rtol=2e-6, atol=2e-6)
    assert (answer.mode, answer.version) == (layer_pb2.MODE_EVAL, 0)
    assert not answer.HasField("moments")
    assert not answer.HasField("scale")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_floats(client: StockClient, name: str, dtype: str) -> None:
    client.create(name)
    x = oracle.random_tensor(1, SHAPE, dtype)
    number = {"float16": tensor_pb2.DATA_TYPE_FLOAT16, "bfloat16": tensor_pb2.DATA_TYPE_BFLOAT16}[dtype]
    request = service_pb2.ForwardRequest(ref=ref(name), input=spec(SHAPE, number), data=x.tobytes())
    answer = client.stub.Forward(request, timeout=SECONDS)
    y = np.frombuffer(answer.data, oracle.dtype(dtype)).reshape(SHAPE)
    count, mean, m2 = oracle.batch_moments(x)
    expected = oracle.normalized(x, mean, m2 / count, ONES, ZEROS, 1e-5)
    np.testing.assert_allclose(y.astype(np.float64), expected, rtol=oracle.rounding(dtype), atol=2e-6)
    assert answer.output.dtype == number


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 4096])
def test_forward_in_chunks_of_any_size(client: StockClient, name: str, chunk_bytes: int) -> None:
    client.create(name)
    x = tensor(1)
    header, data = client.forward_stream(name, x, chunk_bytes)
    np.testing.assert_allclose(floats(data, SHAPE), trained(x)[0], rtol=2e-6, atol=2e-6)
    assert header.output == spec(SHAPE)
    assert header.version == 1


def test_a_large_tensor_in_chunks(client: StockClient, name: str) -> None:
    client.create(name)
    x = tensor(2, (16, MAPS, 128, 128))
    header, data = client.forward_stream(name, x, 1 << 20)
    np.testing.assert_allclose(floats(data, x.shape), trained(x)[0], rtol=2e-6, atol=2e-6)
    assert list(header.moments.count) == [16 * 128 * 128]


def test_both_ways_give_the_same_bits(client: StockClient, name: str) -> None:
    client.create(name)
    x = tensor(1)
    assert client.forward(name, x).data == client.forward_stream(name, x, 16)[1]


def backward(name: str, **changes: object) -> service_pb2.BackwardRequest:
    return service_pb2.BackwardRequest(ref=ref(name), grad=spec(SHAPE), **changes)  # type: ignore[arg-type]


def test_backward_in_one_message(client: StockClient, name: str) -> None:
    client.create(name)
    x, grad = tensor(1), tensor(2)
    kept = client.forward(name, x, keep=True)
    assert len(kept.saved_input) == 32
    answer = client.stub.Backward(backward(name, saved_input=kept.saved_input, data=grad.tobytes()), timeout=SECONDS)
    expected = oracle.gradients(x, grad, ONES, 1e-5)
    np.testing.assert_allclose(floats(answer.data, SHAPE), expected[0], rtol=2e-6, atol=2e-5)
    np.testing.assert_allclose(answer.scale_grad.values, expected[1], rtol=2e-6, atol=1e-4)
    np.testing.assert_allclose(answer.bias_grad.values, expected[2], rtol=2e-6, atol=1e-4)
    state = client.stats(name).state
    assert list(state.scale_grad.values) == list(answer.scale_grad.values)


@pytest.mark.parametrize("chunk_bytes", [7, 1 << 20])
def test_backward_in_chunks(client: StockClient, name: str, chunk_bytes: int) -> None:
    client.create(name)
    x, grad = tensor(1), tensor(2)
    kept = client.forward_stream(name, x, 64, keep=True)[0]
    header, data = client.backward_stream(backward(name, saved_input=kept.saved_input), grad.tobytes(), chunk_bytes)
    np.testing.assert_allclose(floats(data, SHAPE), oracle.gradients(x, grad, ONES, 1e-5)[0], rtol=2e-6, atol=2e-5)
    assert header.grad == spec(SHAPE)


@pytest.mark.parametrize("stream", [False, True])
def test_backward_with_the_input_sent_again(client: StockClient, name: str, stream: bool) -> None:
    client.create(name)
    x, grad = tensor(1), tensor(2)
    forward = client.forward(name, x)
    saved = service_pb2.SavedForward(input=forward.output, moments=forward.moments, scale=forward.scale)
    request, data = backward(name, saved_forward=saved), grad.tobytes() + x.tobytes()
    if stream:
        got = client.backward_stream(request, data, 100)[1]
    else:
        request.data = data
        got = client.stub.Backward(request, timeout=SECONDS).data
    np.testing.assert_allclose(floats(got, SHAPE), oracle.gradients(x, grad, ONES, 1e-5)[0], rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("stream", [False, True])
def test_backward_without_the_inputs_gradient(client: StockClient, name: str, stream: bool) -> None:
    client.create(name)
    grad = tensor(2)
    kept = client.forward(name, tensor(1), keep=True).saved_input
    request = backward(name, saved_input=kept, update_grad=False, scale=0.0, momentum=0.0)
    if stream:
        answer, data = client.backward_stream(request, grad.tobytes(), 64)
    else:
        request.data = grad.tobytes()
        answer = client.stub.Backward(request, timeout=SECONDS)
        data = answer.data
    assert data == b""
    assert not answer.HasField("grad")
    assert answer.HasField("bias_grad")
    assert list(client.stats(name).state.bias_grad.values) == [0, 0, 0]


def test_absent_fields_of_a_backward_have_their_documented_meaning(client: StockClient, name: str) -> None:
    client.create(name)
    kept = client.forward(name, tensor(1), keep=True).saved_input
    grad = np.ones(SHAPE, np.float32)
    for changes, expected in (
        ({}, 40.0),
        ({"momentum": 1.0}, 80.0),
        ({"scale": 0.5, "momentum": 0.25}, 40.0),
        ({"update_param_grads": False, "scale": 9.0}, 40.0),
    ):
        client.stub.Backward(backward(name, saved_input=kept, data=grad.tobytes(), **changes), timeout=SECONDS)
        assert list(client.stats(name).state.bias_grad.values) == [expected] * MAPS


def test_an_optimizers_step(client: StockClient, name: str) -> None:
    client.create(name, scale_grad=[1, 2, 3])
    client.stub.UpdateParams(service_pb2.UpdateParamsRequest(ref=ref(name), learn_rate=0.5), timeout=SECONDS)
    assert list(client.stats(name).state.scale.values) == [1.5, 2, 2.5]


def test_the_default_mode(client: StockClient, name: str) -> None:
    client.create(name)
    answer = client.stub.SetTrain(service_pb2.SetTrainRequest(ref=ref(name), train=False), timeout=SECONDS)
    assert answer.layer.default_mode == layer_pb2.MODE_EVAL
    assert client.forward(name, tensor(1), layer_pb2.MODE_UNSPECIFIED).mode == layer_pb2.MODE_EVAL
    assert client.forward(name, tensor(1), layer_pb2.MODE_TRAIN).mode == layer_pb2.MODE_TRAIN


def test_set_state_and_read_it_back(client: StockClient, name: str) -> None:
    client.create(name)
    state = layer_pb2.LayerState(mean=doubles([1, 2, 3]), num_of_props=5)
    answer = client.stub.SetState(service_pb2.SetStateRequest(ref=ref(name), state=state), timeout=SECONDS)
    assert (answer.layer.num_of_props, answer.layer.version) == (5, 0)
    stats = client.stats(name)
    assert list(stats.state.mean.values) == [1, 2, 3]
    assert list(stats.state.var.values) == [1, 1, 1]
    assert stats.state.num_of_props == 5
    assert stats.layer == answer.layer
    plain = client.stub.GetStats(service_pb2.GetStatsRequest(ref=ref(name)), timeout=SECONDS)
    assert not plain.state.HasField("scale_grad")


def test_an_empty_layer(client: StockClient, name: str) -> None:
    request = service_pb2.CreateLayerRequest(ref=ref(name), config=config(), empty=True)
    assert not client.stub.CreateLayer(request, timeout=SECONDS).layer.initialized
    with pytest.raises(grpc.RpcError) as caught:
        client.forward(name, tensor(1))
    assert (code_of(caught.value), detail_of(caught.value).reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "LAYER_EMPTY",
    )


def test_delete(client: StockClient, name: str) -> None:
    client.create(name)
    client.stub.DeleteLayer(service_pb2.DeleteLayerRequest(ref=ref(name)), timeout=SECONDS)
    with pytest.raises(grpc.RpcError) as caught:
        client.stats(name)
    assert code_of(caught.value) is grpc.StatusCode.NOT_FOUND
    detail = detail_of(caught.value)
    assert detail.reason == "LAYER_NOT_FOUND"
    assert detail.metadata["name"] == name
    assert name in detail.message


def test_a_mismatch_names_the_fields(client: StockClient, name: str) -> None:
    client.create(name)
    request = service_pb2.CreateLayerRequest(ref=ref(name), config=config(MAPS + 1, epsilon=0.5))
    with pytest.raises(grpc.RpcError) as caught:
        client.stub.CreateLayer(request, timeout=SECONDS)
    assert code_of(caught.value) is grpc.StatusCode.ALREADY_EXISTS
    detail = detail_of(caught.value)
    assert detail.reason == "CONFIGURATION_MISMATCH"
    assert dict(detail.metadata) == {"maps": "3 (requested: 4)", "epsilon": "1e-05 (requested: 0.5)"}


def test_250_layers_in_pages(client: StockClient, name: str) -> None:
    names = [f"{number:03}/層" for number in range(250)]
    for each in names:
        client.stub.CreateLayer(service_pb2.CreateLayerRequest(ref=ref(each, name), config=config()), timeout=SECONDS)
    for size, expected in ((0, [100, 100, 50]), (90, [90, 90, 70]), (1000, [250])):
        found: list[str] = []
        sizes: list[int] = []
        token = ""
        while not sizes or token:
            request = service_pb2.ListLayersRequest(namespace=name, page_size=size, page_token=token)
            page = client.stub.ListLayers(request, timeout=SECONDS)
            found += [layer.ref.name for layer in page.layers]
            sizes.append(len(page.layers))
            token = page.next_page_token
        assert (sizes, found) == (expected, names)


def test_namespaces(client: StockClient, name: str) -> None:
    for namespace in ("one " + name, "two " + name):
        request = service_pb2.CreateLayerRequest(ref=ref("a", namespace), config=config())
        assert client.stub.CreateLayer(request, timeout=SECONDS).created
    client.stub.DeleteLayer(service_pb2.DeleteLayerRequest(ref=ref("a", "one " + name)), timeout=SECONDS)
    page = client.stub.ListLayers(service_pb2.ListLayersRequest(namespace="two " + name), timeout=SECONDS)
    assert [layer.ref.name for layer in page.layers] == ["a"]


def test_health(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", SERVICE):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=SECONDS)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=SECONDS)
    assert code_of(caught.value) is grpc.StatusCode.NOT_FOUND


def test_reflection(channel: grpc.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
    ]
    listed, file = stub.ServerReflectionInfo(iter(requests), timeout=SECONDS)
    assert {service.name for service in listed.list_services_response.service} == {
        SERVICE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert b"BatchNormService" in file.file_descriptor_response.file_descriptor_proto[0]


def test_a_call_that_is_sent_twice_under_one_key(client: StockClient, name: str) -> None:
    client.create(name)
    opened = [client.stub.OpenSession(service_pb2.OpenSessionRequest(), timeout=SECONDS).session for _ in range(2)]
    assert [len(session) for session in opened] == [8, 8]
    assert opened[0] != opened[1]
    x = tensor(1)
    request = service_pb2.ForwardRequest(ref=ref(name), input=spec(SHAPE), data=x.tobytes())
    request.key.session, request.key.seq = opened[0] + b"mine 001", 1
    first, again = (client.stub.Forward(request, timeout=SECONDS) for _ in range(2))
    assert (first.replayed, again.replayed) == (False, True)
    assert (first.version, again.version) == (1, 1)
    assert first.data == again.data
    request.data = tensor(2).tobytes()
    with pytest.raises(grpc.RpcError) as caught:
        client.stub.Forward(request, timeout=SECONDS)
    assert (code_of(caught.value), detail_of(caught.value).reason) == (
        grpc.StatusCode.FAILED_PRECONDITION, "KEY_REUSED",
    )  # fmt: skip
    request.key.seq = 3
    with pytest.raises(grpc.RpcError) as caught:
        client.stub.Forward(request, timeout=SECONDS)
    assert detail_of(caught.value).reason == "STEP_OUT_OF_ORDER"
    request.key.seq = 2
    assert client.stub.Forward(request, timeout=SECONDS).version == 2
    for session, seq in ((b"", 1), (opened[0], 1), (opened[0] + b"mine 002", 0), (opened[0] + b"mine 0021", 1)):
        request.key.session, request.key.seq = session, seq
        with pytest.raises(grpc.RpcError) as caught:
            client.stub.Forward(request, timeout=SECONDS)
        assert detail_of(caught.value).reason == "MALFORMED_MESSAGE"
    request.key.session, request.key.seq = b"\xff" * 16, 1
    with pytest.raises(grpc.RpcError) as caught:
        client.stub.Forward(request, timeout=SECONDS)
    assert detail_of(caught.value).reason == "SESSION_EXPIRED"


def test_every_method_of_the_contract_is_there(channel: grpc.Channel) -> None:
    # Of these an empty message is a good one; other tests call them.
    fine = {"GetServerInfo", "OpenSession", "Backup", "ListLayers", "LeaveGroup", "BatchPushMoments", "BatchGetStats"}
    for method in service_pb2.DESCRIPTOR.services_by_name["BatchNormService"].methods:
        if method.name in fine or method.name in unserved.METHODS:
            continue
        with pytest.raises(grpc.RpcError) as caught:
            list(raw_stream(channel, method.name, iter([]))) if method.client_streaming else raw(
                channel, method.name, b""
            )
        assert code_of(caught.value) is grpc.StatusCode.INVALID_ARGUMENT, method.name
        assert detail_of(caught.value).reason


def test_a_socket_is_the_users_alone(tmp_path: Path) -> None:
    with server.in_process(ServerConfig(listen=f"unix:{tmp_path / 's'}")):
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
