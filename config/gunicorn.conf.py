"""How gunicorn serves Drawbridge; what an operator may change comes from the settings."""

import os
from pathlib import Path
from typing import Any

from app.settings import load

_file = Path(__file__).parent / "settings.toml"
_settings = load(os.environ, config_file=_file if _file.exists() else None)

wsgi_app = "wsgi:application"
chdir = str(Path(__file__).resolve().parent.parent)

# METRICS_BIND is a second address of the same workers; the application tells them apart.
bind = [_settings.bind, *([_settings.metrics_bind] if _settings.metrics_bind else [])]

# gunicorn's gthread; hand-outs that are asked for at the same moment share one thread and one wait for the disk.
worker_class = "app.web.express_worker.ExpressWorker"
workers = _settings.web_workers
threads = _settings.web_threads
# Every worker makes its services after its fork; preloading would hand database connections and threads down.
preload_app = False

# A refresh that has begun is finished first: cut off in the middle it can cost the connection. Its lease bounds it, and ten
# seconds store it. The last ten of these are not for requests (WINDING_UP_SECONDS): whoever still waits then is left, so
# that the process ends in good order and is not killed.
graceful_timeout = int(_settings.lease_seconds) + 20
# gthread beats while its threads work, so this finds a worker that hangs as a whole, not a slow request.
timeout = 60
# Longer than the 60 s most proxies keep an idle connection, so that they close it first and never write into a closed one.
keepalive = 75
# For each process, and never more than half of what its limit of open files (the hard one of `ulimit -n`) leaves.
worker_connections = max(1000, 4 * _settings.web_threads)

# The longest honest line is a provider's way back, with code and state; the longest field our own bearer token.
limit_request_line = 8190
limit_request_fields = 64
limit_request_field_size = 8190

# Nobody's forwarded headers are believed here. With TRUSTED_PROXIES the application reads the client's address itself, and
# scheme and host always come from PUBLIC_URL.
forwarded_allow_ips = ""
forwarder_headers = ""
header_map = "drop"

# The program's own log says what happened, scrubbed; a line per request would hold login links and states.
accesslog = None
errorlog = "-"
loglevel = "warning"

# The heartbeat file must not wait for a disk.
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - memory, and gunicorn unlinks it
control_socket_disable = True
proc_name = "drawbridge"


def worker_exit(server: Any, worker: Any) -> None:
    """Close the services when the worker has served its last request: running refreshes are waited for."""
    import sys

    loaded = sys.modules.get("wsgi")
    if loaded is not None and hasattr(loaded, "services"):
        loaded.services.close()
