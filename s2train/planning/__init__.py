"""Plans and checks a run before anything is allocated.

`compose_run` composes a run in code; `resolve` converts what Hydra composed to dataclasses; `check` rejects a run that
can't work and names the setting to change; `asked_plan` and `format_plan` produce the output of `plan=true`, `propose`
and `format_proposal` that of `plan.gpus=N`.
"""

from s2train.planning.checks import asked_plan, check, check_memory, preview, resolve
from s2train.planning.compose import compose_run
from s2train.planning.plan import Plan, make_plan
from s2train.planning.proposal import propose
from s2train.planning.proposal_report import format_proposal
from s2train.planning.report import epochs_of_plan, format_plan
from s2train.planning.run_layout import hybrid_layout

__all__ = [
    "Plan",
    "asked_plan",
    "check",
    "check_memory",
    "compose_run",
    "epochs_of_plan",
    "format_plan",
    "format_proposal",
    "hybrid_layout",
    "make_plan",
    "preview",
    "propose",
    "resolve",
]
