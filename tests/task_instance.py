"""Stands in for a task instance of Airflow's: keeps what is pushed."""

from __future__ import annotations

from typing import Any


class TaskInstance:
    """A task that is not mapped."""

    map_index = -1

    def __init__(self) -> None:
        self.pushed: dict[str, Any] = {}

    def xcom_push(self, key: str, value: Any) -> None:
        self.pushed[key] = value
