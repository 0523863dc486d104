"""How busy this machine is, under the names that MLflow's page of system metrics shows."""

from __future__ import annotations

import psutil
import torch

_MEGABYTE = 1e6


class SystemMetrics:
    """Samples of processors, memory, disk and network; rates are means since the sample before."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # begins to measure
        self._network = psutil.net_io_counters()

    def sample(self) -> dict[str, float]:
        """`system/NAME` -> value now."""
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage("/"), psutil.net_io_counters()
        figures = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MEGABYTE,
            "system_memory_usage_percentage": memory.percent,
            "process_memory_megabytes": psutil.Process().memory_info().rss / _MEGABYTE,
            "disk_usage_percentage": disk.percent,
        }
        if network is not None and self._network is not None:
            figures["network_receive_megabytes"] = (network.bytes_recv - self._network.bytes_recv) / _MEGABYTE
            figures["network_transmit_megabytes"] = (network.bytes_sent - self._network.bytes_sent) / _MEGABYTE
        self._network = network
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            # The process' own GPU: asking about others would take memory on them.
            index = torch.cuda.current_device()
            free, total = torch.cuda.mem_get_info(index)
            figures[f"gpu_{index}_memory_usage_megabytes"] = (total - free) / _MEGABYTE
            figures[f"gpu_{index}_memory_usage_percentage"] = 100 * (total - free) / total
        return {f"system/{name}": float(value) for name, value in figures.items()}
