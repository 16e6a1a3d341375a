# vLLM for GPUs with the plugin. Built from the repository's root:
#   docker build -f docker/engine.Dockerfile -t aot-engine .
# Arguments are those of `vllm serve`; see docker/serve.sh for the API key.
FROM python:3.11-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt setuptools && mkdir /wheels && grep '^av==' constraints.txt > /wheels/av.txt
COPY LICENSE README.md pyproject.toml ./
COPY aot_vllm aot_vllm/
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM vllm/vllm-openai:v0.32.0
LABEL org.opencontainers.image.title="aot-engine" \
      org.opencontainers.image.description="vLLM with AOT video token reduction, for NVIDIA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0"
# Everything else that the plugin needs comes with vLLM, at the versions that vLLM wants.
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    uv pip install --system --no-cache --no-deps -r /wheels/av.txt /wheels/*.whl \
    && python3 -c "import importlib.metadata as m; assert m.version('vllm').split('+')[0] == '0.32.0'; import av, aot_vllm"
# Where volumes are mounted: the user that the base image brings along owns the caches, the gateway's user the media.
RUN install -d -o 2000 -g 0 -m 0775 /home/vllm /home/vllm/.cache /home/vllm/.cache/huggingface /home/vllm/.cache/vllm \
    && install -d -o 10001 -g 10001 /var/lib/aot/media
COPY --chmod=0755 docker/serve.sh /usr/local/bin/serve
ENV HOME=/home/vllm \
    HF_HUB_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1 \
    VLLM_PLUGINS=aot
USER 2000:0
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python3", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["serve"]
