# An image with mirage_dist installed from this source. docs/containers.md says how to run it.
#   docker build --tag mirage --build-arg COMMIT="$(git rev-parse HEAD)" .
# For a machine without a GPU, PyTorch's index of CPU builds makes it smaller:
#   docker build --tag mirage --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu .
# BASE may be the same image by its digest (python@sha256:…).
ARG BASE=python:3.11.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE .env.example ./
COPY mirage_dist mirage_dist/
COPY configs configs/
COPY launch launch/
COPY slurm slurm/
COPY docs docs/
ARG COMMIT=
RUN printf '%s\n' "$COMMIT" >commit.txt \
 && pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM ${BASE}
# Triton compiles its launchers with a C compiler when a kernel first runs. Debian keeps one version of a package at a time.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /wheel /wheel
ARG PIP_EXTRA_INDEX_URL=
RUN pip install --no-cache-dir /wheel/*.whl
RUN useradd --create-home --uid 1000 mirage && install --directory --owner=mirage /work
USER 1000
WORKDIR /work
# Nothing is kept in the image: models, data and compiled kernels are in what is mounted, or gone with the container.
ENTRYPOINT ["mirage"]
CMD ["--help"]
