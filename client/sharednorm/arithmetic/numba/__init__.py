"""The implementation that numba compiles for the processor it runs on."""
