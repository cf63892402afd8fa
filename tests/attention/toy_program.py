"""A program of launch/, the first argument, with the toy kind registered."""

import runpy
import sys

from s2train.attention.registry import register
from tests.attention.toy import ToyKind
from tests.program import ROOT

if __name__ == "__main__":
    register(ToyKind)
    program = str(ROOT / "launch" / sys.argv.pop(1))
    sys.argv[0], sys.path[0] = program, str(ROOT / "launch")
    runpy.run_path(program, run_name="__main__")
