"""Made-up claims, and their audits on made-up GPUs and SYNTHETIC runs. Nothing here was measured or published."""

from __future__ import annotations

import json

from flashcore.decision import claims as library
from flashcore.problem import PRESETS
from support import synthetic_records as synthetic

GPU = """
[[gpu]]
id = "Toy"
names = ["Toy 9000"]
peak_tflops = { float16 = 100.0, float32 = 50 }
boost_ghz = 2
sm_count = 10
memory_tb_s = 1
l2_mb = 1
launch_us = 2.0
source = "a made-up data sheet"
"""
"""A GPU of round figures: the workload `report` takes at least 2.749 ms on it."""
TOY = {"gpu": "SYNTHETIC Toy 9000"}


def claim_text(id_: str, quantity: str, value, unit: str, **keys) -> str:
    lines = [f'id = "{id_}"', 'text = "made up"', 'source = "nowhere"', f'quantity = "{quantity}"']
    lines += [f"value = {value}", f'unit = "{unit}"']
    lines += [f"{key} = {json.dumps(value) if not isinstance(value, float) else value}" for key, value in keys.items()]
    return "[[claim]]\n" + "\n".join(lines) + "\n"


def audited(*texts: str, trials=(), environment=None, gpu: str = "Toy") -> dict[str, library.Audit]:
    """The audits of made-up claims by id, all of them about the GPU 'Toy' unless they say otherwise."""
    named = [text if "\ngpu = " in text or not gpu else text + f'gpu = "{gpu}"\n' for text in texts]
    found = library.parse_claims("".join(named) + GPU)
    return {a.claim.id: a for a in library.audit(found, trials, environment=environment)}


def one(*texts: str, **given) -> library.Audit:
    return next(iter(audited(*texts, **given).values()))


def outcomes(audit: library.Audit, check: str) -> list[str]:
    return [finding.outcome for finding in audit.of(check)]


TRIALS = synthetic.gpu_trials()
ENVIRONMENT = synthetic.environment()
REPORT = PRESETS["report"]
WMMA = next(t for t in TRIALS if t.kind == "attention_timing" and t.backend == "wmma" and t.problem == REPORT)
