"""The files that `save` writes and `load` reads."""
