"""What gunicorn serves: `gunicorn --config config/gunicorn.conf.py wsgi:application`.

Each worker imports this after its fork and makes services of its own, so that no connection, lock or thread is inherited.
"""

import os
from pathlib import Path
from typing import Final

from app.bootstrap import Services, bootstrap
from app.settings import load
from app.telemetry import configure
from app.web.application import create_app

_FILE: Final = Path(__file__).parent / "config" / "settings.toml"

settings: Final = load(os.environ, config_file=_FILE if _FILE.exists() else None)
configure(settings.log_level)
services: Final[Services] = bootstrap(settings, kind="web")
services.start()
application: Final = create_app(services)
