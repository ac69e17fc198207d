"""Bounds of names, sizes, counts and times. The client library and the server check the same ones."""

DEFAULT_NAMESPACE = "default"
MAX_NAME_BYTES = 512
MAX_GROUP_NAME_CHARACTERS = 256
MAX_DOMAIN_NAME_CHARACTERS = 256
MAX_DOMAINS = 1024
MAX_GROUP_MEMBERS = 1024
MAX_GROUP_SECONDS = 86_400.0
MAX_NAMESPACE_CHARACTERS = 128
MAX_MAPS = 1 << 17
"""So that the messages beside a tensor stay within a few MiB: a state of that many maps is 3 MiB."""

MAX_BATCH_ENTRIES = 1024
"""Most layers that are read, and most steps that are taken, in one call of many."""

MAX_BATCH_MAPS = MAX_MAPS
"""Most maps that these have together, so that such a call is not larger than one of the widest layer."""

MAX_SECONDS = 1e8
"""Longest time that anybody is asked to wait, three years. Timers of gRPC and of threads overflow beyond."""
