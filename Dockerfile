# Drawbridge in a container: the locked environment, the product, and a user who may write nowhere but in the
# state volume. Runs with a read-only root file system:
#   docker run --read-only --tmpfs /tmp --volume drawbridge:/var/lib/drawbridge … drawbridge web
# Give it time to stop (--stop-timeout 75): a refresh that has begun is finished first, and a lease lasts 45 s.

FROM python:3.11-slim-bookworm AS environment

ENV UV_PYTHON_DOWNLOADS=never \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_PROJECT_ENVIRONMENT=/opt/drawbridge/.venv
# The version the launcher pins; a test holds the two together.
RUN pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore uv==0.13.9
WORKDIR /opt/drawbridge
COPY pyproject.toml uv.lock ./
RUN uv sync --locked --no-dev --no-cache


FROM python:3.11-slim-bookworm

# A fixed number, so that an orchestrator can check it is not root and a volume can be given to it.
RUN groupadd --system --gid 10001 drawbridge \
    && useradd --system --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin drawbridge \
    && install --directory --owner=drawbridge --group=drawbridge --mode=0700 /var/lib/drawbridge

WORKDIR /opt/drawbridge
COPY --from=environment /opt/drawbridge/.venv .venv
COPY pyproject.toml wsgi.py ./
COPY config config
COPY app app
# Byte code is written here once: the running container cannot. The default database, ./var/drawbridge.db, lies in
# the volume by a link and not by a setting, so that DRAWBRIDGE_DATABASE_URL_FILE is never contradicted.
RUN python -m compileall -q app wsgi.py && ln -s /var/lib/drawbridge var

ENV PATH=/opt/drawbridge/.venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    DRAWBRIDGE_ENVIRONMENT=production \
    DRAWBRIDGE_STATE_DIR=/var/lib/drawbridge \
    DRAWBRIDGE_BIND=0.0.0.0:8080

USER 10001:10001
VOLUME ["/var/lib/drawbridge"]
EXPOSE 8080
STOPSIGNAL SIGTERM

# Meant for `web`; a worker has no port, so run it with --no-healthcheck or its own check (config/compose.yaml).
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:8080/livez', timeout=2)"]

ENTRYPOINT ["python", "-m", "app"]
CMD ["web"]
