"""Calls to one server or a cluster: channels, connections, shared memory, retries."""
