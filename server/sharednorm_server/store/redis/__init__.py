"""Layers in Redis, shared by several servers."""
