"""Groups of workers whose batches are normalized as one."""
