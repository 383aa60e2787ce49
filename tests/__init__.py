"""The tests. They start the servers they need: see tests/servers."""
