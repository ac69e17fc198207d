"""The options of a server, and where their values come from."""
