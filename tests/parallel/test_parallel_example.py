"""`examples/parallel_attention.py` runs under torchrun on two CPU processes, and says what it found."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from flashcore.paths import HOME

FILE = HOME / "examples" / "parallel_attention.py"
if not FILE.is_file():
    pytest.skip("this test reads the checkout, and FlashCore runs from an install here", allow_module_level=True)

LIMIT = 600
"""Seconds after which it is killed; for a busy machine, and nothing is judged by it."""


@pytest.mark.exhaustive
@pytest.mark.slow
def test_it_gives_on_two_processes_what_one_gives_and_times_both(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(FILE)]
    here = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(HOME)}
    here["TMPDIR"] = str(tmp_path)  # torchrun leaves a folder of logs
    options = ["--keys-per-card", "33", "--heads", "4", "2", "--head-dim", "16", "--plan", "ring", "--time"]
    with subprocess.Popen(
        [*command, *options], cwd=tmp_path, env=here, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            said, _ = process.communicate(timeout=LIMIT)
        finally:
            process.terminate()  # torchrun ends its workers, and itself
    assert process.returncode == 0, said
    found = re.search(r"66 keys over 2 of cpu: the largest difference from one card is ([\d.e+-]+)", said)
    assert found and float(found[1]) <= 2**-7, said
    assert "a second run gave the same bits." in said
    assert re.search(
        r"S=66,D=16,bfloat16,causal, plan ring: [\d.]+ TFLOPS a card over 2 .* on one .*: [\d.]+ %", said
    ), said
