"""Django's test runner, writing down what became of each test."""

from __future__ import annotations

import json
import os
import time
import unittest
from typing import Any

from django.test.runner import DiscoverRunner


class RecordingResult(unittest.TextTestResult):
    """Appends a line of JSON to a file for each outcome: the test, the outcome, its reason.

    A file, line by line: of a run that hangs or crashes the tests before that are known.
    """

    def _record(self, test: unittest.TestCase, outcome: str, reason: str = "") -> None:
        with open(os.environ["DJANGO_SUITE_RESULTS"], "a", encoding="utf-8") as results:
            results.write(json.dumps([test.id(), outcome, reason, time.time()]) + "\n")

    def _reason(self, err: Any, test: unittest.TestCase) -> str:
        return str(self._exc_info_to_string(err, test))  # type: ignore[attr-defined]

    def addSuccess(self, test: Any) -> None:
        super().addSuccess(test)
        self._record(test, "passed")

    def addError(self, test: Any, err: Any) -> None:
        super().addError(test, err)
        self._record(test, "error", self._reason(err, test))

    def addFailure(self, test: Any, err: Any) -> None:
        super().addFailure(test, err)
        self._record(test, "failed", self._reason(err, test))

    def addSkip(self, test: Any, reason: str) -> None:
        super().addSkip(test, reason)
        self._record(test, "skipped", reason)

    def addExpectedFailure(self, test: Any, err: Any) -> None:
        super().addExpectedFailure(test, err)
        self._record(test, "expected failure")

    def addUnexpectedSuccess(self, test: Any) -> None:
        super().addUnexpectedSuccess(test)
        self._record(test, "unexpected success")

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        super().addSubTest(test, subtest, err)
        if err is not None:
            failed = issubclass(err[0], test.failureException)
            self._record(test, "failed" if failed else "error", self._reason(err, test))


class RecordingRunner(DiscoverRunner):
    """Django's own, but for the result class and a look at what is under test."""

    def setup_databases(self, **kwargs: Any) -> Any:
        made = super().setup_databases(**kwargs)
        for connection, _name, is_first in made:
            if is_first and "PEERS" in connection.settings_dict:
                peer = getattr(connection, "peer", None)
                assert peer is not None, f"{connection.alias} is not on a balancer"
        return made

    def get_resultclass(self) -> Any:
        return RecordingResult
