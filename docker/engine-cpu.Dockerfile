# vLLM for CPUs with the plugin, and the demo's trained model in /models/demo. Built from the root:
#   docker build -f docker/engine-cpu.Dockerfile -t aot-engine-cpu .
# TORCH_INDEX names a package index with CPU builds of torch, much smaller than those of the default index.
FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="aot-engine-cpu" \
      org.opencontainers.image.description="vLLM with AOT video token reduction, for CPUs, with a model to try it" \
      org.opencontainers.image.licenses="Apache-2.0"
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 2000 --gid 0 --create-home --shell /usr/sbin/nologin vllm \
    && install -d -o 10001 -g 10001 /var/lib/aot/media
WORKDIR /opt/aot
COPY LICENSE README.md constraints.txt constraints-cpu.txt pyproject.toml ./
COPY aot_vllm aot_vllm/
COPY server server/
COPY demo/environment.py demo/
ARG TORCH_INDEX=""
RUN PIP_NO_CACHE_DIR=1 TORCH_INDEX="$TORCH_INDEX" python demo/environment.py
COPY demo/model /models/demo
COPY --chmod=0755 docker/serve.sh /usr/local/bin/serve
ENV PATH=/opt/aot/.venv/bin:$PATH \
    HOME=/home/vllm \
    HF_HUB_OFFLINE=1 \
    TORCHDYNAMO_DISABLE=1 \
    VLLM_NO_USAGE_STATS=1 \
    VLLM_PLUGINS=aot
WORKDIR /home/vllm
USER 2000:0
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["serve"]
