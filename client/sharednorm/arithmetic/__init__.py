"""The arithmetic of batch normalization: its interface, its formulas, and two implementations."""
