"""Django's MySQL backend on a driver without a server: what is left is Python's own work."""
