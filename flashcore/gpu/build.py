"""Compile the CUDA kernels to cubins with NVRTC, cache them, and audit what the compiler made of them.

Needs neither a GPU nor a CUDA toolkit: NVRTC, the CUDA headers and the disassembler come as Python wheels.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flashcore.errors import CompileError, FlashCoreError, RecordsError, ToolMissing, UnknownName
from flashcore.gpu.cache import cache_dir, read_private, write_private
from flashcore.gpu.options import INVARIANT, OPTIONS, WITH_OPTIONS, without_options
from flashcore.paths import data_dir, folder_in, plugin_folders
from flashcore.records import SETTLED_NS, Trial

ARCH = "sm_90a"
HEAD_DIMS = (64, 128)
DTYPES = ("float16", "bfloat16")
AUDITED = ("HMMA", "HGMMA", "UTMALDG", "UTMASTG", "LDSM", "LDL", "STL")
"""SASS instructions counted in every cubin: Tensor Core products (per warp, per warpgroup), tensor copies, matrix
loads, and local-memory traffic, which is what a spill looks like."""
TENSOR_CORE = ("HMMA", "HGMMA")


@dataclass(frozen=True)
class Cubin:
    """One compiled variant of one kernel, and what the compiler and the disassembler say of it."""

    path: Path
    kernel: str
    registers: int
    """The most registers a thread of any entry function takes."""
    spill_bytes: int
    """Bytes of spill stores and loads over all entry functions."""
    shared_bytes: int
    """Static shared memory of the largest entry function; what a launch asks for comes on top."""
    warnings: list[str]
    compile_seconds: float
    cached: bool
    source_hash: str
    nvrtc_version: str

    @property
    def sass(self) -> dict[str, int] | None:
        """How often each of `AUDITED` stands in the SASS; None where no disassembler is installed.

        Counted when it is first asked for, and kept beside the cubin: a launch does not ask, and would wait for the
        disassembler as long as for the compiler.
        """
        return _kept_counts(self.path)

    @property
    def tensor_instructions(self) -> dict[str, int] | None:
        """The Tensor Core instructions in the SASS, by name."""
        counts = self.sass
        return None if counts is None else {name: n for name, n in counts.items() if name in TENSOR_CORE and n}


# ---------------------------------------------------------------------------------------------------- sources


def kernels_dir() -> Path:
    """Where the project's own `.cu` files lie."""
    return data_dir("kernels")


def _kernel_folders() -> list[Path]:
    return [kernels_dir(), *plugin_folders()]


def kernel_path(kernel: str) -> Path:
    """The `.cu` file of a kernel; `UnknownName` if there is none."""
    for folder in _kernel_folders():
        if (path := folder / f"{kernel}.cu").is_file():
            return path
    raise UnknownName("kernel", kernel, kernel_names())


def kernel_names() -> list[str]:
    """Every kernel: the stems of the `.cu` files in `kernels/` and in the FLASHCORE_PLUGINS folders."""
    return [path.stem for folder in _kernel_folders() for path in sorted(folder.glob("*.cu"))]


def kernel_named(name: str) -> str:
    """The kernel that a user means by its stem, or by its stem without `attention_`; `UnknownName` if there is none."""
    known = kernel_names()
    for stem in (name, f"attention_{name}"):
        if stem in known:
            return stem
    raise UnknownName("kernel", name, known)


_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"')


def kernel_source(kernel: str) -> str:
    """A kernel with its own headers in place of their `#include` lines, each once; CUDA's headers stay to be included.

    One text to hash, to compile and to plant a fault in; `#line` keeps the compiler's messages at file and line. A file
    that was edited since is read again.
    """
    return _snapshot(kernel).text


def source_version(kernel: str) -> str:
    """A name for a kernel's text, comments and all: part of the key of whatever is kept of the kernel.

    Costs a fraction of a microsecond: the files are looked at again `LOOK_EVERY_S` after the last look.
    """
    found = _snapshots.get(kernel)
    recent = found is not None and time.monotonic() - found.looked < LOOK_EVERY_S
    return (found if recent else _snapshot(kernel)).version


LOOK_EVERY_S = 0.05
"""How long a repeated call of a kernel takes its files to be as they were: it must not wait for the disk each time."""


@dataclass
class _Snapshot:
    """A kernel's text, and the state of the files that it was read from."""

    text: str
    version: str
    hash: str
    hash_with_options: str
    files: tuple[tuple[Path, int, int], ...]
    """Path, time of change in ns and size of each; the kernel's own file first."""
    looked: float
    """When the files were last looked at, by `time.monotonic`."""
    settled: bool
    """Whether all of them had been changed long enough before they were read: else they might change again without a
    new time, since file systems count time in steps of some milliseconds."""


_snapshots: dict[str, _Snapshot] = {}


def _snapshot(kernel: str) -> _Snapshot:
    """The kernel's text as it is on disk now."""
    path, now = kernel_path(kernel), time.monotonic()
    found = _snapshots.get(kernel)
    same = found is not None and found.files[0][0] == path
    if same and found.settled and found.files == _states([file for file, *_ in found.files]):
        found.looked = now
        return found
    began = time.time_ns()
    while True:  # until no file was edited while they were read
        paths: list[Path] = []
        _joined(path, paths)
        files = _states(paths)
        text = _joined(path, [])
        if _states(paths) == files:
            break
    settled = all(began - changed > SETTLED_NS for _, changed, _ in files)
    if same and found.text == text:
        made = replace(found, files=files, looked=now, settled=settled)
    else:
        version = hashlib.sha256(text.encode()).hexdigest()[:16]
        made = _Snapshot(text, version, _hash_of(without_options(text)), _hash_of(text), files, now, settled)
    _snapshots[kernel] = made
    return made


def _states(files: Sequence[Path]) -> tuple[tuple[Path, int, int], ...]:
    states = []
    for path in files:
        try:
            state = path.stat()
            states.append((path, state.st_mtime_ns, state.st_size))
        except OSError:
            states.append((path, -1, -1))
    return tuple(states)


def _joined(kernel: Path, read: list[Path]) -> str:
    """The text of a kernel's file with its own headers in it; `read` gets every file that it is made of."""
    seen: set[Path] = set()

    def lines_of(path: Path) -> Iterator[str]:
        seen.add(path.resolve())
        read.append(path)
        yield f'#line 1 "{path.name}"'
        for number, line in enumerate(_lines(path), start=1):
            found = _INCLUDE.match(line)
            header = found and _own_header(path, found[1])
            if header is None:
                yield "" if line.strip() == "#pragma once" else line
                continue
            if header.resolve() not in seen:
                yield from lines_of(header)
            yield f'#line {number + 1} "{path.name}"'

    return "\n".join(lines_of(kernel)) + "\n"


def _lines(path: Path) -> list[str]:
    """A source's lines as the compiler counts them: they end at a line feed and at no other separator of Unicode."""
    return _text(path).removesuffix("\n").split("\n")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FlashCoreError(
            f"The kernel source {path} cannot be read ({getattr(error, 'strerror', None) or 'it is not UTF-8 text'}); "
            "mend the file or take it out of its folder."
        ) from error


def _own_header(including: Path, name: str) -> Path | None:
    folders = (including.parent, including.parent / "include", kernels_dir() / "include")
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _hash_of(text: str) -> str:
    return hashlib.sha256(_bare(text).encode()).hexdigest()[:16]


_TOKENS = re.compile(r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|//[^\n]*|/\*.*?\*/', flags=re.DOTALL)


def _bare(text: str) -> str:
    """A source without comments and white space; string literals stay as they are."""
    without = _TOKENS.sub(lambda m: " " if m[0].startswith(("//", "/*")) else m[0], text)
    without = re.sub(r"^#line .*$", "", without, flags=re.MULTILINE)
    return re.sub(r"\s+", "", without)


def source_hash(kernel: str, *, options: bool = False) -> str:
    """16 hex digits over the kernel and its headers, without comments and white space: names what a record measured.

    With `options` of all of it, otherwise of what is left `without_options`.
    """
    snapshot = _snapshot(kernel)
    return snapshot.hash_with_options if options else snapshot.hash


def variant_hash(kernel: str, macros: Collection[str]) -> str:
    """`source_hash` of what is compiled with these macros: of all of it where one of `OPTIONS` is among them."""
    return source_hash(kernel, options=any(option in macros for option in OPTIONS))


def source_hashes() -> dict[str, str]:
    """`source_hash` of every kernel; of one that has options also the hash with them, as ``<kernel> with options``."""
    hashes = {kernel: source_hash(kernel) for kernel in kernel_names()}
    whole = {
        kernel + WITH_OPTIONS: source_hash(kernel, options=True) for kernel in kernel_names() if has_options(kernel)
    }
    return hashes | whole


def has_options(kernel: str) -> bool:
    """Whether the kernel can be compiled with masks beyond the causal one, or batch-invariant."""
    return any(macro in _text(kernel_path(kernel)) for macro in OPTIONS)


def variants(kernel: str) -> list[tuple[int, str]]:
    """(head_dim, dtype) pairs a kernel is built for, from the `Variants:` line of its header; all by default."""
    text = _text(kernel_path(kernel))
    line = re.search(r"^//\s*Variants:(.*)$", text, flags=re.MULTILINE)
    head_dims, dtypes = HEAD_DIMS, DTYPES
    if line:
        head_dims = tuple(int(d) for d in re.findall(r"\b\d+\b", line[1].split("dtype")[0])) or HEAD_DIMS
        dtypes = tuple(d for d in DTYPES if d in line[1]) or DTYPES
    return [(head_dim, dtype) for head_dim in head_dims for dtype in dtypes]


# ---------------------------------------------------------------------------------------------------- tools


def _wheel_folders(*parts: str) -> list[Path]:
    """Folders of that name in the installed `nvidia` wheels (CUDA 13: `nvidia/cu13`; CUDA 12: one folder a part)."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(p) for p in spec.submodule_search_locations] if spec else []
    return [p for root in roots for p in sorted(root.glob("/".join(("*", *parts)))) if p.exists()]


def _toolkit_folders(*parts: str) -> list[Path]:
    homes = [folder_in("CUDA_HOME"), folder_in("CUDA_PATH"), Path("/usr/local/cuda")]
    return [p for folder in homes if folder and (p := folder.joinpath(*parts)).exists()]


def _cudart_version(folder: Path) -> tuple[int, int] | None:
    header = folder / "cuda_runtime_api.h"
    found = (
        re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header.read_text(errors="replace")) if header.is_file() else None
    )
    return (int(found[1]) // 1000, int(found[1]) % 1000 // 10) if found else None


_importing = threading.Lock()
"""Held while the packages `cuda` are imported: of several threads that import them first at once, all but one fail."""
os.register_at_fork(after_in_child=_importing._at_fork_reinit)  # the thread that holds it is not in a child


@functools.cache
def nvrtc_version() -> str:
    """The NVRTC that compiles here, as `major.minor`.

    Raises
    ------
    ToolMissing
        No NVRTC is installed.
    """
    try:
        with _importing:
            from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
        if int(status) == 0:
            return f"{major}.{minor}"
    except Exception:  # the bindings raise their own kinds of error when the library is not there
        pass
    raise ToolMissing("NVRTC", "pip install 'flashcore[compile]' (or the extra gpu or gpu-cuda13 on a GPU machine)")


@functools.cache
def header_dirs() -> tuple[Path, ...]:
    """CUDA header folders of the same major version as NVRTC: wheels first, then a toolkit on the machine.

    Raises
    ------
    ToolMissing
        No folder with matching headers was found.
    """
    major = int(nvrtc_version().split(".")[0])
    for folders in (_wheel_folders("include"), _toolkit_folders("include")):
        versions = [version[0] for f in folders if (version := _cudart_version(f))]
        # The wheel with mma.h does not bring crt/mma.h, which it includes: that one has a wheel of its own.
        complete = all(any((f / name).is_file() for f in folders) for name in ("cuda_fp16.h", "mma.h", "crt/mma.h"))
        if complete and major in versions:
            return tuple(folders)
    raise ToolMissing(
        f"A set of CUDA {major} headers (cuda_fp16.h, mma.h)", "pip install 'flashcore[compile]', or set CUDA_HOME"
    )


@functools.cache
def disassembler() -> str | None:
    """Path of `nvdisasm`, from its wheel or the machine's toolkit; None when there is none."""
    folders = [*_wheel_folders("bin"), *_toolkit_folders("bin")]
    return next((str(f / "nvdisasm") for f in folders if (f / "nvdisasm").is_file()), shutil.which("nvdisasm"))


# ---------------------------------------------------------------------------------------------------- compiling


def compile_kernel(
    kernel: str,
    *,
    head_dim: int,
    dtype: str,
    trace: bool = False,
    defines: dict[str, str | int] | None = None,
    source: str | None = None,
) -> Cubin:
    """Compile one variant of a kernel to an `sm_90a` cubin, or take it from the cache.

    Parameters
    ----------
    kernel
        Stem of a `.cu` file.
    head_dim, dtype
        The variant; become FLASHCORE_HEAD_DIM and FLASHCORE_BF16.
    trace
        Compile the second version, which stores its stages (FLASHCORE_TRACE).
    defines
        Further macros, for a kernel that has tile shapes to choose.
    source
        Text to compile in place of `kernel_source(kernel)`: that text with a fault planted in it.

    Raises
    ------
    CompileError
        With NVRTC's log, which names file and line of the kernel source.
    ToolMissing
        No NVRTC or no CUDA headers.
    """
    path = kernel_path(kernel)
    macros = {"FLASHCORE_HEAD_DIM": head_dim, "FLASHCORE_BF16": int(dtype == "bfloat16"), **(defines or {})}
    if trace:
        macros["FLASHCORE_TRACE"] = 1
    text = kernel_source(kernel) if source is None else source

    return _built(kernel, path, text, macros, variant_hash(kernel, macros))


def compile_text(name: str, text: str) -> Cubin:
    """Compile a kernel that has no file, or take it from the cache; `name` is what messages call it.

    Raises
    ------
    CompileError, ToolMissing
        As `compile_kernel`.
    """
    return _built(name, Path(f"{name}.cu"), text, {}, _hash_of(text))


def _built(name: str, path: Path, text: str, macros: dict[str, str | int], hashed: str) -> Cubin:
    digest = hashlib.sha256()
    tools = (ARCH, "lineinfo", nvrtc_version(), [str(f) for f in header_dirs()])
    digest.update(repr((tools, sorted(macros.items()), text)).encode())
    entry = cache_dir() / f"{name}-{digest.hexdigest()[:24]}.cubin"
    if (found := _read_entry(entry)) is not None:
        return found
    with _turn(entry):
        return _read_entry(entry) or _build(name, path, text, macros, hashed, entry)


_turns: dict[Path, threading.Lock] = {}
"""By cache entry, held while it is built: threads that want the same one meanwhile find it, and compile nothing."""


@contextlib.contextmanager
def _turn(entry: Path) -> Iterator[None]:
    with _turns.setdefault(entry, threading.Lock()):
        try:
            yield
        finally:
            _turns.pop(entry, None)  # whoever comes from now on finds the entry, or builds it anew


def _build(name: str, path: Path, text: str, macros: dict[str, str | int], hashed: str, entry: Path) -> Cubin:
    started = time.perf_counter()
    code, log = _nvrtc(path, text, macros)
    seconds = time.perf_counter() - started
    facts = {
        "kernel": name,
        **_read_ptxas_log(log),
        "compile_seconds": round(seconds, 3),
        "source_hash": hashed,
        "nvrtc_version": nvrtc_version(),
    }
    try:
        write_private(entry, code)
        facts["sha256"] = hashlib.sha256(code).hexdigest()
        write_private(entry.with_suffix(".json"), json.dumps(facts).encode())
    except OSError as error:
        raise RecordsError(
            f"The kernel cache {entry.parent} cannot be written ({error.strerror}); "
            "set FLASHCORE_CACHE to a folder that can."
        ) from error
    facts.pop("sha256")
    return Cubin(path=entry, cached=False, **facts)


def _read_entry(entry: Path) -> Cubin | None:
    """A whole cache entry, or None when it is missing or damaged in any way: then it is simply built again.

    So is one that somebody else owns or may write.
    """
    try:
        facts = json.loads(read_private(entry.with_suffix(".json")))
        if facts.pop("sha256") != hashlib.sha256(read_private(entry)).hexdigest():
            return None
        return Cubin(path=entry, cached=True, **facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _nvrtc(path: Path, text: str, macros: dict[str, str | int]) -> tuple[bytes, str]:
    with _importing:
        from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        name=path.name,
        arch=ARCH,
        std="c++17",
        include_path=[str(f) for f in header_dirs()],
        define_macro=[(name, str(value)) for name, value in macros.items()] or None,
        fma=INVARIANT not in macros,
        ptxas_options=["-v"],
        lineinfo=True,  # file and line for compute-sanitizer; the instructions stay the same
    )
    log = io.StringIO()
    try:
        program = Program(text, "c++", options)
        code = program.compile("cubin", logs=log).code
    except Exception as error:  # NVRTCError, or a plain RuntimeError from older cuda.core
        raise CompileError(path.stem, (log.getvalue() or str(error)).strip("\0 \n")) from None
    return bytes(code), log.getvalue()


def _read_ptxas_log(log: str) -> dict:
    """Registers, spills and static shared memory from `ptxas -v`, and every line that warns."""
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", log)]
    warnings = [line.strip() for line in log.splitlines() if re.search(r"warning|C75\d\d|serializ", line)]
    return {
        "registers": max(registers, default=0),
        "spill_bytes": sum(spills),
        "shared_bytes": max(shared, default=0),
        "warnings": warnings,
    }


def _kept_counts(cubin: Path) -> dict[str, int] | None:
    """`count_sass` of a cubin in the cache, from the file beside it where that is of this very cubin."""
    kept, digest = cubin.with_suffix(".sass"), hashlib.sha256(cubin.read_bytes()).hexdigest()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        facts = json.loads(read_private(kept))
        if facts.get("sha256") == digest and facts.get("sass", {}).keys() == set(AUDITED):
            return facts["sass"]
    counts = count_sass(cubin)
    if counts is not None:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs the next reader the same time again
            write_private(kept, json.dumps({"sha256": digest, "sass": counts}).encode())
    return counts


def count_sass(cubin: Path) -> dict[str, int] | None:
    """How often each of `AUDITED` stands in a cubin's SASS; None where no disassembler is installed."""
    text = disassemble(cubin)
    if text is None:
        return None
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", text)
    return {name: opcodes.count(name) for name in AUDITED}


def disassemble(cubin: Path) -> str | None:
    """A cubin's SASS as text; None where no disassembler is installed."""
    tool = disassembler()
    if tool is None:
        return None
    # Without its analysis of where threads branch, which takes a quarter of the time: it names targets of jumps that
    # Hopper's code has by name anyway.
    done = subprocess.run([tool, "-ndf", str(cubin)], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def build_all(progress: Callable[[str], None] | None = None, *, kernels: Sequence[str] | None = None) -> list[Trial]:
    """Compile every variant of the kernels, with and without its trace; one `build` trial each.

    A kernel that does not compile is a trial with status `error` and the compiler's log as reason.

    Parameters
    ----------
    progress
        Told the name of each variant that had to be compiled, not of those found in the cache.
    kernels
        Kernels to build, by stem or without its `attention_`; all of them by default.

    Raises
    ------
    UnknownName
        There is no kernel of a name in `kernels`; nothing was compiled.
    ToolMissing
        No NVRTC or no CUDA headers.
    """
    wanted = [
        (kernel, head_dim, dtype, trace)
        for kernel in (kernel_names() if kernels is None else dict.fromkeys(map(kernel_named, kernels)))
        for head_dim, dtype in variants(kernel)
        for trace in (False, True)
    ]
    # NVRTC lets other threads run while it compiles.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        trials = []
        for done, trial in enumerate(pool.map(lambda variant: _build_trial(*variant), wanted)):
            if progress and not trial.data.get("cached"):
                kernel, head_dim, dtype, trace = wanted[done]
                progress(f"{kernel} D={head_dim} {dtype}{' trace' if trace else ''}")
            trials.append(trial)
    return trials


def _build_trial(kernel: str, head_dim: int, dtype: str, trace: bool) -> Trial:
    variant = {"kernel": kernel, "head_dim": head_dim, "dtype": dtype, "trace": trace, "arch": ARCH}
    try:
        cubin = compile_kernel(kernel, head_dim=head_dim, dtype=dtype, trace=trace)
    except CompileError as error:
        return Trial(kind="build", status="error", reason=str(error), data=variant, source_hash=source_hash(kernel))
    facts = asdict(cubin)
    facts.pop("path")
    facts |= {"sass": cubin.sass, "tensor_instructions": cubin.tensor_instructions}
    return Trial(kind="build", data={**variant, **facts}, source_hash=cubin.source_hash)
