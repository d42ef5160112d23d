"""Find out what this machine is, which state it is in, and what it lacks."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flashcore import __version__
from flashcore.errors import FlashCoreError, RecordsError, ToolMissing
from flashcore.paths import HOME
from flashcore.records import SCHEMA_VERSION, RunFolder, write_whole

THROTTLE_REASONS = {
    0x1: "gpu idle", 0x2: "application clocks", 0x4: "software power cap", 0x8: "hardware slowdown",
    0x10: "sync boost", 0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown",
    0x80: "hardware power brake", 0x100: "display clocks",
}  # fmt: skip
"""NVML's clock event reasons, by bit (nvml.h, nvmlClocksEventReason*)."""
CAPPING_REASONS = ("software power cap", "hardware slowdown", "software thermal slowdown", "hardware thermal slowdown",
                   "hardware power brake")  # fmt: skip


# ---------------------------------------------------------------------------------------------------- facts


@functools.cache
def has_gpu() -> bool:
    """Whether torch sees a CUDA GPU."""
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


@functools.cache
def gpu_name() -> str | None:
    """The GPU's name, such as `NVIDIA H200`; None without one."""
    if not has_gpu():
        return None
    import torch

    return torch.cuda.get_device_name()


@functools.cache
def l2_bytes() -> int:
    """Size of the GPU's L2 cache in bytes; 0 without a GPU."""
    if not has_gpu():
        return 0
    import torch

    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


@functools.cache
def memory_bytes() -> int:
    """Size of the GPU's memory in bytes; 0 without a GPU."""
    if not has_gpu():
        return 0
    import torch

    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def is_shared() -> bool:
    """Whether several processes may use the GPU at once; True where NVML does not say otherwise."""
    return _ask_nvml(lambda n, h: n.nvmlDeviceGetComputeMode(h)) in (None, 0)


@functools.cache
def _nvml_handle() -> Any:
    """NVML's handle of the current GPU, or None; matched by uuid, because CUDA_VISIBLE_DEVICES renumbers."""
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except Exception:  # no driver, no GPU, or an NVML that does not answer: facts we then do not have
        return None


def _ask_nvml(question: Callable[[Any, Any], Any]) -> Any:
    handle = _nvml_handle()
    if handle is None:
        return None
    import pynvml

    try:
        return question(pynvml, handle)
    except pynvml.NVMLError:
        return None


def clocks() -> dict[str, Any]:
    """Clocks in MHz, temperature in °C, power in W and the reasons that hold the clocks down, as they are now."""
    reasons = _ask_nvml(lambda n, h: n.nvmlDeviceGetCurrentClocksThrottleReasons(h))
    power = _ask_nvml(lambda n, h: n.nvmlDeviceGetPowerUsage(h))
    return {
        "sm_clock_mhz": _ask_nvml(lambda n, h: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM)),
        "memory_clock_mhz": _ask_nvml(lambda n, h: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_MEM)),
        "temperature_c": _ask_nvml(lambda n, h: n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU)),
        "power_w": None if power is None else round(power / 1000),
        "throttle_reasons": None if reasons is None else [w for bit, w in THROTTLE_REASONS.items() if reasons & bit],
    }


def _power_w() -> float | None:
    """Power in W as it is now where the driver tells that, else its mean over the last second."""

    def instant(nvml: Any, handle: Any) -> float | None:
        field = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_POWER_INSTANT])[0]
        return None if field.nvmlReturn != nvml.NVML_SUCCESS else field.value.uiVal / 1000

    try:
        now = _ask_nvml(instant)
    except Exception:  # an older pynvml has no such field
        now = None
    if now:
        return round(now, 1)
    mean = _ask_nvml(lambda n, h: n.nvmlDeviceGetPowerUsage(h))
    return None if mean is None else round(mean / 1000, 1)


def sensors() -> dict[str, float] | None:
    """SM clock in MHz, power in W and temperature in °C as they are now, as far as NVML tells them; None without it.

    Asks nothing of torch or CUDA but, the first time, which GPU is meant; so it may run in a thread beside a timing.
    """
    if _nvml_handle() is None:
        return None
    found = {
        "sm_clock_mhz": _ask_nvml(lambda n, h: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM)),
        "power_w": _power_w(),
        "temperature_c": _ask_nvml(lambda n, h: n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU)),
    }
    return {name: value for name, value in found.items() if value is not None} or None


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def snapshot() -> dict[str, Any]:
    """Everything about the machine that a figure may depend on; None where it is not known or does not apply."""
    facts: dict[str, Any] = {
        "gpu": gpu_name(), "uuid": None, "sm_count": None, "compute_capability": None, "memory_bytes": None,
        "l2_bytes": l2_bytes() or None, "driver": _ask_nvml(lambda n, h: n.nvmlSystemGetDriverVersion()),
        "cuda_driver": None, "cuda_runtime": None, "cudnn": None, "cublaslt": None, "torch": _version_of("torch"),
        "cupy": _version_of("cupy-cuda12x") or _version_of("cupy-cuda13x"), "nvrtc": None,
        "python": platform.python_version(), "platform": platform.platform(), "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        **clocks(),
    }  # fmt: skip
    if has_gpu():
        import torch

        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= {
            "uuid": str(properties.uuid),
            "sm_count": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "cuda_runtime": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cuda_driver": _ask_nvml(lambda n, h: n.nvmlSystemGetCudaDriverVersion()),
            "cublaslt": _cublaslt_version(),
        }
    try:
        from flashcore.gpu.build import nvrtc_version

        facts["nvrtc"] = nvrtc_version()
    except ToolMissing:
        pass
    return facts


def _cublaslt_version() -> int | None:
    try:
        from nvmath.bindings import cublasLt

        return int(cublasLt.get_version())
    except Exception:  # an optional package, and any failure of it only means that the version is not known
        return None


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    except OSError:
        return platform.processor() or None


def _git() -> dict[str, Any]:
    """Commit, dirty flag, and where others find the repository.

    From FLASHCORE_GIT_COMMIT, FLASHCORE_GIT_DIRTY and FLASHCORE_GIT_URL where there is no repository.
    """

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(HOME), *words], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD") if (HOME / ".git").exists() else None
    if commit:
        url = public_url(git("remote", "get-url", "origin"))
        return {"commit": commit, "dirty": bool(git("status", "--porcelain")), **({"url": url} if url else {})}
    dirty = os.environ.get("FLASHCORE_GIT_DIRTY")
    url = public_url(os.environ.get("FLASHCORE_GIT_URL"))
    commit = os.environ.get("FLASHCORE_GIT_COMMIT")
    return {"commit": commit, "dirty": None if dirty is None else dirty == "1", **({"url": url} if url else {})}


def public_url(remote: str | None) -> str | None:
    """A repository's address as another reader can clone it, without user and password; None for a local one."""
    found = re.fullmatch(r"(https?)://(?:[^/@]*@)?([^/@\s]+/\S+)|(?:ssh://)?git@([\w.-]+)[:/](\S+)", remote or "")
    if found is None:
        return None
    return f"{found[1]}://{found[2]}" if found[1] else f"https://{found[3]}/{found[4]}"


def record_environment(
    run: RunFolder, when: str, parameters: dict[str, Any] | None = None, *, cards: Sequence[dict[str, Any]] = ()
) -> str:
    """Write the machine's state into the run's `environment.json`, in one piece; gives the environment's id.

    Parameters
    ----------
    when
        `before` starts the file; `after` adds the state at the end, so that heat and throttling show.
    parameters
        What the run was asked to do; kept with `before`.
    cards
        Of a run that several workers share: the card, node and software of each; kept with `before`.
    """
    from flashcore.gpu.build import source_hashes

    now = snapshot()
    if when == "after":
        environment = {**run.environment(), "after": now}
    else:
        stable = {k: v for k, v in now.items() if k not in clocks()}
        identity = hashlib.sha256(json.dumps(stable, sort_keys=True, default=str).encode()).hexdigest()[:12]
        environment = {
            "schema_version": SCHEMA_VERSION,
            "id": f"env-{identity}",
            "gpu": now["gpu"],
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "before": now,
            "after": None,
            "git": _git(),
            "kernels": source_hashes(),
            "parameters": parameters or {},
            "flashcore": __version__,
            **({"cards": list(cards)} if cards else {}),
        }
    try:
        write_whole(run.environment_path, (json.dumps(environment, indent=1, default=str) + "\n").encode())
    except OSError as error:
        raise RecordsError(
            f"{run.environment_path} cannot be written ({error.strerror}); "
            "free the disk or choose another folder with --out."
        ) from error
    return environment.get("id", "")


# ---------------------------------------------------------------------------------------------------- doctor

COMPILER = "NVRTC and CUDA headers"
"""The part that compiles kernels; a report tells of each kernel what the compiler made of it."""


@dataclass(frozen=True)
class Check:
    """One thing that `flashcore doctor` looked at."""

    name: str
    ok: bool
    detail: str
    fix: str = ""
    needed: bool = False
    """Whether even a machine without a GPU needs it."""


def checks() -> list[Check]:
    """What works on this machine, what is missing, and the command that mends it."""
    found = [
        Check("Python", sys.version_info >= (3, 11), platform.python_version(), "install Python 3.11 or newer", True)
    ]
    for package in ("torch", "papermill", "nbconvert", "ipykernel", "seaborn", "pandas", "pydantic"):
        there = importlib.util.find_spec(package) is not None
        detail = (_version_of(package) or "installed") if there else "not installed"
        found.append(Check(package, there, detail, "pip install flashcore", True))
    found.append(_check_compiler())
    found.append(_check_disassembler())
    name = gpu_name()
    detail = name or "no CUDA GPU is visible to torch; reports use recorded GPU evidence"
    found.append(Check("GPU", name is not None, detail, "run on an H100 or H200 with a CUDA build of torch"))
    if name:
        import torch

        extra = "gpu-cuda13" if (torch.version.cuda or "12").startswith("13") else "gpu"
        there = importlib.util.find_spec("cupy") is not None
        found.append(
            Check("CuPy", there, "installed" if there else "not installed", f"pip install 'flashcore[{extra}]'")
        )
        found.append(_check_cuda_agrees())
        capping = [r for r in clocks()["throttle_reasons"] or [] if r in CAPPING_REASONS]
        found.append(Check("Clocks", not capping, f"held down by {', '.join(capping)}" if capping else "not held down",
                           "wait until the GPU has cooled, or see who else uses it"))  # fmt: skip
    return found


def _check_compiler() -> Check:
    fix = "pip install 'flashcore[compile]'"
    try:
        from flashcore.gpu.build import header_dirs, nvrtc_version

        header_dirs()
        return Check(COMPILER, True, f"NVRTC {nvrtc_version()}", fix)
    except FlashCoreError as error:
        return Check(COMPILER, False, str(error), fix)


def _check_disassembler() -> Check:
    from flashcore.gpu.build import disassembler

    there = disassembler() is not None
    detail = "installed" if there else "not installed; builds are not audited for Tensor Core instructions"
    return Check("nvdisasm", there, detail, "pip install nvidia-cuda-nvdisasm")


def _check_cuda_agrees() -> Check:
    import torch

    from flashcore.gpu.build import nvrtc_version

    try:
        nvrtc = nvrtc_version()
    except ToolMissing as error:
        return Check("CUDA versions agree", False, str(error), "pip install 'flashcore[gpu]'")
    driver = _ask_nvml(lambda n, h: n.nvmlSystemGetCudaDriverVersion()) or 0
    same = nvrtc.split(".")[0] == (torch.version.cuda or "").split(".")[0] and driver // 1000 >= int(
        nvrtc.split(".")[0]
    )
    detail = f"torch CUDA {torch.version.cuda}, NVRTC {nvrtc}, driver CUDA {driver // 1000}.{driver % 1000 // 10}"
    extra = "gpu-cuda13" if driver // 1000 >= 13 else "gpu"
    return Check("CUDA versions agree", same, detail, f"pip install 'flashcore[{extra}]' into a fresh environment")
