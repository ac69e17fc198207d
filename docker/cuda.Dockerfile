# The server that computes on an NVIDIA GPU: `make images`, or
#
#     docker build --file docker/cuda.Dockerfile --tag sharednorm:cuda .
#
# Neither building nor the check of it needs a GPU or a driver. To run, the host needs NVIDIA's driver and its container
# toolkit, which puts the driver's libcuda into the container.

# CUDA's compiler and headers, 13.0 or newer.
ARG CUDA_TOOLKIT=nvidia/cuda:13.0.2-devel-ubuntu24.04
# The same distribution as the toolkit's, and so the same Python, glibc and libstdc++. Nothing of CUDA is needed in it.
ARG CUDA_BASE=ubuntu:24.04

FROM ${CUDA_TOOLKIT} AS build

ARG PIP_INDEX_URL

# Without versions: the archives of Debian and Ubuntu keep only the newest, and the base image pins the release.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /build
# pip stays behind in this stage; what is copied from it cannot install anything.
RUN python3 -m venv tools && python3 -m venv --without-pip /opt/sharednorm

# PyCUDA first: it takes longest and changes least. What is built against one NumPy 2 runs with any other.
COPY tests/emulation/pycuda_wheel.py .
RUN tools/bin/pip install --no-cache-dir 'numpy>=1.26' \
    && mkdir wheels \
    && cp "$(XDG_CACHE_HOME=/build/cache tools/bin/python pycuda_wheel.py --print)" wheels/

# The kernels next. The wheel that is made after them has them in it.
COPY kernels source/kernels/
RUN PYTHONPATH=source/kernels python3 -m sharednorm_kernels.build

COPY . source/
RUN tools/bin/pip wheel --no-cache-dir --no-deps --wheel-dir wheels ./source

# One wheel of each, by its file: pip would prefer a newer PyCUDA of the index, which is source. A step of its own, since
# it downloads what the one before does not need.
# hadolint ignore=DL3059
RUN for wheel in wheels/sharednorm-*.whl; do \
        tools/bin/pip --python /opt/sharednorm/bin/python install --no-cache-dir wheels/pycuda-*.whl "${wheel}[cuda,redis,traces]"; \
    done

# Without what the packages test themselves with, a twentieth of them. And what is in it, for those who have to know:
# CycloneDX.
RUN find /opt/sharednorm/lib -type d -name tests -prune -exec rm -r {} + \
    && tools/bin/pip install --no-cache-dir 'cyclonedx-bom>=7.5' \
    && tools/bin/cyclonedx-py environment --output-file /opt/sharednorm/sbom.cdx.json /opt/sharednorm/bin/python


FROM ${CUDA_BASE} AS runtime

LABEL org.opencontainers.image.title="sharednorm" \
      org.opencontainers.image.description="Batch-normalization layers on a server, computed on an NVIDIA GPU" \
      org.opencontainers.image.licenses="Apache-2.0"

# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends libstdc++6 python3 \
    && rm -rf /var/lib/apt/lists/*

# The ids are fixed, so that a volume keeps its owner when the image is built anew.
RUN groupadd --gid 10001 sharednorm \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/sharednorm --shell /usr/sbin/nologin sharednorm \
    && install --directory --owner 10001 --group 10001 --mode 0750 /var/lib/sharednorm

COPY --from=build /opt/sharednorm /opt/sharednorm

# The container toolkit reads the NVIDIA_ variables: which GPUs unless compose says so, which of the driver's parts,
# and the oldest driver that loads what nvcc 13 has compiled. A driver that is older is refused at the start.
ENV PATH=/opt/sharednorm/bin:$PATH \
    HOME=/var/lib/sharednorm \
    STATE_DIRECTORY=/var/lib/sharednorm \
    NUMBA_CACHE_DIR=/var/lib/sharednorm/numba \
    MPLCONFIGDIR=/tmp/matplotlib \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_REQUIRE_CUDA=cuda>=13.0

USER 10001:10001
WORKDIR /var/lib/sharednorm

# The build fails here, and not the first start, if this stage's Python is not the one that everything was built for.
# PyCUDA itself can be imported only where the driver is.
RUN ["/opt/sharednorm/bin/python", "-c", "import sharednorm_server.server, sharednorm_server.http.pages, sharednorm_server.store.redis.store, sharednorm_kernels.files as f, importlib.util as u; f.fatbin(); assert u.find_spec('pycuda._driver')"]

# gRPC, the port that tensors travel by, and the page with the metrics.
EXPOSE 50051 50052 50080

HEALTHCHECK --interval=15s --timeout=10s --start-period=120s --retries=3 \
    CMD ["sharednorm", "doctor", "--server", "127.0.0.1:50051"]

# The server is process 1 and gets SIGTERM itself. Plain text is right inside the container; who may reach the port is
# decided where it is published.
ENTRYPOINT ["sharednorm"]
CMD ["serve", "--listen", "0.0.0.0:50051", "--direct-port", "50052", "--http-listen", "0.0.0.0:50080", "--insecure", "--device", "cuda"]
