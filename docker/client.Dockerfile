# A worker without a GPU: the client library, numba for what it computes itself, and a program that trains a layer on a
# server. `make images`, or
#
#     docker build --file docker/client.Dockerfile --tag sharednorm:client .
#
# Put your own program on top: FROM sharednorm:client, COPY it, and set ENTRYPOINT.

# Any Linux with glibc and Python 3.10 or newer with its venv module.
ARG CPU_BASE=python:3.12-slim-bookworm

FROM ${CPU_BASE} AS build

# For packages that come from somewhere else than pip's default: --build-arg PIP_INDEX_URL=...
ARG PIP_INDEX_URL

WORKDIR /build
# pip stays behind in this stage; what is copied from it cannot install anything.
RUN python3 -m venv tools && python3 -m venv --without-pip /opt/sharednorm
COPY . source/
RUN tools/bin/pip --python /opt/sharednorm/bin/python install --no-cache-dir 'source/[fast,bfloat16]'

# Without what the packages test themselves with, a twentieth of them. And what is in it, for those who have to know:
# CycloneDX.
RUN find /opt/sharednorm/lib -type d -name tests -prune -exec rm -r {} + \
    && tools/bin/pip install --no-cache-dir 'cyclonedx-bom>=7.5' \
    && tools/bin/cyclonedx-py environment --output-file /opt/sharednorm/sbom.cdx.json /opt/sharednorm/bin/python


FROM ${CPU_BASE} AS runtime

LABEL org.opencontainers.image.title="sharednorm client" \
      org.opencontainers.image.description="A worker that uses batch-normalization layers of a server" \
      org.opencontainers.image.licenses="Apache-2.0"

RUN groupadd --gid 10001 sharednorm \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin sharednorm

COPY --from=build /opt/sharednorm /opt/sharednorm
COPY examples/remote.py /opt/sharednorm/worker.py

ENV PATH=/opt/sharednorm/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NUMBA_CACHE_DIR=/tmp/numba

USER 10001:10001
WORKDIR /tmp

RUN ["/opt/sharednorm/bin/python", "-c", "import sharednorm, numba, ml_dtypes"]

# It serves nobody: whether it is well, its exit code says.
HEALTHCHECK NONE

# The address of the server, and how many steps.
ENTRYPOINT ["python", "/opt/sharednorm/worker.py"]
CMD ["server:50051", "20"]
