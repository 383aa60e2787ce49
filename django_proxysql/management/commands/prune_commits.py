"""``manage.py prune_commits``: delete the tokens of old COMMITs."""

from __future__ import annotations

import re
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import connections

from ...backends.tokens import delete_old, has_table, records
from ...core.outcome import TABLE

_WRITES = "no load balancer of MySQL's or PostgreSQL's that has COMMIT_OUTCOME"
_UNITS = {"h": 3600, "d": 86_400, "w": 604_800}


class Command(BaseCommand):
    """Deletes old tokens."""

    help = (
        "Delete the tokens that transactions have written for COMMIT_OUTCOME. The engine does the "
        "same by itself, for tokens older than a day."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--database", help="An alias. Without it: each alias that has COMMIT_OUTCOME."
        )
        parser.add_argument(
            "--older-than",
            default="1d",
            help="Their least age: 6h, 1d (the default), 2w. Not less than 1h: a younger token may "
            "be in doubt.",
        )

    def handle(self, *args: Any, database: str | None, older_than: str, **options: Any) -> None:
        given = re.fullmatch(r"(\d+)([hdw])", older_than)
        if given is None or int(given[1]) < 1:
            raise CommandError(
                f"--older-than is {older_than!r}. Give a whole number of hours, days or weeks, "
                "at least 1h: 6h, 1d, 2w."
            )
        if database is not None and not records(database):
            raise CommandError(
                f"{database!r} is {_WRITES}. Leave --database out: each that has it is pruned."
            )
        aliases = [alias for alias in connections if records(alias)]
        without = []
        for alias in aliases if database is None else [database]:
            if has_table(connections[alias]):
                deleted = delete_old(connections[alias], int(given[1]) * _UNITS[given[2]])
                self.stdout.write(f"{alias}: {deleted} tokens deleted")
            else:
                remedy = f"Run: manage.py migrate --database {alias}"
                without.append(f"{alias}: there is no table {TABLE}. {remedy}")
        if without:
            raise CommandError("\n".join(without))
        if not aliases:
            self.stdout.write(f"There is {_WRITES}.")
