"""Compute devices: the CPU, and GPUs by PyCUDA."""
