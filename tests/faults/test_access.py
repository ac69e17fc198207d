"""Tenants are apart: every method, by whoever may not call it; encryption; and secrets that appear nowhere."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest

import sharednorm
from sharednorm.errors import (
    DeadlineExceeded,
    InvalidConfiguration,
    PermissionDenied,
    ServerUnavailable,
    Unauthenticated,
)
from sharednorm.v1 import layer_pb2, service_pb2
from sharednorm_server.auth import certificates
from sharednorm_server.auth.tokens import RIGHTS, Right, append, new_token
from tests.support.inside import connection_of
from tests.support.oracle import random_tensor
from tests.support.processes.server import ServerProcess, run, server_process
from tests.support.stock import SECONDS, SERVICE, code_of, config, detail_of, ref, spec

SHAPE = (4, 3, 5, 2)
METHODS = [method.name for method in service_pb2.DESCRIPTOR.services_by_name["BatchNormService"].methods]
STREAMS = {"ForwardStream", "BackwardStream"}
# A handshake that fails ends the call; on a busy machine it may take longer than the call has.
NOT_LET_IN = (ServerUnavailable, DeadlineExceeded)


@dataclass
class Guarded:
    """A server that asks for tokens, over TLS, and tokens of all kinds."""

    server: ServerProcess
    directory: Path
    tokens: dict[str, str]

    @property
    def ca(self) -> str:
        return str(self.directory / "ca.pem")

    def connect(self, token: str | None = "train", namespace: str = "default") -> sharednorm.Hub:
        given = None if token is None else self.tokens[token]
        return sharednorm.connect(self.server.address, namespace=namespace, token=given, tls=self.ca, timeout=20)

    @contextmanager
    def channel(self) -> Iterator[grpc.Channel]:
        credentials = grpc.ssl_channel_credentials(Path(self.ca).read_bytes())
        with grpc.secure_channel(self.server.address, credentials) as channel:
            yield channel


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    directory = tmp_path_factory.mktemp("guarded")
    certificates.create(directory, ["localhost", "127.0.0.1"], 3)
    tokens = {}
    for name, right, namespaces, expires in (
        *((right.name.lower(), right, ("default",), None) for right in Right),
        ("other", Right.ADMIN, ("other",), None),
        ("expired", Right.ADMIN, ("*",), time.time() - 1),
        ("all", Right.ADMIN, ("*",), None),
    ):
        tokens[name], token = new_token(name, right, namespaces, expires)
        append(directory / "tokens", token)
    tokens["wrong"] = "sn_" + "x" * 43
    options = (
        "--tokens", str(directory / "tokens"), "--tls-cert", str(directory / "server.pem"),
        "--tls-key", str(directory / "server.key"), "--state", f"sqlite://{directory}/state", "--log-level", "debug",
    )  # fmt: skip
    with server_process(*options) as server:
        found = Guarded(server, directory, tokens)
        with found.connect("all") as hub:
            hub.BatchNorm2D(3, name="bn")
        with found.connect("all", namespace="other") as hub:
            hub.BatchNorm2D(3, name="theirs")
        yield found
        log = server.log()
        assert not any(token in log for token in tokens.values())


def call(channel: grpc.Channel, method: str, message: bytes, token: str | None, namespace: str = "") -> bytes:
    """Call a method, in whatever namespace."""
    metadata: tuple[tuple[str, str | bytes], ...] = () if token is None else (("authorization", f"Bearer {token}"),)
    if namespace:
        metadata += (("sharednorm-namespace-bin", namespace.encode()),)
    path = f"/{SERVICE}/{method}"
    if method in STREAMS:
        return b"".join(channel.stream_stream(path, _same, _same)(iter([message]), timeout=SECONDS, metadata=metadata))
    return channel.unary_unary(path, _same, _same)(message, timeout=SECONDS, metadata=metadata)


def _same(message: bytes) -> bytes:
    return message


def outcome(channel: grpc.Channel, method: str, token: str | None, namespace: str = "") -> tuple[grpc.StatusCode, str]:
    """Call a method with an empty message, and return how that ended."""
    try:
        call(channel, method, b"", token, namespace)
    except grpc.RpcError as error:
        return code_of(error), detail_of(error).reason
    return grpc.StatusCode.OK, ""


REFUSED = {
    "no token": (None, "", "UNAUTHENTICATED"),
    "a wrong token": ("wrong", "", "UNAUTHENTICATED"),
    "an expired token": ("expired", "", "UNAUTHENTICATED"),
    "another namespace": ("other", "", "PERMISSION_DENIED"),
    "a namespace of others": ("admin", "other", "PERMISSION_DENIED"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_every_method_refuses_those_who_do_not_belong(guarded: Guarded, case: str) -> None:
    name, namespace, reason = REFUSED[case]
    token = None if name is None else guarded.tokens[name]
    with guarded.channel() as channel:
        for method in METHODS:
            code, found = outcome(channel, method, token, namespace)
            assert (code.name, found) == (reason, reason), method


@pytest.mark.parametrize("right", Right)
def test_every_method_refuses_a_lesser_right_and_takes_its_own(guarded: Guarded, right: Right) -> None:
    with guarded.channel() as channel:
        for method in METHODS:
            code, _ = outcome(channel, method, guarded.tokens[right.name.lower()])
            refused = right < RIGHTS[method] or method == "Backup"  # which takes a token for all namespaces
            assert (code is grpc.StatusCode.PERMISSION_DENIED) is refused, method


def test_a_method_that_there_is_not_takes_a_token_and_says_so(guarded: Guarded) -> None:
    with guarded.channel() as channel:
        for method, reason in (("PushMany", "INCOMPATIBLE_SERVER"), ("Nothing", "NOT_SUPPORTED")):
            assert outcome(channel, method, None) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
            found = outcome(channel, method, guarded.tokens["read"])
            assert found == (grpc.StatusCode.UNIMPLEMENTED, reason)


def test_the_body_cannot_name_another_namespace(guarded: Guarded) -> None:
    with guarded.channel() as channel:
        token = guarded.tokens["admin"]
        theirs = ref("theirs", "other")
        for method, request in (
            ("GetStats", service_pb2.GetStatsRequest(ref=theirs)),
            ("GetLayer", service_pb2.GetLayerRequest(ref=theirs)),
            ("ListLayers", service_pb2.ListLayersRequest(namespace="other")),
            ("DeleteLayer", service_pb2.DeleteLayerRequest(ref=theirs)),
            ("CreateLayer", service_pb2.CreateLayerRequest(ref=theirs, config=config())),
            ("PushMoments", service_pb2.PushMomentsRequest(ref=theirs)),
            ("SynchronizeMoments", service_pb2.SynchronizeMomentsRequest(ref=theirs)),
            ("SynchronizeGradients", service_pb2.SynchronizeGradientsRequest(ref=theirs)),
            ("JoinGroup", service_pb2.JoinGroupRequest(namespace="other", group="g", member="m", size=1)),
            ("ListSnapshots", service_pb2.ListSnapshotsRequest(ref=theirs)),
            ("Rollback", service_pb2.RollbackRequest(ref=theirs)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call(channel, method, request.SerializeToString(), token)
            assert detail_of(caught.value).reason == "PERMISSION_DENIED", method
        many = service_pb2.BatchGetStatsRequest(reads=[service_pb2.GetStatsRequest(ref=theirs)])
        found = call(channel, "BatchGetStats", many.SerializeToString(), token)
        answer = service_pb2.BatchGetStatsResponse.FromString(found)
        assert answer.results[0].error.reason == "PERMISSION_DENIED"


def test_what_is_not_there_and_what_is_not_theirs_is_one_answer(guarded: Guarded) -> None:
    answers = set()
    with guarded.connect("train") as hub, pytest.raises(PermissionDenied):
        hub.delete("bn")
    for name in ("theirs", "nothing of that name"):
        with pytest.raises(PermissionDenied) as caught, guarded.connect("train", namespace="other") as hub:
            hub.layer(name)
        answers.add(str(caught.value))
    assert len(answers) == 1


def test_a_layer_is_used_over_tls_with_a_token(guarded: Guarded) -> None:
    with guarded.connect("train") as hub:
        assert hub.transport == "grpc"
        bn, twin = hub.BatchNorm2D(3, name="mine", sscale=0.0), sharednorm.BatchNorm2D(3, sscale=0.0)
        for seed in range(3):
            x = random_tensor(seed, SHAPE)
            np.testing.assert_array_equal(bn(x), twin(x))
            for each in (bn, twin):
                each.backward(x)
                each.updateParams(0.1)
        np.testing.assert_array_equal(bn.mean, twin.mean)
        big = np.tile(random_tensor(1, SHAPE), (1, 1, 100, 300))
        np.testing.assert_array_equal(bn(big), twin(big))  # in chunks
    with guarded.connect("eval") as hub:
        evaluator = hub.layer("mine")
        with pytest.raises(PermissionDenied, match="with the right train"):
            evaluator(x)
        evaluator.evalMode()
        twin.evalMode()
        np.testing.assert_array_equal(evaluator(x), twin(x))
        with pytest.raises(PermissionDenied):
            evaluator.updateParams(0.1)
    with guarded.connect("read") as hub:
        assert hub.layer("mine").version == 4
        with pytest.raises(PermissionDenied), guarded.connect("train", namespace="other"):
            pass


def test_a_token_to_evaluate_trains_nothing_whatever_the_call_leaves_out(guarded: Guarded) -> None:
    with guarded.connect("train") as hub:
        layer = hub.BatchNorm2D(3, name="kept", sscale=0.0)
        x = random_tensor(1, SHAPE)
        layer(x)
        with guarded.channel() as channel:
            for mode in (layer_pb2.MODE_TRAIN, layer_pb2.MODE_UNSPECIFIED, layer_pb2.MODE_EVAL):
                request = service_pb2.ForwardRequest(ref=ref("kept"), mode=mode, input=spec(SHAPE), data=x.tobytes())
                if mode == layer_pb2.MODE_EVAL:
                    call(channel, "Forward", request.SerializeToString(), guarded.tokens["eval"])
                    continue
                with pytest.raises(grpc.RpcError) as caught:
                    call(channel, "Forward", request.SerializeToString(), guarded.tokens["eval"])
                assert detail_of(caught.value).reason == "PERMISSION_DENIED"
        assert layer.version == 1


@pytest.mark.parametrize("token", ["wrong", "expired", None])
def test_connecting_without_a_good_token(guarded: Guarded, token: str | None) -> None:
    with pytest.raises(Unauthenticated) as caught:
        guarded.connect(token)
    if token is not None:
        assert guarded.tokens[token] not in str(caught.value)


def test_tokens_and_certificates_come_from_the_environment_and_travel_in_no_pickle(guarded: Guarded) -> None:
    code = (
        "import sys, pickle, sharednorm\n"
        "hub = sharednorm.connect(sys.argv[1])\n"
        "bn = hub.layer('bn')\n"
        "text = pickle.dumps(bn)\n"
        "import os; assert os.environ['SHAREDNORM_TOKEN'].encode() not in text\n"
        "assert os.environ['SHAREDNORM_TOKEN'] not in repr(hub) + repr(bn) + repr(vars(hub))\n"
        "print(pickle.loads(text).version)\n"
    )
    env = {**os.environ, "SHAREDNORM_TOKEN": guarded.tokens["train"], "SHAREDNORM_TLS_CA": guarded.ca}
    done = subprocess.run(
        [sys.executable, "-c", code, guarded.server.address],
        capture_output=True, text=True, env=env, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "0", "")
    listed = run(["ls", "--server", guarded.server.address], env=env)
    assert "bn " in listed.stdout
    told = run(["doctor", "--server", guarded.server.address, "--tls-ca", guarded.ca])
    assert (told.returncode, "asks for a token" in told.stdout) == (0, True)


def test_a_client_that_does_not_encrypt_and_one_that_does_not_believe(guarded: Guarded, tmp_path: Path) -> None:
    with pytest.raises(NOT_LET_IN):
        sharednorm.connect(guarded.server.address, token=guarded.tokens["all"], timeout=5)
    certificates.create(tmp_path, ["127.0.0.1"], 3)
    with pytest.raises(NOT_LET_IN):
        sharednorm.connect(guarded.server.address, token="x", tls=str(tmp_path / "ca.pem"), timeout=5)
    address = f"gpu-box.lan:{guarded.server.address.rpartition(':')[2]}"
    with pytest.raises(InvalidConfiguration, match=r"would travel unencrypted \(expected: tls=True") as caught:
        sharednorm.connect(address, token=guarded.tokens["all"])
    assert guarded.tokens["all"] not in str(caught.value)


@pytest.mark.parametrize("token", ["", "two words", "ümlaut", 7, "x" * 5000])
def test_what_is_no_token(token: object) -> None:
    with pytest.raises(InvalidConfiguration, match="the token is none") as caught:
        sharednorm.connect("localhost:1", token=token)  # type: ignore[arg-type]
    assert not isinstance(token, str) or not token or token not in str(caught.value)


@pytest.mark.parametrize("tls", [7, "/nowhere", sharednorm.TLS(cert="x")])
def test_what_is_no_encryption(tls: object) -> None:
    with pytest.raises(InvalidConfiguration):
        sharednorm.connect("localhost:1", tls=tls)  # type: ignore[arg-type]


# --- Certificates -----------------------------------------------------------------------------------


def test_clients_show_certificates_of_the_authority(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        certificates.create(tmp_path / name, ["127.0.0.1"], 3)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    options = (
        "--tls-cert", str(ours / "server.pem"), "--tls-key", str(ours / "server.key"),
        "--tls-client-ca", str(ours / "ca.pem"),
    )  # fmt: skip
    with server_process(*options) as server:
        ca = ours / "ca.pem"
        with sharednorm.connect(
            server.address, tls=sharednorm.TLS(ca, ours / "client.pem", ours / "client.key")
        ) as hub:
            assert hub.layers() == []
        for tls in (
            sharednorm.TLS(ca),
            sharednorm.TLS(ca, theirs / "client.pem", theirs / "client.key"),
            sharednorm.TLS(ca, ours / "server.pem", ours / "server.key"),  # not one of a client
        ):
            with pytest.raises(NOT_LET_IN):
                sharednorm.connect(server.address, tls=tls, timeout=5)


def test_an_expired_certificate_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Then(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
            return datetime.datetime.now(tz) - datetime.timedelta(days=5)

    certificates.create(tmp_path / "new", ["127.0.0.1"], 3)
    monkeypatch.setattr(certificates, "datetime", Then)
    certificates.create(tmp_path / "old", ["127.0.0.1"], 3)
    for name, fine in (("new", True), ("old", False)):
        files = tmp_path / name
        with server_process("--tls-cert", str(files / "server.pem"), "--tls-key", str(files / "server.key")) as server:
            if fine:
                sharednorm.connect(server.address, tls=str(files / "ca.pem")).close()
                continue
            with pytest.raises(NOT_LET_IN):
                sharednorm.connect(server.address, tls=str(files / "ca.pem"), timeout=5)


def test_certificates_that_change_are_shown_to_new_connections(tmp_path: Path) -> None:
    certificates.create(tmp_path / "a", ["127.0.0.1"], 3)
    certificates.create(tmp_path / "b", ["127.0.0.1"], 3)
    live = tmp_path / "live"
    live.mkdir()

    def put(name: str) -> None:
        for file in ("server.pem", "server.key"):
            (live / f"{file}.new").write_bytes((tmp_path / name / file).read_bytes())
            (live / f"{file}.new").replace(live / file)

    put("a")
    with ExitStack() as stack:
        options = "--tls-cert", str(live / "server.pem"), "--tls-key", str(live / "server.key")
        server = stack.enter_context(server_process(*options))
        hub = stack.enter_context(sharednorm.connect(server.address, tls=str(tmp_path / "a" / "ca.pem")))
        put("b")
        other = stack.enter_context(sharednorm.connect(server.address, tls=str(tmp_path / "b" / "ca.pem")))
        assert other.layers() == hub.layers() == []
        with pytest.raises(NOT_LET_IN):
            sharednorm.connect(server.address, tls=str(tmp_path / "a" / "ca.pem"), timeout=5)


# --- The command line -------------------------------------------------------------------------------


def test_token_create_and_certs_create(tmp_path: Path) -> None:
    done = run([
        "token", "create", "--file", str(tmp_path / "tokens"), "--name", "ana b", "--right", "admin",
        "--namespace", "exp-*", "--namespace", "default", "--expires", "90d",
    ])  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    name, right, where, until, digest = (tmp_path / "tokens").read_text().split()
    assert (name, right, where, len(digest)) == ("ana%20b", "admin", "exp-*,default", 64)
    assert 89 < (datetime.datetime.fromisoformat(until.replace("Z", "+00:00")).timestamp() - time.time()) / 86400 <= 90
    done = run(["certs", "create", "--directory", str(tmp_path / "certs"), "--host", "gpu-box", "--host", "::1"])
    files = [Path(line) for line in done.stdout.splitlines()]
    assert [path.name for path in files] == [
        "ca.pem", "ca.key", "server.pem", "server.key", "client.pem", "client.key",
    ]  # fmt: skip
    assert all(path.stat().st_mode & 0o077 == 0 for path in files if path.suffix == ".key")
    again = run(["certs", "create", "--directory", str(tmp_path / "certs"), "--host", "gpu-box"])
    assert (again.returncode, "is there already" in again.stderr) == (1, True)
    wrong = run(["token", "create", "--file", str(tmp_path / "no" / "tokens"), "--name", "x"])
    assert wrong.returncode == 1
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--listen", "0.0.0.0:0"], "nothing would be encrypted: pass --tls-cert"),
        (["--tls-cert", "x"], "tls-cert or tls-key is missing (expected: both, or none)"),
        (["--tls-client-ca", "x"], "expected: tls-cert and tls-key beside it"),
        (["--tls-cert", "/nowhere/x", "--tls-key", "/nowhere/y"], "the certificates cannot be read"),
        (["--tokens", "/nowhere/tokens"], "the tokens in /nowhere/tokens cannot be read"),
    ],
)
def test_a_server_that_cannot_be_guarded_does_not_start(options: list[str], said: str) -> None:
    done = run(["serve", "--listen", "127.0.0.1:0", "--state", "memory:", *options])
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_direct_connections_that_ask_for_nothing_are_not_there(guarded: Guarded) -> None:
    with guarded.connect("read") as hub:
        assert connection_of(hub).direct is None
