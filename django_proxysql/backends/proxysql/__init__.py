"""The backend to name as ENGINE: ``django_proxysql.backends.proxysql``."""
