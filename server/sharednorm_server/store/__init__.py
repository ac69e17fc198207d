"""Where layers are kept: memory, SQLite, Redis."""
