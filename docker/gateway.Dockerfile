# The gateway: no torch, no vLLM, no compiler, no pip. Built from the repository's root:
#   docker build -f docker/gateway.Dockerfile -t aot-gateway .
# It listens on 8080 and needs AOT_GATEWAY_CONFIG, a file with API keys. Its root file system may be read-only.
FROM python:3.11-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt setuptools && python -m venv --without-pip /opt/gateway
COPY LICENSE README.md pyproject.toml ./
COPY server server/
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
    && wheel="$(echo /wheels/*.whl)" \
    && pip --python /opt/gateway/bin/python install --no-cache-dir -c constraints.txt "${wheel}[gateway,redis,otel]"

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="aot-gateway" \
      org.opencontainers.image.description="OpenAI-compatible gateway that takes video and reports the tokens saved" \
      org.opencontainers.image.licenses="Apache-2.0"
# The directories' owner becomes that of the volumes mounted there.
RUN groupadd --gid 10001 gateway \
    && useradd --uid 10001 --gid gateway --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin gateway \
    && install -d -o gateway -g gateway /var/lib/aot/media /var/lib/aot/files
COPY --from=build /opt/gateway /opt/gateway
ENV PATH=/opt/gateway/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    AOT_GATEWAY_HOST=0.0.0.0 \
    AOT_GATEWAY_PORT=8080
WORKDIR /var/lib/aot
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
# Not urllib: it would ask a proxy of the environment.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import http.client as h, os; c = h.HTTPConnection('127.0.0.1', int(os.environ['AOT_GATEWAY_PORT']), timeout=4); c.request('GET', '/health/live'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "server"]
