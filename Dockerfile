# An image of betarank for clusters that run containers (GKE, docs/tpu.md).
#
#   git archive HEAD | docker build --build-arg COMMIT=$(git rev-parse --short=12 HEAD) --tag IMAGE -
#
# Built from the archive, so that it holds only what is in git. For NVIDIA GPUs add --build-arg EXTRA=gpu.
FROM python:3.12-slim
# reasoning-gym needs pycosat, which is published as C source only; any compiler will do.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /betarank
COPY . .
ARG EXTRA=tpu
RUN pip install --no-cache-dir --constraint launch/constraints.txt --editable ".[${EXTRA}]"
# The code version that runs record; the image has no git to ask.
ARG COMMIT=unknown
RUN echo "$COMMIT" > .commit
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["betarank"]
CMD ["train", "--help"]
