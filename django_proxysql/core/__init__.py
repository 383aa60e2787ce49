"""The load balancer: everything that knows no Django."""
