"""What a run will cost, and whether it can work, before anything is allocated.

`resolve` makes dataclasses of a composed configuration; `check` refuses what can't run, naming the setting to
change; `preview` and `format_plan` are what `plan=true` prints.
"""

from s2train.planning.checks import check, hybrid_layout, preview, resolve
from s2train.planning.plan import Plan, make_plan
from s2train.planning.report import format_plan

__all__ = ["Plan", "check", "format_plan", "hybrid_layout", "make_plan", "preview", "resolve"]
