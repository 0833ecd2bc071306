# An image of betarank for clusters that run containers (GKE, docs/tpu.md).
#
#   git archive HEAD | docker build --build-arg COMMIT=$(git rev-parse --short=12 HEAD) --tag IMAGE -
#
# Built from the archive, so that it holds only what is in git. For NVIDIA GPUs add --build-arg EXTRA=gpu. Every package
# is checked against its hash in launch/lock. To fix the base image too, add --build-arg PYTHON=python@sha256:DIGEST.
ARG PYTHON=python:3.12-slim
FROM ${PYTHON} AS packages
# reasoning-gym needs pycosat, which is published as C source only; any compiler will do. It stays out of the image.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY launch/lock /lock
ARG EXTRA=tpu
RUN python -m venv /venv && \
    /venv/bin/pip install --no-cache-dir --require-hashes --requirement /lock/build.txt && \
    /venv/bin/pip install --no-cache-dir --require-hashes --no-build-isolation --requirement "/lock/${EXTRA}.txt"

FROM ${PYTHON}
COPY --from=packages /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /betarank
COPY . .
# The code version that runs record; the image has no git to ask.
ARG COMMIT=unknown
RUN pip install --no-cache-dir --no-index --no-build-isolation --no-deps --editable . && echo "$COMMIT" > .commit
# Nothing runs as root, and no run can change the code. The number is for runAsNonRoot.
RUN useradd --create-home --uid 1000 betarank
USER 1000
WORKDIR /home/betarank
ENTRYPOINT ["betarank"]
CMD ["train", "--help"]
