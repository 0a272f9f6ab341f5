"""What the machine is doing, sampled, under the names that MLflow's own monitor gives (``system/...``)."""

from __future__ import annotations

import time
from contextlib import suppress

import psutil
import torch

from hedgelab.tracking.spool import Metrics


class SystemSampler:
    """Samples processor, memory and GPU use, over seconds since the run began (which go on where a run is resumed)."""

    def __init__(self, start_time_ms: int) -> None:
        self._start_time_ms = start_time_ms
        self._process = psutil.Process()
        psutil.cpu_percent()  # the first call only starts the measurement
        self._process.cpu_percent()

    def __call__(self) -> Metrics:
        """One sample of everything."""
        now = int(time.time() * 1000)
        memory = psutil.virtual_memory()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "process_cpu_utilization_percentage": self._process.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "process_memory_usage_megabytes": self._process.memory_info().rss / 1e6,
        }
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            free, total = torch.cuda.mem_get_info(index)
            values[f"gpu_{index}_memory_usage_megabytes"] = (total - free) / 1e6
            values[f"gpu_{index}_memory_usage_percentage"] = 100 * (total - free) / total
            with suppress(Exception):  # needs NVIDIA's management library for Python, which is optional
                values[f"gpu_{index}_utilization_percentage"] = torch.cuda.utilization(index)
        step = (now - self._start_time_ms) // 1000
        return Metrics([(f"system/{name}", float(value), now, step) for name, value in values.items()])
