"""The HTTP edge: pages for people, metrics and health for monitoring."""
