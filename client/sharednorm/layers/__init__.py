"""The API of a layer, and layers that live in this process."""
