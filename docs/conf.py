"""Sphinx's settings. Build with ``sphinx-build -W docs docs/_build/html``."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "django-proxysql"
author = "django-proxysql contributors"
copyright = "2026, django-proxysql contributors"
release = re.search(
    r"^__version__(?:\s*:[^=]+)?\s*=\s*[\"']([^\"']+)[\"']",
    (ROOT / "django_proxysql" / "__init__.py").read_text(encoding="utf-8"),
    re.MULTILINE,
).group(1)
version = release

extensions = ["sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
default_role = "code"
highlight_language = "python"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}

html_theme = "furo"
html_title = f"django-proxysql {release}"
