"""Work that spans calls and processes: idempotency, caches, push queues, groups."""
