"""What ``manage.py`` offers."""
