"""Run one notebook by papermill, strictly: parameters are checked, and only its own final record says it finished."""

from __future__ import annotations

import ast
import contextlib
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flashcore.errors import FlashCoreError, NotebookFailed, NotebookParameterError, UnknownName
from flashcore.gpu.cache import keeping_kernels
from flashcore.paths import HOME, absolute, absolute_variables, partial_path, set_home, sweep
from flashcore.records import RunFolder, Trial

if TYPE_CHECKING:
    from nbformat import NotebookNode

FOLDER = "notebooks"
"""Where a run keeps its executed notebooks."""
OUTPUT_S = 30
"""Seconds that the output of a cell may take to arrive after the cell has ended; what is later is left out."""
TIMEOUT_S = {"quick": 600.0, "full": 1800.0}
"""Seconds one notebook may take, by profile; past that its kernel is ended."""


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's parameters cell."""

    name: str
    annotation: str
    """The type as written, for messages."""
    type: Any
    """What a value is checked against; `typing.Any` where neither an annotation nor a plain default says."""


def notebook_path(name: str, notebooks_dir: Path) -> Path:
    """The file of a notebook by its stem; `UnknownName` if there is none."""
    path = absolute(notebooks_dir) / f"{name}.ipynb"
    if not path.is_file():
        raise UnknownName("notebook", name, sorted(p.stem for p in notebooks_dir.glob("*.ipynb")))
    return path


def load_nbformat() -> ModuleType:
    """The module nbformat, without the grammars of IRIs that jsonschema builds when it is imported.

    They take a second, and no notebook has an IRI to check; jsonschema does without them where their package is not
    installed. Whatever imports nbformat by itself, as papermill and nbconvert do, calls this first.
    """
    grammars = "rfc3987_syntax"
    hidden = "nbformat" not in sys.modules and grammars not in sys.modules
    if hidden:
        sys.modules[grammars] = None  # type: ignore[assignment]  # to import it is now an ImportError
    try:
        import nbformat
    finally:
        if hidden:
            sys.modules.pop(grammars, None)  # another thread may have been here too
    return nbformat


def read_notebook(path: Path) -> NotebookNode:
    """A notebook's file.

    Raises
    ------
    NotebookFailed
        The file is damaged, or no notebook at all.
    """
    nbformat = load_nbformat()
    try:
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            cell.cell_type, cell.source, cell.metadata  # noqa: B018 - what everybody here asks of a cell
        return notebook
    except Exception as error:  # nbformat raises whatever its parts do: on half a file, a list, bytes that are no text
        raise NotebookFailed(path.stem, f"its file {path} is damaged ({_one_line(error)})") from error


def declared_parameters(path: Path) -> dict[str, Parameter]:
    """The parameters a notebook declares: the assignments of its cell tagged `parameters`, by name.

    The type is the annotation's; without one, that of the default.

    Raises
    ------
    NotebookParameterError
        The cell is not plain Python, or an annotation is not made of builtin types.
    NotebookFailed
        The file is damaged.
    """
    notebook = read_notebook(path)
    declared: dict[str, Parameter] = {}
    for cell in notebook.cells:
        if cell.cell_type != "code" or "parameters" not in cell.metadata.get("tags", []):
            continue
        try:
            statements = ast.parse(cell.source).body
        except SyntaxError as error:
            raise NotebookParameterError(
                f"The parameters cell of {path.name} is not Python (line {error.lineno}: {error.msg})."
            ) from None
        for statement in statements:
            parameter = _parameter(statement, path)
            if parameter:
                declared[parameter.name] = parameter
    return declared


def _parameter(statement: ast.stmt, path: Path) -> Parameter | None:
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        written = ast.unparse(statement.annotation)
        return Parameter(statement.target.id, written, _type_of_annotation(statement.annotation, written, path))
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
        try:
            default = ast.literal_eval(statement.value)
        except ValueError:
            default = None
        kind = Any if default is None else type(default)
        return Parameter(statement.targets[0].id, "any type" if kind is Any else kind.__name__, kind)
    return None


def _type_of_annotation(node: ast.expr, written: str, path: Path) -> Any:
    builtin = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict, "tuple": tuple}
    if isinstance(node, ast.Name) and node.id in builtin:
        return builtin[node.id]
    if isinstance(node, ast.Constant) and node.value is None:
        return None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _type_of_annotation(node.left, written, path) | _type_of_annotation(node.right, written, path)
    if isinstance(node, ast.Subscript):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        arguments = tuple(_type_of_annotation(part, written, path) for part in inner)
        return _type_of_annotation(node.value, written, path)[arguments]
    raise NotebookParameterError(
        f"The parameters cell of {path.name} has the type '{written}', which cannot be checked; use str, int, float, "
        "bool, list, dict, tuple and None."
    )


def check_parameters(path: Path, parameters: Mapping[str, Any]) -> None:
    """Refuse a parameter the notebook does not declare, and a value that is not of the declared type.

    papermill itself only warns about the first and injects the second as it comes, so a list given as the text
    ``'[1, 2]'`` would silently arrive as a string.

    Raises
    ------
    NotebookParameterError
        Names the parameter, and the known ones or the type wanted.
    """
    from pydantic import TypeAdapter, ValidationError

    declared = declared_parameters(path)
    for name, value in parameters.items():
        if name not in declared:
            raise NotebookParameterError(
                f"Notebook {path.stem} has no parameter '{name}'; it has: {', '.join(declared) or '(none)'}."
            )
        try:
            TypeAdapter(declared[name].type).validate_python(value, strict=True)
        except ValidationError:
            raise NotebookParameterError(
                f"Parameter '{name}' of notebook {path.stem} has to be {declared[name].annotation}, "
                f"and {value!r} is {type(value).__name__}."
            ) from None


def execute_notebook(
    name: str,
    run: RunFolder,
    parameters: Mapping[str, Any] | None = None,
    *,
    notebooks_dir: Path,
    timeout_s: float = TIMEOUT_S["quick"],
    needs_record: bool = True,
    show_bar: bool = False,
) -> Path:
    """Execute a notebook on a run and keep the executed copy under ``notebooks/`` in the run's folder.

    Parameters
    ----------
    name
        Stem of the notebook's file.
    run
        The run its records go to; its folder is passed as the parameter `run_dir`.
    parameters
        Further parameters, checked against the notebook's own parameters cell.
    timeout_s
        Seconds after which the notebook's kernel is ended.
    needs_record
        Whether the notebook counts as finished only when it wrote its final ``Trial(kind="notebook")``. papermill marks
        the cells of a notebook whose kernel died as completed, so their status proves nothing. False for the status
        report alone, which reads records and writes none.
    show_bar
        Show papermill's progress bar on stderr.

    Raises
    ------
    NotebookParameterError, UnknownName
        Before anything runs.
    NotebookFailed
        The file is damaged, a cell raised, the kernel died, the time ran out, or the final record is missing. Unless
        it is the file, an error record of kind `notebook` and the executed copy as far as it got are on disk before
        this is raised.
    """
    path = notebook_path(name, notebooks_dir)
    parameters = {"run_dir": str(run.path), **(parameters or {})}
    check_parameters(path, parameters)

    folder = run.path / FOLDER
    before = _final_records(run, name) if needs_record else 0
    try:
        folder.mkdir(exist_ok=True)
        with _workspace(folder, name) as workspace:
            partial = workspace / f"{name}.ipynb"
            reason = _papermill(path, partial, parameters, cwd=folder, timeout_s=timeout_s, show_bar=show_bar)
            if partial.exists():
                os.replace(partial, folder / f"{name}.ipynb")
    except OSError as error:
        raise FlashCoreError(
            f"The executed notebook {name} cannot be written to {folder} ({error.strerror}); free the disk or choose "
            "another folder with --out."
        ) from error
    if reason is None and needs_record and _final_records(run, name) == before:
        reason = "it ended without its final record, as a notebook does whose kernel died"
    if reason is not None:
        if needs_record:
            record_failure(run, name, reason)
        raise NotebookFailed(name, reason)
    return folder / f"{name}.ipynb"


def record_failure(run: RunFolder, name: str, reason: str) -> None:
    """Write down that a notebook did not finish, and why."""
    run.append(Trial(kind="notebook", status="error", reason=reason, data={"name": name}))


@contextlib.contextmanager
def _workspace(folder: Path, name: str) -> Iterator[Path]:
    """A folder of one execution's own, for what is not whole yet and for the kernel's keys; gone afterwards.

    What a killed process left of its own is removed first.
    """
    sweep(folder)
    workspace = partial_path(folder / name)
    workspace.mkdir(mode=0o700)
    try:
        yield workspace
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _final_records(run: RunFolder, name: str) -> int:
    return sum(t.data.get("name") == name for t in run.trials(kind="notebook", status="ok"))


NOTHING_RAN = "died before replying"
"""What Jupyter says of a kernel that ended before it took its first cell."""


def _papermill(
    path: Path, partial: Path, parameters: dict, *, cwd: Path, timeout_s: float, show_bar: bool
) -> str | None:
    """Run papermill; the reason why the notebook did not finish, as a clause, or None.

    A kernel that ends before its first cell is started once more: its ports were chosen before it began, and another
    process may have taken one of them meanwhile.
    """
    until = time.monotonic() + timeout_s
    reason = _attempt(path, partial, parameters, cwd=cwd, left_s=timeout_s, show_bar=show_bar)
    if reason is not None and NOTHING_RAN in reason:
        left_s = max(0.0, until - time.monotonic())
        reason = _attempt(path, partial, parameters, cwd=cwd, left_s=left_s, show_bar=show_bar)
    return f"it took longer than {timeout_s:.0f} s and was ended" if reason == OVERRAN else reason


OVERRAN = "it took too long"
"""What one attempt says that was ended for its time; the whole of them names the limit."""


def _attempt(path: Path, partial: Path, parameters: dict, *, cwd: Path, left_s: float, show_bar: bool) -> str | None:
    set_home()
    load_nbformat()
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    logging.getLogger("papermill").addHandler(logging.NullHandler())  # what it says is in the reason below
    kernels, overran, raised = [], threading.Event(), []

    def stop():
        overran.set()
        for kernel in kernels:
            _kill(kernel)

    timer = threading.Timer(left_s, stop)
    timer.daemon = True
    timer.start()
    try:
        papermill.execute_notebook(
            str(path).replace("{", "{{").replace("}", "}}"),  # papermill fills braces in paths from the parameters
            str(partial).replace("{", "{{").replace("}", "}}"),
            parameters=parameters,
            kernel_name="python3",
            language="python",  # a notebook need not say so
            kernel_manager_class=_kernel_manager(kernels, partial.with_name("kernel.json"), overran),
            # Output that comes late is output that is lost, as when a cell prints faster than anybody reads: the
            # notebook goes on, and what a cell raised is taken from its reply instead of from its output.
            iopub_timeout=OUTPUT_S,
            raise_on_iopub_timeout=False,
            on_cell_error=lambda cell, cell_index, execute_reply: raised.append(execute_reply["content"]),
            shutdown_kernel="immediate",  # a polite one prints the interrupted cell's traceback
            progress_bar={"desc": f"  {path.stem}", "leave": False, "mininterval": 1.0} if show_bar else False,
            # The kernel's folder, by nbclient: papermill's own way changes that of this process, with all its threads.
            resources={"metadata": {"path": str(cwd)}},
        )
    except PapermillExecutionError as error:
        said = raised[-1] if raised else {"ename": error.ename, "evalue": error.evalue}
        reason = f"cell {error.exec_count} raised {said.get('ename')}: {said.get('evalue')}".rstrip(": ")
    except DeadKernelError:
        reason = "its Jupyter kernel died (killed, crashed, or out of memory)"
    except RuntimeError as error:  # nbclient: the kernel did not answer, or died before it answered
        reason = f"its Jupyter kernel did not start ({_one_line(error)})"
    except OSError:
        raise
    except Exception as error:  # papermill and its parts raise what they like; the other notebooks are still to run
        reason = f"papermill could not run it ({type(error).__name__}: {_one_line(error)})"
    else:
        reason = None
    finally:
        timer.cancel()
    return OVERRAN if overran.is_set() else reason


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")


def _kernel_environment() -> dict[str, str]:
    """What a kernel's environment has otherwise than ours: it works in another folder, and draws into its notebook."""
    variables = absolute_variables()
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HOME), variables.get("PYTHONPATH")]))
    variables |= {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    variables |= {name: value for name, value in keeping_kernels().items() if name not in os.environ}
    return {name: text.replace("$", "$$") for name, text in variables.items()}  # jupyter_client fills in ${NAME}


def _kernel_manager(started: list, connection: Path, over: threading.Event) -> type:
    """A kernel manager class that starts this very interpreter, whatever kernels the machine has registered.

    Parameters
    ----------
    connection
        The file that gets the kernel's ports and key.
    over
        Set once the time is up: a kernel that starts only then is ended at once.
    """
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    environment = _kernel_environment()

    class KernelOfThisInterpreter(AsyncKernelManager):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "connection_file": str(connection)})
            started.append(self)

        async def start_kernel(self, **options):
            await super().start_kernel(**options)
            if over.is_set():  # when that was set there was no process yet to be ended
                _kill(self)

        @property
        def kernel_spec(self):
            return KernelSpec(
                argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"],
                display_name="Python 3",
                language="python",
                env=environment,
            )

    return KernelOfThisInterpreter


def _kill(kernel) -> None:
    """End a kernel and what it started; jupyter_client gives each kernel a process group of its own."""
    pid = getattr(kernel.provisioner, "pid", None)
    if pid is None:
        return
    try:
        if os.getpgid(pid) != os.getpgid(0):
            os.killpg(os.getpgid(pid), signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
