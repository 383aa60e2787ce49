"""A small Django site on real peers, to watch the load balancer at work."""
