"""The settings that Django's test suite runs with; ``runtests.py`` adds the rest.

DATABASES comes as JSON from the environment.
"""

from __future__ import annotations

import json
import os

import django

DATABASES = json.loads(os.environ["DJANGO_SUITE_DATABASES"])
TEST_RUNNER = "tests.django_suite.runner.RecordingRunner"
SECRET_KEY = "django_tests_secret_key"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
USE_TZ = False
if django.VERSION < (6, 0):
    DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
