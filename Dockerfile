# docker build .                             serves the models that are mounted at /models, on the CPU
# docker build --build-arg VARIANT=cuda .    the same on NVIDIA GPUs; run it with --gpus all
# docker build --target demo .               has the demo models in it

# The builder and the image must have the same one: the virtual environment refers to its Python.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS builder
# cuda: the wheels of torch bring CUDA with them; the driver comes from the NVIDIA container toolkit.
ARG VARIANT=cpu
RUN python3 -m venv /venv
ENV PATH=/venv/bin:$PATH
WORKDIR /src
# The dependencies without our sources, so that a change of ours does not download torch again.
COPY pyproject.toml README.md constraints-cpu.txt ./
# hadolint ignore=DL3013  # pyproject.toml bounds the versions
RUN case "$VARIANT" in \
      cpu) pip install --no-cache-dir -c constraints-cpu.txt \
             --extra-index-url https://download.pytorch.org/whl/cpu '.[torch]' ;; \
      cuda) pip install --no-cache-dir '.[torch]' ;; \
      *) echo "VARIANT must be cpu or cuda, not $VARIANT" >&2; exit 1 ;; \
    esac
COPY . .
RUN pip install --no-cache-dir --no-deps --force-reinstall .

FROM builder AS demo-models
# hadolint ignore=DL3013  # as above
RUN pip install --no-cache-dir '.[torch,demo]' && migserve demo-models --out /models

FROM ${PYTHON_IMAGE} AS runtime
# By number, so that Kubernetes can see that it is not root. With a name, since torch asks for one.
RUN useradd --uid 10001 --user-group --no-log-init --create-home migserve && mkdir /models \
    && install -d -o 10001 -g 10001 /state
COPY --from=builder /venv /venv
ENV PATH=/venv/bin:$PATH \
    MIGSERVE_MODEL_REPOSITORY=/models \
    MIGSERVE_HTTP_ADDRESS=0.0.0.0 \
    MIGSERVE_GRPC_ADDRESS=0.0.0.0 \
    MIGSERVE_METRICS_ADDRESS=0.0.0.0 \
    MIGSERVE_LOG_FORMAT=json \
    MIGSERVE_STATE_DIR=/state \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
USER 10001:10001
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
# Alive, not ready: an unhealthy container is replaced, and a model that cannot be loaded is no reason for that.
# No proxy: Docker may have put one into the environment.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "-c", "import os; from urllib.request import *; \
    build_opener(ProxyHandler({})).open(f\"http://127.0.0.1:{os.environ.get('MIGSERVE_HTTP_PORT', 8000)}/v2/health/live\", timeout=3)"]
ENTRYPOINT ["migserve"]
CMD ["serve"]

FROM runtime AS demo
COPY --from=demo-models /models /models

# What is built where no --target is named.
FROM runtime
