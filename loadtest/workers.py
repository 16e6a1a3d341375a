"""Lets the workers of a load test read their last answers before the master ends the test.

At the end of a test, locust's master tells its workers to quit and waits for half a second. Users need longer to read
their answers to the end, so the longest answers would be missing from the statistics. Here the master lets its workers
finish first, and waits until each worker has reported that no user is asking any more.
"""

from __future__ import annotations

from typing import Any

import gevent
from locust.runners import STATE_MISSING, STATE_STOPPED, MasterRunner, WorkerRunner

FINISH = "aot_finish"
IS_FINISHED = "aot_is_finished"
REPORT_SECONDS = 10.0  # that the last report may take: workers send one every three


class LastReports:
    """Which workers have reported everything."""

    def __init__(self, environment: Any) -> None:
        """Listen, on a worker for the order to finish, on the master for reports."""
        self._runner = environment.runner
        self._stop_seconds = environment.stop_timeout
        self._finished: set[str] = set()
        if isinstance(self._runner, WorkerRunner):
            self._runner.register_message(FINISH, lambda **_: self._runner.stop(), concurrent=True)
            environment.events.report_to_master.add_listener(self._report)
        elif isinstance(self._runner, MasterRunner):
            environment.events.worker_report.add_listener(self._reported)

    def wait(self) -> None:
        """Return once all workers have finished and said so; at once where there are none."""
        if not isinstance(self._runner, MasterRunner):
            return
        self._runner.send_message(FINISH)
        with gevent.Timeout(self._stop_seconds + REPORT_SECONDS, False):
            while self._running() - self._finished:
                gevent.sleep(0.1)

    def _running(self) -> set[str]:
        return {worker.id for worker in self._runner.clients.all if worker.state != STATE_MISSING}

    def _report(self, data: dict[str, Any], **_: Any) -> None:
        data[IS_FINISHED] = self._runner.state == STATE_STOPPED

    def _reported(self, client_id: str, data: dict[str, Any], **_: Any) -> None:
        if data[IS_FINISHED]:
            self._finished.add(client_id)
