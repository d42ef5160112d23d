"""Call any attention function one way, and say in one sentence how it breaks its promise when it does."""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from flashcore import backends
from flashcore.errors import BackendUnavailable, InvalidProblem, UnknownName, Unsupported
from flashcore.measure.check import device_of
from flashcore.numerics.outputs import poisoned_outputs
from flashcore.problem import Problem

Layout = Literal["bhsd", "bshd"]
Lse = Literal["none", "natural", "log2"]
CAUSAL_NAMES = ("causal", "is_causal")
SCALE_NAMES = ("softmax_scale", "scale", "sm_scale")
LSE_NAMES = ("return_lse", "return_softmax_lse")
LN_2 = math.log(2.0)
TIME_LIMIT_S = 20.0
"""Seconds that one call may take."""
_OPTIONS = {"causal": CAUSAL_NAMES, "softmax_scale": SCALE_NAMES, "return_lse": LSE_NAMES}


class Refusal(Exception):
    """The function raised on inputs of this kind; the text is its own, on one line."""


class Broken(Exception):
    """The function returned, and what it returned or left behind is no answer at all.

    Parameters
    ----------
    kind
        ``hang``, ``type``, ``shape``, ``dtype``, ``device``, ``lse``, ``inputs`` or ``state``.
    sentence
        What it did, as a sentence.
    """

    def __init__(self, kind: str, sentence: str):
        self.kind, self.sentence = kind, sentence
        super().__init__(kind, sentence)  # all of them, so that it can be sent to another process

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True)
class Answer:
    """What one call gave, in the layout ``[batch, num_heads, seqlen, head_dim]``."""

    out: torch.Tensor
    lse: torch.Tensor | None
    """Natural logarithm, ``[batch, num_heads_q, seqlen_q]``; None where the function gives none."""


@dataclass(frozen=True)
class Candidate:
    """An attention function under diagnosis: how it is called, and which of the options it takes."""

    name: str
    call: Callable[..., Any]
    """``call(q, k, v, problem, default_scale)`` with tensors as the function wants them; returns what it returns."""
    takes: frozenset[str]
    """Which of ``causal``, ``softmax_scale`` and ``return_lse`` it can be given."""
    layout: Layout = "bhsd"
    lse: Lse = "none"
    device: str = "cpu"
    default_scale: bool = False
    """Whether ``softmax_scale`` may be left out."""
    time_limit_s: float = TIME_LIMIT_S
    rounds_scores: bool = False
    """It stores its scores in 16 bits by design, and says so."""
    calls: list[float] = field(default_factory=list, compare=False)
    """Seconds of each call so far."""
    backend: backends.Backend | None = None
    """The backend that it stands for; None for a function."""
    forgiven: bool = False
    """Rows that see no key are nobody's business: whatever they hold is taken for 0, and for -inf in lse."""
    empty_rows: set[str] = field(default_factory=set, compare=False)
    """What they held where they are forgiven: ``NaN``, or ``numbers`` other than 0."""

    def __call__(self, q, k, v, problem: Problem, *, default_scale: bool = False) -> Answer:
        """Call it, and check that what comes back is an answer.

        Parameters
        ----------
        q, k, v
            ``[B, Hq, Sq, D]`` and twice ``[B, Hkv, Sk, D]``.
        default_scale
            Leave ``softmax_scale`` out, so that the function's own default counts.

        Raises
        ------
        Refusal
            It raised.
        Broken
            It hung, or gave no tensor of the right shape, dtype and device, or changed its inputs.
        """
        answer, changed = self.ask(q, k, v, problem, default_scale=default_scale)
        if changed:
            raise Broken("inputs", changed)
        return answer

    def ask(
        self, q, k, v, problem: Problem, *, default_scale: bool = False, as_given: bool = False
    ) -> tuple[Answer, str]:
        """The answer, and a sentence on the input that the call changed; empty for none.

        Parameters
        ----------
        as_given
            Hand over these very views, whatever their strides; otherwise a function of layout ``bshd`` gets contiguous
            copies.

        Raises
        ------
        Refusal, Broken
            As when it is called; a changed input is told, and does not raise.
        """
        passed = self.handed((q, k, v), as_given=as_given)
        kept = [t.clone() for t in passed]
        default_dtype = torch.get_default_dtype()
        started = time.perf_counter()
        try:
            with limited(self.time_limit_s), poisoned_outputs():
                result = self.call(*passed, problem, default_scale)
                wait(q.device, self.time_limit_s)
        except Broken:
            raise
        except Exception as error:
            said = " ".join(str(error).split())[:300].rstrip(".")  # it ends a sentence of ours, which has a full stop
            raise Refusal(f"{type(error).__name__}: {said or 'no message'}") from error
        finally:
            self.calls.append(time.perf_counter() - started)
            now_default = torch.get_default_dtype()
            torch.set_default_dtype(default_dtype)
        if now_default != default_dtype:
            raise Broken("state", f"It changes torch's default dtype, from {_word(default_dtype)} to "
                         f"{_word(now_default)}, and leaves it so.")  # fmt: skip
        answer = self.answer(result, q)
        if self.forgiven and problem.causal and problem.seqlen_q > problem.seqlen_k:
            answer = self._without_empty_rows(answer, problem.seqlen_q - problem.seqlen_k)
        same = torch.stack([_equal_bits(now, then) for now, then in zip(passed, kept, strict=True)]).tolist()
        for name, now, then, as_it_was in zip("qkv", passed, kept, same, strict=True):
            if not as_it_was:
                return answer, f"It changes its input {name}: {_changed(now, then)}."
        return answer, ""

    def _without_empty_rows(self, answer: Answer, rows: int) -> Answer:
        """The answer with 0, and -inf in lse, in its first rows; keeps in mind what they held."""
        out = answer.out.clone()
        if bool(out[:, :, :rows].isnan().any()):
            self.empty_rows.add("NaN")
        elif bool((out[:, :, :rows] != 0).any()):
            self.empty_rows.add("numbers")
        out[:, :, :rows] = 0.0
        lse = answer.lse
        if lse is not None:
            lse = lse.clone()
            lse[:, :, :rows] = -math.inf
        return Answer(out, lse)

    def handed(self, given: tuple[torch.Tensor, ...], *, as_given: bool = False) -> tuple[torch.Tensor, ...]:
        """The tensors in the layout that the function wants, as copies unless they are to stay `as_given`."""
        if self.layout == "bhsd":
            return given
        turned = (t.transpose(1, 2) for t in given)
        return tuple(turned if as_given else (t.contiguous() for t in turned))

    def answer(self, result: Any, q: torch.Tensor) -> Answer:
        """What the function returned for these queries as an `Answer`; `Broken` where it is none."""
        parts = list(result) if isinstance(result, (tuple, list)) else [result]
        out = parts[0] if parts else None
        if not isinstance(out, torch.Tensor):
            raise Broken("type", f"It returns {type(out).__name__} where a tensor is meant.")
        if out.device.type != q.device.type:
            raise Broken("device", f"Its output lies on {out.device} where {q.device} is meant.")
        if out.dtype != q.dtype:
            raise Broken("dtype", f"Its output has dtype {_word(out.dtype)} where {_word(q.dtype)} is meant.")
        shape = tuple(q.shape)
        wanted = shape if self.layout == "bhsd" else (shape[0], shape[2], shape[1], shape[3])
        if tuple(out.shape) != wanted:
            raise Broken("shape", f"Its output has shape {tuple(out.shape)} where {wanted} is meant.")
        if self.layout == "bshd":
            out = out.transpose(1, 2)
        if self.lse == "none":
            return Answer(out.detach(), None)
        lse = parts[1] if len(parts) > 1 else None
        if not isinstance(lse, torch.Tensor):
            raise Broken("lse", f"It returns no lse beside its output (lse='{self.lse}' says that it does).")
        rows = shape[:3]
        if lse.dim() == 4 and lse.shape[-1] == 1:
            lse = lse[..., 0]
        if tuple(lse.shape) == (rows[0], rows[2], rows[1]) != tuple(rows):
            lse = lse.transpose(1, 2)
        if tuple(lse.shape) != tuple(rows):
            raise Broken("lse", f"Its lse has shape {tuple(lse.shape)} where {tuple(rows)} is meant.")
        if lse.device.type != q.device.type:
            raise Broken("lse", f"Its lse lies on {lse.device} where {q.device} is meant.")
        lse = lse.detach().double()
        return Answer(out.detach(), lse * LN_2 if self.lse == "log2" else lse)


def candidate_of(
    function: Callable | str | backends.Backend, *, layout: Layout = "bhsd", lse: Lse | None = None,
    device: str | None = None, time_limit_s: float = TIME_LIMIT_S,
) -> Candidate:  # fmt: skip
    """The candidate that a function, the id of a backend, a `Backend` or ``FILE.py:function`` stands for.

    Raises
    ------
    InvalidProblem
        The function needs arguments that nobody here knows, or is none; a layout, lse or device that does not exist.
    UnknownName
        No such backend, file, module or function.
    """
    for what, value, known in (("layout", layout, get_args(Layout)), ("lse", lse or "none", get_args(Lse))):
        if value not in known:
            raise UnknownName(what, str(value), list(known))
    refuse_limit(time_limit_s)
    if isinstance(function, str):
        function = load(function) if ":" in function else backends.get(function)
    if isinstance(function, backends.Backend):
        if layout != "bhsd":
            raise InvalidProblem(f"layout: backend '{function.id}' takes tensors as 'bhsd'; leave layout out.")
        if lse is not None:
            raise InvalidProblem(f"lse: backend '{function.id}' says itself what it returns; leave lse out.")
        return _of_backend(function, device and _device(device), time_limit_s)
    if not callable(function):
        raise InvalidProblem(f"diagnose takes a function, a backend or its id; {type(function).__name__} is none.")
    return _of_function(function, layout, lse or "none", _device(device), time_limit_s)


def refuse_limit(time_limit_s: float) -> None:
    """Raise `InvalidProblem` for what is no time that a call may take."""
    if not (isinstance(time_limit_s, (int, float)) and math.isfinite(time_limit_s) and time_limit_s > 0):
        raise InvalidProblem(f"time_limit_s: {time_limit_s!r} is no number of seconds above 0.")


def refuse_masks(problem: Problem) -> None:
    """Raise `InvalidProblem` for a problem with masks besides `causal`: a function is not told of them here."""
    if problem.masks:
        raise InvalidProblem(
            f"problem: {problem.label()} has masks ({', '.join(problem.masks)}), and a function is asked about causal "
            "and softmax_scale alone; bisect a backend, or check it, to ask about masks."
        )


def _device(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise UnknownName("device", str(device), ["cpu", "cuda"])
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InvalidProblem("device: torch finds no GPU here; leave device out, or give 'cpu'.")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise InvalidProblem(f"device: '{device}' is none of the {torch.cuda.device_count()} GPUs that torch finds.")
    return device


def _of_backend(backend: backends.Backend, device: str | None, time_limit_s: float) -> Candidate:
    state = backend.availability()
    if not state.ok:
        raise BackendUnavailable(backend.id, state.reason, state.fix)

    def call(q, k, v, problem, default_scale):
        reason = backend.why_not(problem)
        if reason:
            raise Unsupported(backend.id, reason)
        out, lse = backend.run(q, k, v, problem)
        return out if lse is None else (out, lse)

    place = device or device_of(backend)
    kind = torch.device(place).type
    if backend.device not in ("any", kind):
        raise InvalidProblem(f"device: backend '{backend.id}' takes tensors on '{backend.device}'; leave device out.")
    gives_lse = backend.role != "peer" or _peer_gives_lse(backend, place)
    return Candidate(backend.id, call, frozenset(_OPTIONS), lse="natural" if gives_lse else "none", device=place,
                     default_scale=True, time_limit_s=time_limit_s,
                     rounds_scores=backend.rounds_scores, backend=backend)  # fmt: skip


def _peer_gives_lse(backend: backends.Backend, device: str) -> bool:
    from flashcore.problem import square

    problem = backend.suits(square(1, 1, 64, 64))
    q = torch.zeros(1, problem.num_heads_q, problem.seqlen_q, problem.head_dim,
                    dtype=getattr(torch, problem.dtype), device=device)  # fmt: skip
    try:
        return backend.run(q, q, q, problem)[1] is not None
    except Exception:  # what it cannot do is found out, and said, when it is diagnosed
        return False


def _of_function(function: Callable, layout: Layout, lse: Lse, device: str, time_limit_s: float) -> Candidate:
    name = getattr(function, "__qualname__", None) or type(function).__name__
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a built-in function says nothing of its parameters: it gets q, k and v
        parameters = None
    names: dict[str, str] = {}
    default_scale = True
    if parameters is not None:
        kinds = inspect.Parameter
        positional = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
        everything = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
        if len(positional) < 3 and not any(p.kind is kinds.VAR_POSITIONAL for p in parameters):
            raise InvalidProblem(
                f"{name} takes {len(positional)} positional arguments; it has to take q, k and v first."
            )
        rest = [p for p in parameters if p not in positional[:3]]
        by_keyword = {p.name: p for p in rest if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)}
        for option, known in _OPTIONS.items():
            found = next((n for n in known if n in by_keyword), known[0] if everything else None)
            if found:
                names[option] = found
        for parameter in by_keyword.values():
            if parameter.default is kinds.empty and parameter.name not in names.values():
                raise InvalidProblem(
                    f"{name} needs '{parameter.name}', which diagnose does not know; wrap it, as in "
                    f"lambda q, k, v: {name}(q, k, v, {parameter.name}=...)."
                )
        scale = by_keyword.get(names.get("softmax_scale", ""))
        default_scale = scale is None or scale.default is not kinds.empty
    if lse == "none":
        names.pop("return_lse", None)

    def call(q, k, v, problem, default):
        options: dict[str, Any] = {}
        if "causal" in names:
            options[names["causal"]] = problem.causal
        if "softmax_scale" in names and not (default and default_scale):
            options[names["softmax_scale"]] = problem.scale
        if "return_lse" in names:
            options[names["return_lse"]] = True
        return function(q, k, v, **options)

    return Candidate(name, call, frozenset(names), layout, lse, device, default_scale, time_limit_s)


def load(place: str) -> Callable:
    """The function that ``FILE.py:function`` or ``MODULE:function`` names; ``function`` may be dotted.

    Raises
    ------
    UnknownName
        No such file, module or function.
    InvalidProblem
        The file or module cannot be imported; the sentence has its own reason.
    """
    where, _, attribute = place.rpartition(":")
    if not where or not attribute:
        raise InvalidProblem(f"'{place}' is not FILE.py:function or MODULE:function.")
    try:
        with _loading:
            module = _module(where)
    except (UnknownName, InvalidProblem):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise InvalidProblem(f"'{where}' cannot be imported: {type(error).__name__}: {text}.") from error
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise UnknownName(f"function in {where}", attribute, sorted(known))
        found = getattr(found, part)
    return found


def _module(where: str) -> Any:
    if not where.endswith(".py"):
        if importlib.util.find_spec(where.partition(".")[0]) is None:
            raise UnknownName("module", where, ["the name of an installed module", "a path that ends in .py"])
        return importlib.import_module(where)
    path = Path(where).expanduser().resolve()
    if not path.is_file():
        raise UnknownName("file", where, ["the path of a Python file that exists"])
    name = f"_diagnosed_{path.stem}"
    for beside in _BESIDE.pop(path, ()):
        sys.modules.pop(beside, None)  # what lies beside the file may have been edited too
    for beside in set().union(*_BESIDE.values()):
        top = path.parent / beside.partition(".")[0]
        if top.with_suffix(".py").is_file() or top.is_dir():
            sys.modules.pop(beside, None)  # of another file's folder, and this one has one of that name too
    importlib.invalidate_caches()
    spec = importlib.util.spec_from_file_location(name, path, loader=_Anew(name, str(path)))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))  # what lies beside the file can be imported, as when it is run
    before = set(sys.modules)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
        _BESIDE[path] = {new for new in set(sys.modules) - before if _lies_in(new, path.parent)}
    return module


_loading = threading.RLock()
"""Held while a file is imported: the folders that Python looks in, and what it has imported, are the process's."""
_BESIDE: dict[Path, set[str]] = {}
"""By file, the modules in its folder that it imported: they are imported again when the file is."""


def _lies_in(name: str, folder: Path) -> bool:
    file = getattr(sys.modules.get(name), "__file__", None)
    return file is not None and Path(file).resolve().parent == folder


class _Anew(importlib.machinery.SourceFileLoader):
    """Compile a file from its text each time: kept bytecode counts seconds, and an edit may take less."""

    def get_code(self, fullname: str):
        return self.source_to_code(self.get_data(self.path), self.path)


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `Broken` in the main thread once the body takes longer; elsewhere the body runs without a limit.

    It ends what Python can interrupt. A library call that never returns needs a process of its own.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def late(*_: object) -> None:
        raise Broken("hang", f"It did not return within {seconds:g} s.")

    before = signal.signal(signal.SIGALRM, late)
    rest, again = signal.setitimer(signal.ITIMER_REAL, seconds)
    started = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if rest:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, rest - (time.monotonic() - started)), again)


def wait(device: torch.device, seconds: float) -> None:
    """Wait until the GPU is done, without blocking in the driver, so that a kernel that hangs is seen."""
    if device.type != "cuda":
        return
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    until = time.monotonic() + seconds
    while not done.query():
        if time.monotonic() > until:
            raise Broken("hang", f"Its kernel did not end within {seconds:g} s; start a new process to use the GPU.")
        time.sleep(20e-6)


def same_bits(now: torch.Tensor, then: torch.Tensor) -> bool:
    """Whether two tensors of one dtype hold the same bits, NaN included."""
    return bool(_equal_bits(now, then))


def _equal_bits(now: torch.Tensor, then: torch.Tensor) -> torch.Tensor:
    """The same as a tensor on their device, which need not be waited for yet."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[now.element_size()]
    return (now.view(kind) == then.view(kind)).all()


def _changed(now: torch.Tensor, then: torch.Tensor) -> str:
    different = ~((now == then) | (now.isnan() & then.isnan()))
    return f"{int(different.sum())} of {now.numel()} elements are others after the call"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
