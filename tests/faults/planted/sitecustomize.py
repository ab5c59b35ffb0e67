"""Read by every Python whose PYTHONPATH has this folder: plants a fault in the ranks' first exchange.

$PLANTED: "RANK KIND": "wrong" (other numbers are sent than should be), "silent" (the rank never comes), "raises".
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import time
from types import ModuleType
from typing import Any

TRIAL = "comfy_xdit_worker.trial"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != TRIAL:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def run_and_plant(module: ModuleType) -> None:
            run(module)
            _plant(module, *os.environ["PLANTED"].split())

        spec.loader.exec_module = run_and_plant  # type: ignore[method-assign]
        return spec


def _plant(module: Any, rank: str, kind: str) -> None:
    if os.environ.get("RANK") != rank:
        return
    exchange = module._send_receive

    def planted(place: Any, rank: int, after: int, before: int, group: Any) -> Any:
        if kind == "raises":
            raise RuntimeError("unhandled system error")
        if kind == "silent":
            time.sleep(600)
        numbers = module._numbers
        module._numbers = lambda place, source, target: numbers(place, source, target) + (source == rank)
        try:
            return exchange(place, rank, after, before, group)
        finally:
            module._numbers = numbers

    module._send_receive = planted


if "PLANTED" in os.environ:
    sys.meta_path.insert(0, _Finder())
