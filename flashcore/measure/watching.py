"""Watch the GPU's clock, power and temperature while something is timed, from a thread that only asks NVML.

What a clock is before and after a timing says little of what it was during it: a GPU speeds up and is held down within
milliseconds. The thread touches no stream and no tensor. It sleeps between readings, and the timed work is queued ahead
of the GPU, so that a reading costs the host some microseconds in which the GPU goes on.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Mapping
from typing import Any

from flashcore.gpu import device

PERIOD_S = 0.025
"""Between two readings; NVML itself renews them about as often."""
SHORTEST_S = 0.020
"""Readings more often than this would take time from the host that launches."""
NAMES = ("sm_clock_mhz", "power_w", "temperature_c")

Read = Callable[[], Mapping[str, float] | None]


class Watch:
    """A context in which the sensors are read again and again.

    Parameters
    ----------
    read
        Gives the readings by name as they are now, or None where there are none; `device.sensors` if left out.
    period_s
        Between two readings, in seconds; `SHORTEST_S` at least.
    """

    def __init__(self, read: Read | None = None, *, period_s: float = PERIOD_S):
        if period_s < SHORTEST_S:
            raise ValueError(f"period_s is {period_s}; {SHORTEST_S} is the shortest, so that the timing is left alone")
        self._read, self._period_s = read or device.sensors, period_s
        self._readings: list[Mapping[str, float]] = []
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        # The first one, before the work has begun, only says whether there is anything to read.
        if self._reading() is not None:
            self._thread = threading.Thread(target=self._go_on, name="flashcore-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        if self._thread is None:
            return
        self._over.set()
        self._thread.join()
        if not self._readings and (last := self._reading()):  # it was over before the first one came
            self._readings.append(last)

    def _go_on(self) -> None:
        while not self._over.wait(self._period_s):
            reading = self._reading()
            if reading is None:
                return
            self._readings.append(reading)

    def _reading(self) -> Mapping[str, float] | None:
        try:
            return self._read() or None
        except Exception:  # no sensor is worth a timing
            return None

    def summary(self) -> dict[str, Any]:
        """What was read: by name the least, the median and the greatest, with the number of readings.

        Returns
        -------
        dict
            ``sm_clock_mhz``, ``power_w`` and ``temperature_c`` as far as the GPU tells them, and ``readings``; where
            there are none, ``readings`` is 0 and ``reason`` says why.
        """
        found: dict[str, Any] = {}
        for name in NAMES:
            values = [reading[name] for reading in self._readings if reading.get(name) is not None]
            if values:
                found[name] = [min(values), round(statistics.median(values), 1), max(values)]
        if not found:
            return {"readings": 0, "reason": "not available: NVML does not answer here"}
        return {**found, "readings": len(self._readings)}
