"""Sensors beside a timing: what was read is summed up, and whatever they do leaves the timing alone."""

from __future__ import annotations

import threading
import time

import pytest

from flashcore.gpu import device
from flashcore.measure.watching import Watch
from flashcore.numerics import instruments


def reader(values, enough):
    """Reads these values one after the other, says when all were read, and then the last again and again."""
    left = list(values)

    def read():
        value = left.pop(0) if len(left) > 1 else left[0]
        if len(left) == 1:
            enough.set()
        return value

    return read


def test_the_least_the_median_and_the_greatest_of_what_was_read_during_it():
    enough = threading.Event()
    before = {"sm_clock_mhz": 345, "power_w": 70.0}
    during = [
        {"sm_clock_mhz": c, "power_w": p} for c, p in ((1980, 500.0), (1755, 700.0), (1800, 650.0), (1800, 650.0))
    ]
    with Watch(reader([before, *during], enough), period_s=0.02) as watch:
        assert enough.wait(300)
        threads = [t.name for t in threading.enumerate()]
    found = watch.summary()
    assert "flashcore-watch" in threads and "flashcore-watch" not in [t.name for t in threading.enumerate()]
    assert found["sm_clock_mhz"][::2] == [1755, 1980] and found["power_w"][::2] == [500.0, 700.0], "345 was before it"
    assert found["sm_clock_mhz"][1] == 1800 and found["readings"] >= 3 and "temperature_c" not in found


def test_what_was_over_before_the_first_reading_has_one():
    with Watch(lambda: {"temperature_c": 50}, period_s=30) as watch:
        pass
    assert watch.summary() == {"temperature_c": [50, 50, 50], "readings": 1}


def fails():
    raise OSError("the driver is gone")


@pytest.mark.parametrize("read", [lambda: None, dict, fails])
def test_without_sensors_it_says_so_and_starts_nothing(read):
    before = set(threading.enumerate())  # some of other tests may end meanwhile
    with Watch(read) as watch:
        assert set(threading.enumerate()) <= before
    assert watch.summary() == {"readings": 0, "reason": "not available: NVML does not answer here"}


def test_sensors_that_end_keep_what_they_said():
    left = [{"power_w": 70}, {"power_w": 300}]
    with Watch(lambda: left.pop(0), period_s=0.02) as watch:
        watch._thread.join(300)
        assert not watch._thread.is_alive()
    assert watch.summary() == {"power_w": [300, 300, 300], "readings": 1}


def test_readings_are_not_so_frequent_that_they_slow_the_host():
    with pytest.raises(ValueError, match="0.02 is the shortest"):
        Watch(period_s=0.001)
    started = time.monotonic()
    with Watch(lambda: {"power_w": 1}, period_s=0.02) as watch:
        time.sleep(0.1)
    most = (time.monotonic() - started) / 0.02 + 1  # on a busy machine more time went by
    assert 1 <= watch.summary()["readings"] <= most


def test_by_default_it_reads_the_gpu(monkeypatch):
    monkeypatch.setattr(device, "sensors", lambda: {"sm_clock_mhz": 1980})
    with Watch() as watch:
        pass
    assert watch.summary()["sm_clock_mhz"] == [1980, 1980, 1980]


def test_a_backend_that_is_watched_for_threads_is_not_accused_of_this_one():
    with instruments.watched("honest"):
        watch = Watch(lambda: {"power_w": 1}).__enter__()
    watch.__exit__()
    assert watch.summary()["readings"] == 1
