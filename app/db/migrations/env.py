"""What Alembic runs for each migration; `app.db.migrate` alone starts it, inside a transaction it has opened.

A migration only adds: tables, nullable or defaulted columns, indexes. Two versions of the program run side by
side during an upgrade, and rebuilding a table, which is how SQLite changes a column, would run `ON DELETE
CASCADE`. There is no way back in a migration: restore the backup.
"""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=context.config.attributes["metadata"],
    version_table=context.config.attributes["version_table"],
)
context.run_migrations()
