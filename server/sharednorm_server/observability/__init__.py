"""What a server tells about itself: calls, metrics, traces, logs."""
