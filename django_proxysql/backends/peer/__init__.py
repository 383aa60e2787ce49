"""The backend of aliases that serve as peers; put into their place by the registry."""
