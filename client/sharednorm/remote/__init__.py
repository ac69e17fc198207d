"""Layers on a server: hubs, handles, and the ways in which they compute."""
