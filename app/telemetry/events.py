"""The register of everything this program says about itself.

An event is named `area:subject:action` and may carry the fields listed for it and no others: what is not in
the register does not get out, so a careless keyword argument cannot leak. The audit trail uses the same
names for its actions.

Fields hold machine words, ids, counts and seconds. Never a token, an e-mail address, a person's name or a
value out of a CRM. To add an event: one member in the block of its area, one line in `REGISTER` at the same
place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Literal

__all__ = ["REGISTER", "Event", "Level", "Spec"]

Level = Literal["debug", "info", "warning", "error"]


class Event(StrEnum):
    """What can be logged or audited."""

    # telemetry
    LIBRARY_SPOKE = "telemetry:library:spoke"
    LOG_FAILED = "telemetry:log:failed"
    CRASHED = "telemetry:program:crashed"
    METRICS_IN_MEMORY = "telemetry:metrics:in_memory"
    METRICS_FILE_SKIPPED = "telemetry:metrics:file_skipped"

    # start and stop
    STARTED = "program:process:started"
    STOPPING = "program:process:stopping"
    STOPPED = "program:process:stopped"
    START_REFUSED = "program:start:refused"
    STOP_FAILED = "program:stop:failed"

    # crypto
    KEYRING_LOADED = "crypto:keyring:loaded"
    KEYRING_MADE = "crypto:keyring:made"
    KEY_ADDED = "crypto:key:added"
    KEY_ACTIVATED = "crypto:key:activated"
    KEY_RETIRED = "crypto:key:retired"
    RECORD_UNOPENABLE = "crypto:record:unopenable"
    CANARY_FAILED = "crypto:canary:failed"

    # db
    DATABASE_MIGRATED = "db:schema:migrated"
    DATABASE_LOST = "db:connection:lost"
    DATABASE_BACK = "db:connection:back"
    DATABASE_SLOW = "db:transaction:slow"
    CLOCK_SKEWED = "db:clock:skewed"

    # access
    CALLER_ADDED = "access:caller:added"
    CALLER_ROTATED = "access:caller:rotated"
    CALLER_DISABLED = "access:caller:disabled"
    CALLER_ENABLED = "access:caller:enabled"
    CALLER_REMOVED = "access:caller:removed"
    PERMISSION_GIVEN = "access:permission:given"
    PERMISSION_TAKEN = "access:permission:taken"
    ACCESS_DENIED = "access:request:denied"
    AUTHENTICATION_FAILED = "access:credential:refused"
    CALLER_TOKEN_ISSUED = "access:caller_token:issued"  # noqa: S105 - the name of an event
    SIGNING_KEY_ROTATED = "access:signing_key:rotated"
    AUDIT_HEAD = "access:audit:head"
    AUDIT_HEAD_STUCK = "access:audit:head_stuck"
    AUDIT_SPOOLING = "access:audit:spooling"
    AUDIT_CAUGHT_UP = "access:audit:caught_up"
    AUDIT_UNAVAILABLE = "access:audit:unavailable"
    AUDIT_BROKEN = "access:audit:broken"
    AUDIT_SPOOL_DAMAGED = "access:audit:spool_damaged"
    AUDIT_PRUNED = "access:audit:pruned"

    # broker
    TOKEN_ISSUED = "broker:token:issued"  # noqa: S105 - the name of an event
    TOKEN_REFUSED = "broker:token:refused"  # noqa: S105 - the name of an event
    APP_ADDED = "broker:app:added"
    APP_ROTATED = "broker:app:rotated"
    APP_REMOVED = "broker:app:removed"
    BREAKER_OPENED = "broker:breaker:opened"
    BREAKER_CLOSED = "broker:breaker:closed"
    CONNECT_STARTED = "broker:connect:started"
    CONNECT_FAILED = "broker:connect:failed"
    CONNECT_LINK_MADE = "broker:connect_link:made"
    CONNECTION_CONNECTED = "broker:connection:connected"
    CONNECTION_MISMATCHED = "broker:connection:mismatched"
    CONNECTION_RECOVERED = "broker:connection:recovered"
    CONNECTION_LOST = "broker:connection:lost"
    CONNECTION_DISABLED = "broker:connection:disabled"
    CONNECTION_ENABLED = "broker:connection:enabled"
    CONNECTION_RENAMED = "broker:connection:renamed"
    CONNECTION_DISCONNECTING = "broker:connection:disconnecting"
    CONNECTION_SHREDDED = "broker:connection:shredded"
    CONNECTION_IMPORTED = "broker:connection:imported"
    CONNECTION_EXPORTED = "broker:connection:exported"
    REFRESH_ENDED = "broker:refresh:ended"
    ANSWER_ODD = "broker:refresh:answer_odd"
    REFRESH_CRASHED = "broker:refresh:crashed"
    LIFE_UNKNOWN = "broker:refresh:life_unknown"
    OUTCOME_UNSAVED = "broker:refresh:outcome_unsaved"
    REFRESH_DISCARDED = "broker:refresh:discarded"
    REFRESH_HELD = "broker:refresh:held"
    LEASE_OVERRUN = "broker:lease:overrun"
    JOURNAL_ADOPTED = "broker:journal:adopted"
    JOURNAL_FAILED = "broker:journal:failed"
    JOURNAL_REPLAYED = "broker:journal:replayed"
    JOURNAL_TORN = "broker:journal:torn"
    REVOKE_DONE = "broker:revoke:done"
    REVOKE_FAILED = "broker:revoke:failed"
    RESEALED = "broker:keys:resealed"
    INSTALLATION_ADOPTED = "broker:installation:adopted"
    MARK_UNWRITABLE = "broker:high_water:unwritable"
    FINDING_OPENED = "broker:finding:opened"
    FINDING_CLOSED = "broker:finding:closed"
    NOTICE_FAILED = "broker:notice:failed"
    NOTICE_DELIVERED = "broker:notice:delivered"
    NOTICE_GIVEN_UP = "broker:notice:given_up"

    # jobs
    JOB_RAN = "jobs:run:done"
    JOB_FAILED = "jobs:run:failed"
    WORKER_LATE = "jobs:worker:late"

    # web
    REQUEST_FAILED = "web:request:failed"
    REQUEST_SLOW = "web:request:slow"
    REQUEST_UNREADABLE = "web:request:unreadable"
    ACCEPT_PAUSED = "web:accept:paused"
    ADMIN_LOGIN_LINK_MADE = "web:admin_login:link_made"
    ADMIN_SIGNED_IN = "web:admin_login:done"
    ADMIN_SIGN_IN_FAILED = "web:admin_login:failed"
    ADMIN_SIGNED_OUT = "web:admin_login:ended"
    ADMIN_ACTED = "web:admin:acted"


@dataclass(frozen=True, slots=True)
class Spec:
    """How loud an event is, the fields it may carry, and what it tells the reader."""

    level: Level
    fields: frozenset[str]
    says: str


def _spec(level: Level, fields: str, says: str) -> Spec:
    return Spec(level, frozenset(fields.split()), says)


REGISTER: Final[Mapping[Event, Spec]] = MappingProxyType(
    {
        # telemetry
        Event.LIBRARY_SPOKE: _spec(
            "info", "logger message error", "A library logged something; its words are scrubbed."
        ),
        Event.LOG_FAILED: _spec(
            "error", "failed error", "An event could not be written as it was meant to be."
        ),
        Event.CRASHED: _spec(
            "error", "thread error", "An exception nobody caught ended a thread or the program."
        ),
        Event.METRICS_IN_MEMORY: _spec(
            "warning", "error", "The metrics directory cannot be used; this process counts for itself alone."
        ),
        Event.METRICS_FILE_SKIPPED: _spec(
            "warning", "file error", "A metrics file could not be read and was left out."
        ),
        # start and stop
        Event.STARTED: _spec("info", "kind version environment database bind pid", "A process is ready."),
        Event.STOPPING: _spec(
            "info", "kind signal waiting", "A process was asked to stop and finishes what it began."
        ),
        Event.STOPPED: _spec("info", "kind seconds", "A process has finished."),
        Event.START_REFUSED: _spec("error", "kind code reason", "A process will not start like this."),
        Event.STOP_FAILED: _spec(
            "error",
            "kind step error",
            "A step of an orderly end failed; those after it were taken all the same.",
        ),
        # crypto
        Event.KEYRING_LOADED: _spec(
            "info",
            "source ids",
            "The key encryption keys are loaded, or were read again because the file has changed.",
        ),
        Event.KEYRING_MADE: _spec(
            "warning", "kek", "A development keyring was made; production never does this."
        ),
        Event.KEY_ADDED: _spec("info", "kek", "A key encryption key was added."),
        Event.KEY_ACTIVATED: _spec(
            "info", "kek previous", "New records are sealed under another key from now on."
        ),
        Event.KEY_RETIRED: _spec("info", "kek", "A key encryption key is no longer used by anything."),
        Event.RECORD_UNOPENABLE: _spec(
            "error",
            "table column row kek reason",
            "A sealed record does not open: wrong key or edited bytes.",
        ),
        Event.CANARY_FAILED: _spec("error", "kek reason", "The keys do not open the data of this database."),
        # db
        Event.DATABASE_MIGRATED: _spec("info", "database before after", "The schema was brought up to date."),
        Event.DATABASE_LOST: _spec(
            "error",
            "database reason",
            "The database cannot be read; living tokens are handed out for the grace.",
        ),
        Event.DATABASE_BACK: _spec("info", "database seconds", "The database answers again."),
        Event.DATABASE_SLOW: _spec(
            "warning", "database seconds", "A write transaction took longer than it should."
        ),
        Event.CLOCK_SKEWED: _spec(
            "warning", "seconds", "This machine's clock disagrees with the database's."
        ),
        # access
        Event.CALLER_ADDED: _spec("info", "caller", "A caller was added."),
        Event.CALLER_ROTATED: _spec("info", "caller", "A caller got a new secret."),
        Event.CALLER_DISABLED: _spec("info", "caller", "A caller was switched off."),
        Event.CALLER_ENABLED: _spec("info", "caller", "A caller was switched on."),
        Event.CALLER_REMOVED: _spec("info", "caller", "A caller was removed."),
        Event.PERMISSION_GIVEN: _spec("info", "caller action pattern", "A caller got a permission."),
        Event.PERMISSION_TAKEN: _spec("info", "caller action pattern", "A caller lost a permission."),
        Event.ACCESS_DENIED: _spec(
            "info", "caller action target code", "A known caller asked for what it may not have."
        ),
        Event.AUTHENTICATION_FAILED: _spec("info", "way reason count", "A credential was refused."),
        Event.CALLER_TOKEN_ISSUED: _spec(
            "info", "caller way seconds", "A caller exchanged its credential for a token."
        ),
        Event.SIGNING_KEY_ROTATED: _spec(
            "info", "kid previous", "Caller tokens are signed with another key from now on."
        ),
        Event.AUDIT_HEAD: _spec(
            "info", "writer sequence digest", "The head of an audit chain; keep it to prove truncation."
        ),
        Event.AUDIT_HEAD_STUCK: _spec(
            "error",
            "reason error",
            "The stored head of the trail cannot be moved: newest rows could be cut off unseen.",
        ),
        Event.AUDIT_SPOOLING: _spec(
            "warning", "entries reason", "Audit entries go to the spool file for now."
        ),
        Event.AUDIT_CAUGHT_UP: _spec("info", "entries", "Spooled audit entries are in the trail."),
        Event.AUDIT_UNAVAILABLE: _spec(
            "error", "reason", "Nothing can be recorded, so nothing is handed out."
        ),
        Event.AUDIT_BROKEN: _spec(
            "error", "writer sequence reason", "The audit trail was edited, cut or reordered."
        ),
        Event.AUDIT_SPOOL_DAMAGED: _spec(
            "error",
            "file entries",
            "Spooled audit entries lie behind damaged bytes and cannot be brought in; the file was set aside.",
        ),
        Event.AUDIT_PRUNED: _spec(
            "info", "segments entries before", "Audit entries past their retention were removed."
        ),
        # broker
        Event.TOKEN_ISSUED: _spec(
            "debug", "caller connection provider generation expires_in way", "A token was handed out."
        ),
        Event.TOKEN_REFUSED: _spec(
            "info", "caller connection code", "A token was asked for and not handed out."
        ),
        Event.APP_ADDED: _spec("info", "app provider", "An OAuth client was registered."),
        Event.APP_ROTATED: _spec("info", "app provider secrets", "The secrets of an OAuth client changed."),
        Event.APP_REMOVED: _spec("info", "app provider", "An OAuth client was removed."),
        Event.BREAKER_OPENED: _spec(
            "warning",
            "app provider reason failures seconds",
            "A failing provider is left alone, from now on and for longer each time.",
        ),
        Event.BREAKER_CLOSED: _spec("info", "app provider", "A provider answers again."),
        Event.CONNECT_STARTED: _spec(
            "info", "app provider actor connection", "Somebody began to connect an account."
        ),
        Event.CONNECT_FAILED: _spec(
            "warning", "app provider code connection", "Connecting an account failed."
        ),
        Event.CONNECT_LINK_MADE: _spec(
            "info", "app provider connection seconds", "A one-time connect link was made."
        ),
        Event.CONNECTION_CONNECTED: _spec(
            "info", "connection app provider account generation again", "An account is connected."
        ),
        Event.CONNECTION_MISMATCHED: _spec(
            "warning", "connection app provider outcome", "Another account came back; not stored."
        ),
        Event.CONNECTION_LOST: _spec(
            "error", "connection provider code", "A connection needs to be connected again."
        ),
        Event.CONNECTION_RECOVERED: _spec(
            "info", "connection app provider generation", "A connection works again."
        ),
        Event.CONNECTION_DISABLED: _spec("info", "connection actor", "A connection was switched off."),
        Event.CONNECTION_ENABLED: _spec("info", "connection actor", "A connection was switched on."),
        Event.CONNECTION_RENAMED: _spec(
            "info", "connection previous actor", "A connection got another name."
        ),
        Event.CONNECTION_DISCONNECTING: _spec(
            "info", "connection actor provider", "A connection is being disconnected."
        ),
        Event.CONNECTION_SHREDDED: _spec(
            "info", "connection provider outcome", "The tokens of a connection were destroyed."
        ),
        Event.CONNECTION_IMPORTED: _spec(
            "info", "connection app provider outcome", "A connection was imported."
        ),
        Event.CONNECTION_EXPORTED: _spec(
            "info",
            "connection app provider generation",
            "A connection was exported; it is not refreshed here again.",
        ),
        Event.REFRESH_ENDED: _spec(
            "info",
            "connection attempt generation outcome code",
            "A refresh came to an end; the outcome says which.",
        ),
        Event.ANSWER_ODD: _spec(
            "warning", "connection code", "The account a refresh was for was said badly; the token was kept."
        ),
        Event.REFRESH_CRASHED: _spec(
            "error", "connection attempt error", "A refresh met a fault of our own."
        ),
        Event.LIFE_UNKNOWN: _spec(
            "info", "connection", "The provider did not tell how long a token lives; a short life is assumed."
        ),
        Event.OUTCOME_UNSAVED: _spec(
            "error", "waiting", "An outcome cannot be stored yet; it is kept and tried again."
        ),
        Event.REFRESH_DISCARDED: _spec(
            "warning",
            "connection app provider generation attempt gone",
            "A late answer met a newer generation.",
        ),
        Event.REFRESH_HELD: _spec(
            "error",
            "connection connection_id code reason",
            "Nothing is refreshed for now; the code says why.",
        ),
        Event.LEASE_OVERRUN: _spec(
            "error", "connection attempt seconds", "A refresh was stored so long after its lease had ended."
        ),
        Event.JOURNAL_FAILED: _spec(
            "error", "attempt error code", "An answer could not be written to the journal."
        ),
        Event.JOURNAL_ADOPTED: _spec(
            "warning", "file entries", "The journal of a process that died was taken over."
        ),
        Event.JOURNAL_REPLAYED: _spec(
            "warning",
            "connection generation attempt outcome connection_id saved gone",
            "An answer saved in the journal was brought in.",
        ),
        Event.JOURNAL_TORN: _spec(
            "warning",
            "file bytes",
            "Bytes of a journal that are no entry were ignored; a crash while appending leaves them.",
        ),
        Event.REVOKE_DONE: _spec(
            "info", "connection provider connection_id outcome", "The provider revoked a grant we gave back."
        ),
        Event.REVOKE_FAILED: _spec(
            "warning", "connection provider code again connection_id", "The provider did not revoke a grant."
        ),
        Event.RESEALED: _spec("info", "kek rows left", "Records were sealed again under the active key."),
        Event.INSTALLATION_ADOPTED: _spec(
            "warning", "reason", "An operator declared this database to be the one in use."
        ),
        Event.MARK_UNWRITABLE: _spec(
            "error", "error", "The high-water mark of generations cannot be written."
        ),
        Event.FINDING_OPENED: _spec("warning", "finding kind subject", "Something needs a person."),
        Event.FINDING_CLOSED: _spec("info", "finding kind subject", "Something no longer needs a person."),
        Event.NOTICE_FAILED: _spec(
            "warning", "notice code", "A notice to the operator's system was not accepted."
        ),
        Event.NOTICE_DELIVERED: _spec("info", "notice", "A notice reached the operator's system."),
        Event.NOTICE_GIVEN_UP: _spec(
            "error", "notice code", "A notice could not be delivered and is given up."
        ),
        # jobs
        Event.JOB_RAN: _spec("debug", "job seconds done", "A scheduled job ran."),
        Event.JOB_FAILED: _spec("error", "job seconds error code", "A scheduled job failed; it runs again."),
        Event.WORKER_LATE: _spec("warning", "job seconds", "The worker is behind its schedule."),
        # web
        Event.REQUEST_FAILED: _spec(
            "error",
            "method route code status incident error",
            "A request failed through our own fault.",
        ),
        Event.REQUEST_UNREADABLE: _spec(
            "warning", "status reason", "Something came in that is no HTTP request."
        ),
        Event.ACCEPT_PAUSED: _spec(
            "warning",
            "error connections",
            "There is no room for more connections: files, memory or worker_connections; new ones wait.",
        ),
        Event.REQUEST_SLOW: _spec("warning", "method route seconds", "A request took longer than it should."),
        Event.ADMIN_LOGIN_LINK_MADE: _spec("info", "actor", "A one-time admin login link was made."),
        Event.ADMIN_SIGNED_IN: _spec("info", "session", "An admin signed in."),
        Event.ADMIN_SIGN_IN_FAILED: _spec("warning", "reason", "An admin login was refused."),
        Event.ADMIN_SIGNED_OUT: _spec("info", "session", "An admin session ended."),
        Event.ADMIN_ACTED: _spec("info", "action target", "An admin changed something in the console."),
    }
)
