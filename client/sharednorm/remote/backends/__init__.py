"""The ways in which a remote layer computes."""
