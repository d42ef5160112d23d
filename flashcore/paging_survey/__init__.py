"""Measure paging: memory, decode, prefill, append, accuracy, tokens a second and correctness, a record each.

Records are of kind `paging`, and ``data["what"]`` says of what. `flashcore.paging_facts` reads them.
"""

from flashcore.paging_survey.measuring import ON_CPU, WHATS, measure
from flashcore.paging_survey.plan import Plan, plan_for

__all__ = ["ON_CPU", "WHATS", "Plan", "measure", "plan_for"]
