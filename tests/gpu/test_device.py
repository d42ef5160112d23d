"""Facts of the machine: written in one piece, before and after, and a doctor that says what mends what."""

import json
import sys
from types import SimpleNamespace

import pytest

from flashcore import __version__
from flashcore.errors import RecordsError
from flashcore.gpu import build, device


def test_a_snapshot_names_every_fact_even_those_it_does_not_know():
    facts = device.snapshot()
    for name in ("gpu", "uuid", "sm_count", "driver", "cuda_runtime", "cudnn", "cublaslt", "torch", "nvrtc", "python",
                 "sm_clock_mhz", "temperature_c", "power_w", "throttle_reasons"):  # fmt: skip
        assert name in facts
    assert facts["python"] == sys.version.split()[0] and facts["torch"]


def test_the_environment_of_a_run_is_written_before_and_after(run):
    identity = device.record_environment(run, "before", {"profile": "quick"})
    first = run.environment()
    assert first["id"] == identity and identity.startswith("env-") and first["after"] is None
    assert first["kernels"] == build.source_hashes() and first["parameters"] == {"profile": "quick"}
    assert first["flashcore"] == __version__
    device.record_environment(run, "after")
    second = run.environment()
    assert second["after"]["python"] and second["id"] == identity and second["before"] == first["before"]
    assert [p.name for p in run.path.iterdir() if "tmp" in p.name] == []


def test_the_git_commit_comes_from_the_environment_where_there_is_no_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "HOME", tmp_path)
    monkeypatch.setenv("FLASHCORE_GIT_COMMIT", "abc123")
    monkeypatch.setenv("FLASHCORE_GIT_DIRTY", "1")
    assert device._git() == {"commit": "abc123", "dirty": True}
    monkeypatch.delenv("FLASHCORE_GIT_DIRTY")
    assert device._git()["dirty"] is None


def test_an_environment_that_cannot_be_written_is_one_sentence(run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(device.os, "replace", full)
    with pytest.raises(RecordsError, match="No space left on device.*--out"):
        device.record_environment(run, "before")
    assert not run.environment_path.exists() and not list(run.path.glob("*.tmp"))


def test_a_damaged_environment_is_one_sentence(run):
    run.environment_path.write_text("{")
    with pytest.raises(RecordsError, match="cannot be read"):
        run.environment()


def test_throttle_reasons_are_words(monkeypatch):
    monkeypatch.setattr(device, "_ask_nvml", lambda question: None)
    assert device.clocks()["throttle_reasons"] is None, "not known is not the same as none"
    monkeypatch.setattr(device, "_ask_nvml", lambda question: 0x4 | 0x20)
    assert device.clocks()["throttle_reasons"] == ["software power cap", "software thermal slowdown"]


def test_the_doctor_says_what_mends_what_is_missing(monkeypatch):
    monkeypatch.setattr(build, "nvrtc_version", lambda: (_ for _ in ()).throw(build.ToolMissing("NVRTC", "mend it so")))
    monkeypatch.setattr(build, "disassembler", lambda: None)
    build.header_dirs.cache_clear()
    found = {check.name: check for check in device.checks()}
    assert found["Python"].ok and found["torch"].ok and found["torch"].needed
    assert not found["NVRTC and CUDA headers"].ok and "mend it so" in found["NVRTC and CUDA headers"].detail
    assert not found["nvdisasm"].ok and found["nvdisasm"].fix
    assert all(check.fix for check in found.values() if not check.ok)


def test_environment_is_json_that_any_tool_reads(run):
    device.record_environment(run, "before")
    assert json.loads(run.environment_path.read_text())["schema_version"] == 1


@pytest.mark.parametrize(
    ("remote", "told"),
    [
        ("https://example.invalid/a/b.git", "https://example.invalid/a/b.git"),
        ("https://user:secret@example.invalid/a/b", "https://example.invalid/a/b"),
        ("git@example.invalid:a/b.git", "https://example.invalid/a/b.git"),
        ("ssh://git@example.invalid/a/b", "https://example.invalid/a/b"),
        ("/srv/b", None), ("../b", None), ("file:///b", None), ("", None), (None, None),
    ],
)  # fmt: skip
def test_a_repository_is_named_as_others_reach_it_and_never_with_a_password(remote, told):
    assert device.public_url(remote) == told


class Nvml:
    """NVML of a GPU that tells its clock and its power, and not its temperature."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU, NVML_FI_DEV_POWER_INSTANT, NVML_SUCCESS = 1, 0, 186, 0

    class NVMLError(Exception):
        pass

    def __init__(self, instant):
        self.instant = instant

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return {1: 1755}[kind]

    def nvmlDeviceGetPowerUsage(self, handle):
        return 412_340

    def nvmlDeviceGetTemperature(self, handle, kind):
        raise self.NVMLError("not supported")

    def nvmlDeviceGetFieldValues(self, handle, fields):
        if self.instant is None:
            raise AttributeError("an older library")
        value = SimpleNamespace(uiVal=self.instant)
        return [SimpleNamespace(nvmlReturn=0 if self.instant else 3, value=value)]


@pytest.mark.parametrize(("instant", "power"), [(698_760, 698.8), (0, 412.3), (None, 412.3)])
def test_sensors_say_what_nvml_tells_and_leave_out_the_rest(monkeypatch, instant, power):
    monkeypatch.setattr(device, "_nvml_handle", lambda: "the GPU")
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(instant))
    assert device.sensors() == {"sm_clock_mhz": 1755, "power_w": power}


def test_without_nvml_there_are_no_sensors(monkeypatch):
    monkeypatch.setattr(device, "_nvml_handle", lambda: None)
    assert device.sensors() is None


@pytest.mark.parametrize(("mode", "shared"), [(None, True), (0, True), (3, False), (2, False)])
def test_a_gpu_in_an_exclusive_mode_takes_one_process_alone(monkeypatch, mode, shared):
    monkeypatch.setattr(device, "_ask_nvml", lambda question: mode)
    assert device.is_shared() is shared
