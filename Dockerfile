# betarank for machines that run containers (GKE with XPK, docs/tpu.md).
#
#   git archive HEAD | docker build --build-arg COMMIT=$(git rev-parse --short=12 HEAD) --tag IMAGE -
#
# From the archive, so that nothing gets in that isn't in git. --build-arg EXTRA=gpu for NVIDIA.
FROM python:3.12-slim
# pycosat, which reasoning-gym needs, comes as C source only; any compiler will do.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /betarank
COPY . .
ARG EXTRA=tpu
RUN pip install --no-cache-dir --constraint launch/constraints.txt --editable ".[${EXTRA}]"
# What a run writes down as its code version: there is no git in the image.
ARG COMMIT=unknown
RUN echo "$COMMIT" > .commit
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["betarank"]
CMD ["train", "--help"]
