"""The registry: which backends there are, and how they are found, chosen and added."""

import importlib
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

from flashcore import backends
from flashcore.backends import _registry
from flashcore.errors import FlashCoreError, UnknownName

OURS = {"reference", "cpu", "sdpa-math", "sdpa-flash", "sdpa-cudnn", "fa3"}


def test_the_registry_knows_every_backend_and_says_what_each_is():
    found = {b.id: b for b in backends.all_backends()}
    assert found.keys() >= OURS
    for backend in found.values():
        assert backend.title and backend.role in ("reference", "ours", "peer")
        assert backend.device in ("cpu", "cuda", "any")
        state = backend.availability()
        assert state.ok or (state.reason and state.fix), f"{backend.id} has to say what is missing and how to mend it"


def test_select_and_unknown_ids():
    assert [b.id for b in backends.select("cpu, reference,cpu")] == ["cpu", "reference"]
    for nobody in ("", " , "):
        with pytest.raises(UnknownName, match=f"no backend '{nobody}'; choose one of: .*all"):
            backends.select(nobody)
    on_cpu = {b.id for b in backends.select("all", device="cpu")}
    assert on_cpu >= {"reference", "cpu", "sdpa-math"} and not on_cpu & {"sdpa-flash", "sdpa-cudnn", "fa3"}
    with pytest.raises(UnknownName, match="no backend 'cpuu'"):
        backends.get("cpuu")


def test_two_backends_of_one_id_are_refused():
    class Other(backends.Backend):
        id = "cpu"

        def run(self, q, k, v, problem):
            return q, None

    with pytest.raises(FlashCoreError, match="Two backends are called 'cpu'"):
        backends.register(Other)


def test_a_plugin_folder_adds_a_backend(tmp_path, monkeypatch):
    (tmp_path / "mean.py").write_text(
        "from flashcore.backends import Backend, register\n"
        "@register\n"
        "class Mean(Backend):\n"
        "    id, title, role, device = 'toy-mean', 'the mean of V', 'ours', 'cpu'\n"
        "    def run(self, q, k, v, problem):\n"
        "        return v.mean(2, keepdim=True).expand_as(q), None\n"
    )
    monkeypatch.setenv("FLASHCORE_PLUGINS", str(tmp_path))
    try:
        assert backends.get("toy-mean").title == "the mean of V"
    finally:
        _registry._REGISTRY.pop("toy-mean", None)


def test_a_thread_that_asks_while_another_imports_a_plugin_waits_for_it(tmp_path, monkeypatch):
    (tmp_path / "slowly.py").write_text(
        "import time\n"
        "from flashcore.backends import Backend, get, register\n"
        "time.sleep(0.3)\n"
        "assert get('cpu')  # a plug-in may ask for what there is\n"
        "@register\n"
        "class Slowly(Backend):\n"
        "    id, title, role, device = 'toy-slowly', 'imported slowly', 'ours', 'cpu'\n"
        "    def run(self, q, k, v, problem):\n"
        "        return q, None\n"
    )
    monkeypatch.setenv("FLASHCORE_PLUGINS", str(tmp_path))
    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(backends.get, ["toy-slowly"] * 2))
        assert found[0] is found[1] and found[0].title == "imported slowly"
    finally:
        _registry._REGISTRY.pop("toy-slowly", None)


def test_a_module_that_asks_while_it_is_imported_and_a_plug_in_that_wants_it_end(tmp_path, monkeypatch):
    """Each of two threads holds what the other one needs: the module, and the right to import plug-ins."""
    monkeypatch.setattr(_registry, "WAIT_S", 0.2)
    meeting = types.ModuleType("toy_meeting")
    meeting.imported, meeting.discovering = threading.Event(), threading.Event()
    monkeypatch.setitem(sys.modules, "toy_meeting", meeting)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "toy_asks.py").write_text(
        "import toy_meeting\n"
        "from flashcore.backends import get\n"
        "toy_meeting.imported.set()\n"
        "assert toy_meeting.discovering.wait(60)\n"
        "FOUND = get('cpu').id\n"
    )
    (tmp_path / "toy_wants.py").write_text("import toy_meeting\ntoy_meeting.discovering.set()\nimport toy_asks\n")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    with ThreadPoolExecutor(2) as pool:
        asks = pool.submit(importlib.import_module, "toy_asks")
        assert meeting.imported.wait(60)
        monkeypatch.setenv("FLASHCORE_PLUGINS", str(tmp_path))
        wants = pool.submit(backends.all_backends)
        assert asks.result(60).FOUND == "cpu" and "cpu" in [b.id for b in wants.result(60)]
    sys.modules.pop("toy_asks")


def test_a_plugin_that_is_not_there_or_does_not_import_is_one_sentence_each_time(tmp_path, monkeypatch):
    (tmp_path / "file.py").write_text("")
    for named in ("nowhere", "file.py"):
        monkeypatch.setenv("FLASHCORE_PLUGINS", str(tmp_path / named))
        with pytest.raises(FlashCoreError, match=f"FLASHCORE_PLUGINS names .*{named}, and there is no such folder"):
            backends.get("cpu")
    monkeypatch.setenv("FLASHCORE_PLUGINS", str(tmp_path))
    for text, said in (("import no_such_module", "ModuleNotFoundError: No module named"), ("def f(:", "SyntaxError: ")):
        (tmp_path / "broken.py").write_text(text)
        for _ in range(2):
            with pytest.raises(FlashCoreError, match=rf"The plug-in .*broken.py cannot be imported .{said}"):
                backends.get("cpu")
    (tmp_path / "broken.py").write_text("")
    assert backends.get("cpu")
