"""The checkpoint store: SQLite by default."""
