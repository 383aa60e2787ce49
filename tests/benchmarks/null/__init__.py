"""A Django backend without a database: what is left of a connect is Django's own work."""
