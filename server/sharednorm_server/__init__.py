"""The server: keeps named batch-normalization layers and computes with them."""
