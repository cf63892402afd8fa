"""The commands of a documentation page, as bash would start them.

bash reads the page's blocks, with functions in the programs' places that write down their arguments. So quotes,
comments, variables and globs are bash's own, and a program that nobody expects is an error.
"""

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_SCRIPTS = ("launch/multinode.sh", "launch/hybrid_vs_dense.sh", "launch/te_vs_local.sh")
_PROGRAMS = (
    *("python", "make", "pip", "torchrun", "sbatch", "wandb", "source", "mkdir", "apt-get", "dpkg", "tar"),
    *("vllm", "curl"),
    *_SCRIPTS,
)
# Fields: block, text of stdin, names of exported variables, program, arguments.
_RECORD = r"""
record() {
    local text=""
    if [[ $2 == python && ${3-} == - ]]; then text=$(cat); fi
    printf '%s\0' "$1" "$text" "$(compgen -e)" "${@:2}"
    printf '\n'
}
record 0 none
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        needs: what its first line says that it needs besides a CPU; empty if it says nothing.
    """

    language: str
    text: str
    needs: str


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        needs: of its block.
        stdin: the program that `python -` reads.
        variables: names that are set on the command's own line.
    """

    program: str
    arguments: tuple[str, ...]
    needs: str
    stdin: str
    variables: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join([self.program, *self.arguments])


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in its order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    needs = [re.match(r"# needs (.+)", text) for _, text in found]
    return [Block(*pair, match[1] if match else "") for pair, match in zip(found, needs, strict=True)]


def commands(page: Path) -> list[Command]:
    """All commands of a page, in its order. A variable holds in later blocks, as in a user's shell."""
    all_blocks = blocks(page)
    script = ["set -eu", _RECORD]
    script += [f'{program}() {{ record "$block" {program} "$@"; }}' for program in _PROGRAMS]
    for number, block in enumerate(all_blocks):
        assert block.language in ("sh", "python"), f"{page.name}: a block without a language"
        text = block.text if block.language == "sh" else f"python - <<'END_OF_BLOCK'\n{block.text}END_OF_BLOCK\n"
        script += [f"block={number}", text]
    done = subprocess.run(["bash", "-c", "\n".join(script)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = [record.split("\0") for record in done.stdout.split("\0\n")[:-1]]
    before = set(records[0][2].split())
    return [
        Command(program, tuple(arguments), all_blocks[int(block)].needs, text, tuple(set(exported.split()) - before))
        for block, text, exported, program, *arguments in records[1:]
    ]


def unwrapped(command: Command) -> tuple[int, str, list[str]]:
    """Ranks (0: a plain process), program (a path or a module's name) and its arguments, of any launcher."""
    words = list(command.arguments)
    match command.program:
        case "launch/multinode.sh":
            return 8, words[0], words[1:]
        case "sbatch":
            return 8, "launch/pretrain.py", words[1:]
        case "torchrun":
            words.insert(0, "launch/job.py")
    if words[0] == "launch/job.py":
        assert words[1] == "--nproc-per-node", command
        return int(words[2]), words[3], words[4:]
    if words[0] == "-m":
        words = words[1:]
    return 0, words[0], words[1:]
