"""Check what is in a built sdist and wheel: ``python tests/check_dist.py dist/``.

The checkout is the measure: every file of the package must be in the wheel and
nothing else, and every file that git knows must be in the sdist.
"""

import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "django_proxysql/"
#: What it cannot do without, and each extra with a distribution that it brings.
REQUIRED = ("Django", "pybreaker>=1.4", "sqlparse", "tenacity")
EXTRAS = {
    "mysql": "mysqlclient>=2.2.1",
    "postgresql": "psycopg[binary]",
    "redis": "redis",
    "prometheus": "prometheus_client",
    "opentelemetry": "opentelemetry-api",
    "test": "pytest",
    "docs": "Sphinx",
}
MUST_SHIP = {"LICENSE", "CHANGELOG.rst", "README.rst", "setup.py", "pyproject.toml", "tox.ini"}


def tracked() -> set[str]:
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return {name for name in listing.split("\0") if name and (ROOT / name).exists()}


def wheel_problems(path: Path, expected: set[str]) -> list[str]:
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        metadata_name = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(metadata_name).decode())
    content = {name for name in names if ".dist-info/" not in name}
    package = {name for name in expected if name.startswith(PACKAGE)}
    problems = [f"wheel lacks {name}" for name in sorted(package - content)]
    problems += [f"wheel has {name}" for name in sorted(content - package)]
    if f"{PACKAGE}py.typed" not in content:
        problems.append("wheel lacks py.typed")
    if not any(name.endswith("/LICENSE") for name in names):
        problems.append("wheel lacks the licence")
    if metadata["Name"] != "django-proxysql":
        problems.append(f"wheel is named {metadata['Name']}")
    if metadata["Requires-Python"] != ">=3.9":
        problems.append(f"wheel requires Python {metadata['Requires-Python']}")
    required = metadata.get_all("Requires-Dist") or []
    plain = [r.lower() for r in required if "extra ==" not in r]
    for name in REQUIRED:
        if not any(r.startswith(name.lower()) for r in plain):
            problems.append(f"wheel does not require {name}")
    for extra, name in EXTRAS.items():
        of_extra = [r.lower() for r in required if re.search(f"extra == ['\"]{extra}['\"]", r)]
        if not any(r.startswith(name.lower()) for r in of_extra):
            problems.append(f"wheel's extra [{extra}] does not bring {name}")
    if not str(metadata.get_payload()).strip():
        problems.append("wheel has no long description")
    return problems


def sdist_problems(path: Path, expected: set[str]) -> list[str]:
    with tarfile.open(path) as sdist:
        names = {member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()}
    made = {"PKG-INFO", "setup.cfg"}
    extra = {n for n in names - expected - made if not n.startswith("django_proxysql.egg-info/")}
    problems = [f"sdist lacks {name}" for name in sorted((expected | MUST_SHIP) - names)]
    problems += [f"sdist has {name}" for name in sorted(extra)]
    return problems


def main(directory: str) -> int:
    [wheel] = Path(directory).glob("*.whl")
    [sdist] = Path(directory).glob("*.tar.gz")
    expected = tracked()
    problems = wheel_problems(wheel, expected) + sdist_problems(sdist, expected)
    for problem in problems:
        print(problem)
    if not problems:
        print(f"{wheel.name} and {sdist.name} hold what they should")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
