"""Build the images for real and use what is in them, without a Docker engine: `python -m docker.image_check`.

`make image-check` runs this, as root on Debian. podman builds the Dockerfiles and buildah runs what came out, both in a
chroot; the base is a minimal Debian made by debootstrap. A client outside uses the server inside. The server for GPUs
is built with this machine's CUDA toolkit, and run twice: without a driver, where it has to say so, and with the
emulated driver of the tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import sharednorm
from tests.support.kernels import cuda
from tests.support.processes.redis import redis_server

ROOT = Path(__file__).parents[1]
BASE = "localhost/sharednorm-check-base"
SUITE, PACKAGES = "bookworm", ("python3", "python3-venv", "ca-certificates")
NEEDED = {"podman": "podman", "buildah": "buildah", "debootstrap": "debootstrap", "redis-server": "redis-server"}
USER = 10001
TOOLKIT = Path("/usr/local/cuda")
CERTIFICATES = Path("/etc/ssl/certs")

_BUILD_SECONDS, _START_SECONDS, _STOP_SECONDS = 900.0, 120.0, 30.0


class CheckFailed(Exception):
    """An image is not what it should be, or this machine cannot build it; the message says why."""


def main() -> int:
    """Check all images; return 0, or 1 with the reason on stderr."""
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"=== {text} ({time.monotonic() - began:.0f} s)", flush=True)

    try:
        _require_tools()
        say("a minimal Debian")
        _make_base()
        say("the image of the CPU server")
        cpu = _build("cpu", f"CPU_BASE={BASE}")
        _check_image(cpu)
        with tempfile.TemporaryDirectory() as state, tempfile.TemporaryDirectory() as shared:
            os.chown(state, USER, USER)
            volumes = [f"{state}:/var/lib/sharednorm"]
            with _served(cpu, volumes=volumes) as address:
                say(f"a client uses the CPU server, {address}")
                for transport in ("direct", "grpc"):
                    _use(address, transport)
                _check_health(cpu, address)
                say("the demo uses it")
                _run([sys.executable, "-m", "examples.demo", "--server", address])
                _leave(address)
                say("workers in their containers share a layer of it")
                worker = _build("client", f"CPU_BASE={BASE}")
                with _container(worker) as container:
                    _check_bill(container)
                _check_workers(worker, address)
            with _served(cpu, volumes=volumes, socket_directory=Path(shared)) as address:
                say(f"a client shares memory with the CPU server, and nothing else but a directory, {address}")
                _use(address, "shm")
                _find(address)
        _check_scale(cpu, worker, say)
        say("the image of the CUDA server: kernels by nvcc, PyCUDA, the server")
        toolkit = f"{TOOLKIT.resolve()}:{TOOLKIT}:ro"
        gpu = _build("cuda", f"CUDA_TOOLKIT={BASE}", f"CUDA_BASE={BASE}", volumes=[toolkit])
        _check_image(gpu)
        _check_refusal(gpu)
        with tempfile.TemporaryDirectory() as scratch:
            environment, volume = _emulated(Path(scratch))
            with _served(gpu, ["--device", "cuda"], environment, [volume]) as address:
                say(f"a client uses the CUDA server over the emulated driver, {address}")
                _use(address, "direct")
                _check_health(gpu, address)
        say("all images are right: " + ", ".join(f"{image} {_size(image)}" for image in (cpu, gpu, worker)))
    except CheckFailed as error:
        print(f"image check: {error}", file=sys.stderr)
        return 1
    return 0


def _require_tools() -> None:
    missing = [package for tool, package in NEEDED.items() if shutil.which(tool) is None]
    if missing:
        raise CheckFailed(f"{' and '.join(missing)} not found: apt-get install {' '.join(missing)}")
    if os.geteuid() != 0:
        raise CheckFailed("debootstrap and a chroot need root")
    if not (TOOLKIT / "bin" / "nvcc").exists():
        raise CheckFailed(f"there is no CUDA toolkit in {TOOLKIT}, which the image of the CUDA server is built with")


def _make_base() -> None:
    if subprocess.run(["podman", "image", "exists", BASE], check=False).returncode == 0:
        return
    with tempfile.TemporaryDirectory(prefix="sharednorm-base-") as directory:
        _run(["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, directory])
        archive = subprocess.Popen(["tar", "-C", directory, "-c", "."], stdout=subprocess.PIPE)
        try:
            imported = subprocess.run(
                ["podman", "import", "-", BASE], stdin=archive.stdout, capture_output=True, check=False
            )
        finally:
            if archive.stdout is not None:
                archive.stdout.close()
            archive.wait(60)
        if imported.returncode:
            raise CheckFailed(f"podman import failed:\n{imported.stderr.decode()}")


def _build(name: str, *arguments: str, volumes: Sequence[str] = ()) -> str:
    image = f"localhost/sharednorm-check:{name}"
    command = ["podman", "build", "--isolation", "chroot", "--ulimit", "nofile=1024:1024", "--network", "host",
               "--format", "docker", "--tag", image, "--file", f"docker/{name}.Dockerfile"]  # fmt: skip
    for argument in arguments:
        command += ["--build-arg", argument]
    for volume in [f"{CERTIFICATES}:{CERTIFICATES}:ro", *volumes]:
        command += ["--volume", volume]
    _run([*command, "."])
    return image


# --- What is in an image ---------------------------------------------------------------------------------


def _check_image(image: str) -> None:
    config = _config(image)
    if config["User"] != f"{USER}:{USER}":
        raise CheckFailed(f"{image} runs as {config['User']!r} (expected: {USER}:{USER})")
    with _container(image) as container:
        owner = _output(_inside(container, ["stat", "--format", "%u %g %a", "/var/lib/sharednorm"]))
        if owner != f"{USER} {USER} 750":
            raise CheckFailed(f"the state's directory of {image} is {owner!r} (expected: {USER} {USER} 750)")
        who = _output(_inside(container, ["id", "-u"]))
        if who != str(USER):
            raise CheckFailed(f"{image} runs as user {who}")
        _check_bill(container)


def _check_bill(container: str) -> None:
    """See that the bill of materials has what is installed, and nothing else."""
    told = json.loads(_output(_inside(container, ["cat", "/opt/sharednorm/sbom.cdx.json"])))
    listed = {(part["name"].lower().replace("-", "_"), part["version"]) for part in told["components"]}
    script = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()))"
    words = _output(_inside(container, ["/opt/sharednorm/bin/python", "-I", "-c", script])).split()
    pairs = (word.split("==") for word in words)
    installed = {(name.lower().replace("-", "_"), version) for name, version in pairs}
    if told["bomFormat"] != "CycloneDX" or listed != installed:
        raise CheckFailed(f"the bill of materials and what is installed differ in {sorted(listed ^ installed)}")


def _check_workers(image: str, address: str) -> None:
    """Have two containers train the layer of their example at once, and see that they have trained one."""
    config = _config(image)
    if config["User"] != f"{USER}:{USER}":
        raise CheckFailed(f"{image} runs as {config['User']!r} (expected: {USER}:{USER})")
    with _container(image) as one, _container(image) as other:
        words = [*config["Entrypoint"], address, "5"]
        running = [
            subprocess.Popen(_inside(each, words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for each in (one, other)
        ]
        for each in running:
            said, _ = each.communicate(timeout=_START_SECONDS)
            if each.returncode or said.count("steps of all") != 5:
                raise CheckFailed(f"a worker of {image} ended with {each.returncode}: {said}")
    with sharednorm.connect(address) as hub:
        version = hub.layer("example/bn").version
    if version != 10:
        raise CheckFailed(f"two workers of 5 steps each have taken {version} (expected: 10)")


def _check_scale(image: str, worker: str, say: Callable[[str], None]) -> None:
    """Have two servers in their containers share layers through Redis, and clients of both in theirs."""
    with tempfile.TemporaryDirectory() as directory, redis_server(Path(directory) / "redis") as redis:
        state = ["--state", f"redis://{redis.address}"]
        with _served(image, state) as one, _served(image, state) as two:
            say(f"two servers share their layers through Redis, {one} and {two}")
            both = f"{one},{two}"
            _use(both, "auto")
            _leave(one)
            _find(two)
            _check_workers(worker, both)
            with sharednorm.connect(one) as hub, sharednorm.connect(two) as other:
                versions = {each.layer("example/bn").version for each in (hub, other)}
            if versions != {10}:
                raise CheckFailed(f"two servers have the layer of the workers at {versions} (expected: 10 at both)")


def _check_page(address: str) -> None:
    """See that the page and the metrics are there."""
    for path, words in (("/", b"Layers of default"), ("/metrics", b"sharednorm_steps_total"), ("/readyz", b"ok")):
        with urllib.request.urlopen(f"http://{address}{path}", timeout=_START_SECONDS) as answer:
            if words not in answer.read():
                raise CheckFailed(f"http://{address}{path} does not say {words!r}")


def _size(image: str) -> str:
    (found,) = json.loads(_output(["podman", "image", "inspect", image]))
    return f"{found['Size'] / 1e6:.0f} MB"


def _check_refusal(image: str) -> None:
    with _container(image) as container:
        command = _inside(container, ["sharednorm", "serve", "--listen", "127.0.0.1:0", "--device", "cuda"])
        done = subprocess.run(command, capture_output=True, text=True, timeout=_START_SECONDS, check=False)
        if done.returncode == 0 or "needs NVIDIA's driver: libcuda.so.1" not in done.stderr:
            raise CheckFailed(f"without a driver, {image} says: {done.returncode} {done.stdout}{done.stderr}")


def _check_health(image: str, address: str) -> None:
    test = _config(image)["Healthcheck"]["Test"]
    if test[0] != "CMD":
        raise CheckFailed(f"the health check of {image} is {test} (expected: a command without a shell)")
    with _container(image) as container:
        _output(_inside(container, [address if word == "127.0.0.1:50051" else word for word in test[1:]]))


def _use(address: str, transport: str) -> None:
    """Train a layer through a client on this side, and compare with float64 NumPy."""
    x = np.random.default_rng(0).normal(3.0, 2.0, (32, 64, 28, 28)).astype(np.float32)
    wide = x.astype(np.float64)
    mean = wide.mean((0, 2, 3), keepdims=True)
    expected = (wide - mean) / np.sqrt(wide.var((0, 2, 3), keepdims=True) + 1e-5)
    with sharednorm.connect(address, transport=transport) as hub:
        bn = hub.BatchNorm2D(64, name="image-check/bn", sscale=0.0)
        worst = float(np.abs(bn(x) - expected).max())
        off = float(np.abs(bn.mean - mean).max())
        hub.delete("image-check/bn")
    if worst > 1e-5 or off > 1e-5:
        raise CheckFailed(f"the server at {address} is off by {worst:g} in the output and {off:g} in the mean")


def _leave(address: str) -> None:
    """Train a layer, and leave it on the server."""
    with sharednorm.connect(address) as hub:
        hub.BatchNorm(3, name="image-check/kept")(np.arange(12, dtype=np.float32).reshape(4, 3))


def _find(address: str) -> None:
    """See that another server on the same volume has that layer."""
    with sharednorm.connect(address) as hub:
        kept = hub.layer("image-check/kept").snapshot()
    if kept.version != 1 or kept.mean.tolist() != [4.5, 5.5, 6.5]:
        raise CheckFailed(f"the layer that was left on the server is at version {kept.version}, with mean {kept.mean}")


# --- Running ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _served(
    image: str,
    options: Sequence[str] = (),
    environment: Sequence[str] = (),
    volumes: Sequence[str] = (),
    socket_directory: Path | None = None,
) -> Iterator[str]:
    """Run the image's server, stop it as an engine does, and see that it ends well; give its address from outside.

    It listens on a free port of the loopback, or on a socket in a directory that it is given.
    """
    if socket_directory is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = outside = f"127.0.0.1:{free.getsockname()[1]}"
    else:
        os.chown(socket_directory, USER, USER)
        address, outside = "unix:/shared/server.sock", f"unix:{socket_directory}/server.sock"
        volumes = [*volumes, f"{socket_directory}:/shared"]
    with _container(image) as container, tempfile.TemporaryFile("w+") as log:
        words = [*_config(image)["Entrypoint"], "serve", "--listen", address, "--http-listen", "127.0.0.1:0", *options]
        command = _inside(container, words, environment, volumes)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            line = _first_line(process)
            if f"listening on {address}" not in line:
                log.seek(0)
                raise CheckFailed(f"the server of {image} did not start: {line}{log.read()}")
            yield outside
            _check_page(line.rpartition(", http ")[2].strip())
            os.kill(_server_of(process.pid), signal.SIGTERM)
            code = process.wait(_STOP_SECONDS)
            if code:
                log.seek(0)
                raise CheckFailed(f"the server of {image} ended with {code}: {log.read()}")
        finally:
            if process.poll() is None:
                with contextlib.suppress(CheckFailed, ProcessLookupError):
                    os.kill(_server_of(process.pid), signal.SIGKILL)
                process.kill()
            process.wait(_STOP_SECONDS)
            if process.stdout is not None:
                process.stdout.close()


def _emulated(scratch: Path) -> tuple[list[str], str]:
    """Return environment and volume that give a container the emulated driver, and the kernels for it."""
    outside = cuda.environment()
    shutil.copy(Path(outside["LD_LIBRARY_PATH"].partition(":")[0]) / "libcuda.so.1", scratch)
    shutil.copy(outside["SHAREDNORM_FATBIN"], scratch / "image.so")
    scratch.chmod(0o755)
    environment = [
        "LD_LIBRARY_PATH=/emulated",
        "SHAREDNORM_FATBIN=/emulated/image.so",
        "SHAREDNORM_EMULATED_LEAKS=fail",
    ]
    return environment, f"{scratch}:/emulated:ro"


def _first_line(process: subprocess.Popen[str]) -> str:
    if process.stdout is None:
        raise CheckFailed("the server's output is not there")
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline() if selector.select(_START_SECONDS) else ""


def _server_of(pid: int) -> int:
    """Return the process below another that is the server itself: the lowest whose command line says so."""
    below = [pid]
    for parent in below:
        for task in Path(f"/proc/{parent}/task").iterdir():
            below += [int(child) for child in (task / "children").read_text().split()]
    servers = [each for each in below if b"/bin/sharednorm\0serve\0" in Path(f"/proc/{each}/cmdline").read_bytes()]
    if not servers:
        raise CheckFailed(f"there is no server below process {pid}")
    return servers[-1]


@contextlib.contextmanager
def _container(image: str) -> Iterator[str]:
    name = _output(["buildah", "from", "--pull-never", image])
    try:
        yield name
    finally:
        _run(["buildah", "rm", name])


def _inside(
    container: str, words: Sequence[str], environment: Sequence[str] = (), volumes: Sequence[str] = ()
) -> list[str]:
    command = ["buildah", "run", "--isolation", "chroot", "--network", "host"]
    for each in environment:
        command += ["--env", each]
    for each in volumes:
        command += ["--volume", each]
    return [*command, container, "--", *words]


def _config(image: str) -> dict[str, Any]:
    (found,) = json.loads(_output(["podman", "image", "inspect", image]))
    config: dict[str, Any] = found["Config"] | {"Healthcheck": found.get("HealthCheck") or found.get("Healthcheck")}
    return config


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_START_SECONDS, check=False)
    if done.returncode:
        raise CheckFailed(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_BUILD_SECONDS, check=False
    )
    if done.returncode:
        raise CheckFailed(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout.decode()[-6000:]}")


if __name__ == "__main__":
    sys.exit(main())
