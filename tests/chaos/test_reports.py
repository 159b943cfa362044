"""Reports of a refused token that meet a forced refresh which has not begun yet."""

import threading
from pathlib import Path

from tests.installation import add_caller, connect, installation


def test_a_report_waits_for_a_forced_refresh_that_is_slow_to_begin(database_url: str, tmp_path: Path) -> None:
    """Whoever claimed it is still queueing on a busy machine: that is no reason to send others away for half a minute."""
    with installation(database_url, tmp_path) as made:
        host = made.host("web")
        connection = connect(host, made, "hubspot", name="one")
        caller = add_caller(host).caller
        refused = host.issuer.issue(caller, "one")
        assert host.store.claim_forced(connection.id, every=30.0)
        late = threading.Timer(2.0, lambda: host.refresher.ask(host.store.named("one")))
        late.start()
        got = host.issuer.issue(caller, "one", rejected=refused.digest, max_wait=20.0)
        late.join()
    assert got.digest != refused.digest
