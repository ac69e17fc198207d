"""Layers in a SQLite file."""
