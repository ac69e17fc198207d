# The server that computes on the CPU: `make images`, or
#
#     docker build --file docker/cpu.Dockerfile --tag sharednorm:cpu .

# Any Linux with glibc and Python 3.10 or newer with its venv module.
ARG CPU_BASE=python:3.12-slim-bookworm

FROM ${CPU_BASE} AS build

# For packages that come from somewhere else than pip's default: --build-arg PIP_INDEX_URL=...
ARG PIP_INDEX_URL

WORKDIR /build
# pip stays behind in this stage; what is copied from it cannot install anything.
RUN python3 -m venv tools && python3 -m venv --without-pip /opt/sharednorm
COPY . source/
RUN tools/bin/pip --python /opt/sharednorm/bin/python install --no-cache-dir 'source/[server,redis,traces]'

# Without what the packages test themselves with, a twentieth of them. And what is in it, for those who have to know:
# CycloneDX.
RUN find /opt/sharednorm/lib -type d -name tests -prune -exec rm -r {} + \
    && tools/bin/pip install --no-cache-dir 'cyclonedx-bom>=7.5' \
    && tools/bin/cyclonedx-py environment --output-file /opt/sharednorm/sbom.cdx.json /opt/sharednorm/bin/python


FROM ${CPU_BASE} AS runtime

LABEL org.opencontainers.image.title="sharednorm" \
      org.opencontainers.image.description="Batch-normalization layers on a server, computed on the CPU" \
      org.opencontainers.image.licenses="Apache-2.0"

# The ids are fixed, so that a volume keeps its owner when the image is built anew.
RUN groupadd --gid 10001 sharednorm \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/sharednorm --shell /usr/sbin/nologin sharednorm \
    && install --directory --owner 10001 --group 10001 --mode 0750 /var/lib/sharednorm

COPY --from=build /opt/sharednorm /opt/sharednorm

# numba keeps what it has compiled beside the state: the first start compiles, later ones do not.
ENV PATH=/opt/sharednorm/bin:$PATH \
    HOME=/var/lib/sharednorm \
    STATE_DIRECTORY=/var/lib/sharednorm \
    NUMBA_CACHE_DIR=/var/lib/sharednorm/numba \
    MPLCONFIGDIR=/tmp/matplotlib

USER 10001:10001
WORKDIR /var/lib/sharednorm

# The build fails here, and not the first start, if something that the server imports is missing.
RUN ["/opt/sharednorm/bin/python", "-c", "import sharednorm_server.server, sharednorm_server.http.pages, sharednorm_server.store.redis.store, numba, ml_dtypes"]

# gRPC, the port that tensors travel by, and the page with the metrics.
EXPOSE 50051 50052 50080

# The first start compiles, which takes a minute on a small machine.
HEALTHCHECK --interval=15s --timeout=10s --start-period=120s --retries=3 \
    CMD ["sharednorm", "doctor", "--server", "127.0.0.1:50051"]

# The server is process 1 and gets SIGTERM itself. Plain text is right inside the container; who may reach the port is
# decided where it is published.
ENTRYPOINT ["sharednorm"]
CMD ["serve", "--listen", "0.0.0.0:50051", "--direct-port", "50052", "--http-listen", "0.0.0.0:50080", "--insecure", "--device", "cpu"]
