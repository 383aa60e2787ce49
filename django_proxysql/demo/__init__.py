"""A small Django site on three SQLite peers, to watch the load balancer at work."""
