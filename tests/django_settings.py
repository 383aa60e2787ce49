"""The least that Django needs; tests add load balancers as they go (tests/engine.py)."""

SECRET_KEY = "for tests only"
INSTALLED_APPS = ["django_proxysql", "tests.app"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
USE_TZ = True
