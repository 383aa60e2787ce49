"""Packaging of django-proxysql.

What is known about the distribution stands here; pyproject.toml holds the
build backend and the tools' settings only.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def version() -> str:
    """Read ``__version__`` as text: importing the package would need its dependencies."""
    source = (HERE / "django_proxysql" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r"^__version__(?:\s*:[^=]+)?\s*=\s*[\"']([^\"']+)[\"']", source, re.MULTILINE)
    if found is None:
        raise RuntimeError("django_proxysql/__init__.py does not say __version__ = '...'")
    return found.group(1)


MYSQL = ["mysqlclient>=2.2.1"]
POSTGRESQL = ["psycopg[binary]>=3.1"]
REDIS = ["redis>=4.2"]
PROMETHEUS = ["prometheus_client>=0.12"]
OPENTELEMETRY = ["opentelemetry-api>=1.30"]
# Draws the charts of tests/benchmarks and tests/fleet.
BENCHMARKS = ["matplotlib>=3.5"]
# (The pages on metrics are made from the module, which imports prometheus_client.)
DOCS = ["Sphinx>=7", "furo", *PROMETHEUS]

# What the tests import, and nothing that ties them to a version of Django:
# tox installs this extra beside every Django from 2.2 on.
TEST = [
    *MYSQL,
    *POSTGRESQL,
    *REDIS,
    *PROMETHEUS,
    "PyMySQL[rsa]>=1.0.2",
    "SQLAlchemy>=1.4",
    # Drivers for asyncio.
    "aiomysql>=0.2",
    "asyncmy>=0.2.9",
    "asyncpg>=0.28",
    # Knows Django 4.2 to 6.0 only: installed where no other Django is tested.
    'django-prometheus>=2.4; python_version == "3.11"',
    # The neighbours: where no Django before 4.2 is tested.
    *(
        f'{name}; python_version >= "3.11"'
        for name in (
            "celery>=5.4",
            "django-db-connection-pool>=1.2.5",
            "django-debug-toolbar>=4.4",
            "django-extensions>=3.2.3",
            "django-mysql>=4.13",
            "django-silk>=5.1",
        )
    ),
    # gunicorn's worker asks for 24.10.1.
    "gevent>=24.10.1",
    # An earlier one comes where Django is older; its test is for the present ones.
    'django-health-check>=3.20; python_version >= "3.11"',
    "gunicorn>=20.1",
    'opentelemetry-sdk>=1.30; python_version >= "3.11"',
    "hypothesis>=6",
    "psycopg-pool>=3.2",
    "psycopg2-binary>=2.8",
    "pytest>=7",
    "pytest-django>=4.5",
    "pytest-timeout>=2.1",
    "selenium>=4.10",
    "pytest-xdist>=3.2",
    # Reads the docs' YAML.
    "PyYAML>=5",
    # uWSGI, which need not be compiled.
    'pyuwsgi>=2.0.27; sys_platform == "linux"',
    "uvicorn>=0.20",
]

# What .ci/run needs on top.
DEV = [
    *TEST,
    *DOCS,
    "build",
    *BENCHMARKS,
    "django-stubs",
    "mypy>=1.8",
    "ruff>=0.6",
    "types-PyMySQL",
]

setup(
    name="django-proxysql",
    version=version(),
    description="A Django database engine that spreads connections over equivalent peers, "
    "with a circuit breaker for each",
    long_description=(HERE / "README.rst").read_text(encoding="utf-8"),
    long_description_content_type="text/x-rst",
    author="django-proxysql contributors",
    license="MIT",
    license_files=["LICENSE"],
    keywords=[
        "django",
        "database",
        "load balancer",
        "failover",
        "circuit breaker",
        "mysql",
        "mariadb",
        "galera",
        "proxysql",
        "maxscale",
        "postgresql",
    ],
    packages=find_packages(include=["django_proxysql", "django_proxysql.*"]),
    package_data={
        "django_proxysql": [
            "py.typed",
            "**/templates/**/*",
            "templates/**/*",
            "monitoring/assets/*",
            "core/sharing/*.lua",
        ],
    },
    zip_safe=False,
    python_requires=">=3.9",
    install_requires=[
        "Django>=2.2",
        "pybreaker>=1.4",
        "sqlparse>=0.2.2",
        "tenacity>=8",
    ],
    extras_require={
        "mysql": MYSQL,
        "postgresql": POSTGRESQL,
        "redis": REDIS,
        "prometheus": PROMETHEUS,
        "opentelemetry": OPENTELEMETRY,
        "benchmarks": BENCHMARKS,
        "test": TEST,
        "docs": DOCS,
        "dev": DEV,
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Web Environment",
        "Framework :: Django",
        "Framework :: Django :: 2.2",
        "Framework :: Django :: 3.2",
        "Framework :: Django :: 4.2",
        "Framework :: Django :: 5.2",
        "Framework :: Django :: 6.0",
        "Framework :: Django :: 6.1",
        "Intended Audience :: Developers",
        "Intended Audience :: System Administrators",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.9",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Programming Language :: Python :: 3.15",
        "Topic :: Database",
        "Topic :: System :: Clustering",
        "Topic :: System :: Networking",
        "Typing :: Typed",
    ],
)
