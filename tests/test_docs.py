"""README and docs: commands run or at least exist, links lead to files, settings are named as they are.

A command block that begins with `# needs …` takes more than a CPU. Its commands are composed and not run, but for
trainings that need one GPU only for its speed. tests/page_commands.py reads the pages.
"""

import re
import subprocess
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from s2train import config
from s2train.command_line.composition import CONF, config_groups
from s2train.planning import compose_run, format_plan, preview
from s2train.planning.targets import target_gpu
from s2train.settings_page import programs, register_all
from s2train.validation.division import smallest_world
from tests.page_commands import Command, blocks, commands, unwrapped
from tests.program import ROOT, Outcome, run
from tests.test_rooms import ORDER

README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *GUIDES]
LINKED = [*PAGES, CONTRIBUTING, *ROOT.glob("*/results/*.md"), ROOT / "kernels/NOTES.md"]

SCHEMAS = {Path(path).stem: schema for path, schema in programs().items()}
# Appended to every training that runs here: its own layout and data, in a model and for steps that take a second.
SHAPE = ["model.num_layers=4", "model.hidden_size=48", "model.ffn_hidden_size=64", "model.num_attention_heads=4"]
SHAPE += ["model.num_query_groups=2", "model.head_dim=16"]
LENGTH = ["train.seq_length=256", "train.micro_batch_size=1", "train.global_batch_size=2", "train.precision=fp32"]
LENGTH += ["optim.warmup_steps=1", "evaluation.batches=1", "data.num_workers=0"]
STEPS = {"train.steps": 2, "train.exit_step": 1}  # at most
# Appended to what else would take seconds, if its command doesn't set it.
SHORT = {"launch/needle.py": "depths=[0.5]", "launch/generate.py": "max_tokens=8"}
TRAINING = ("launch/job.py", "launch/pretrain.py", "launch/compare.py")


def runs_here(command: Command) -> bool:
    """Whether a CPU can run a command, a training made small."""
    return not command.needs or (command.needs == "one GPU" and command.arguments[0] in TRAINING)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_that_a_cpu_can_run_runs(page: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("launch", "s2train"):
        (clone / name).symlink_to(ROOT / name)
    here = [command for command in commands(page) if runs_here(command)]
    assert here
    for command in here:
        outcome = execute(command, clone)
        assert outcome.status == 0, f"{command}\n{outcome.out[-1000:]}\n{outcome.err[-2000:]}"


def execute(command: Command, clone: Path) -> Outcome:
    """Run a command as it stands, but for what makes it small."""
    if command.stdin:
        (clone / "stdin.py").write_text(command.stdin)
        return run(str(clone / "stdin.py"), processes=0, cwd=clone)
    ranks, program, arguments = unwrapped(command)
    if program == "launch/pretrain.py" and "-m" in arguments:
        arguments.append("plan=true")  # whole sweeps: tests/sweeps
    elif program == "launch/pretrain.py" and not any(argument.startswith("plan") for argument in arguments):
        if is_imported(arguments) or any(argument.startswith("layout=file:") for argument in arguments):
            if is_imported(arguments):
                arguments = ["--config-dir", str(clone / "conf"), *arguments]
            # a checkpoint that was made small fits no plan as it stands
            alone = [argument for argument in arguments if not argument.startswith(("checkpoint.", "run_dir="))]
            as_it_stands = run("pretrain.py", *alone, "plan=true", processes=0, cwd=clone)
            if as_it_stands.status:
                return as_it_stands
        else:
            plan(arguments, ranks)  # as it stands
        arguments += small(arguments)
    elif program == "launch/pretrain.py" and any(argument.startswith("checkpoint.resume=") for argument in arguments):
        arguments += small(arguments)
    elif program == "launch/import.py":
        arguments.append(f"conf={clone / 'conf'}")  # not the repository's own
    elif (short := SHORT.get(program)) and not any(word.startswith(short.partition("=")[0]) for word in arguments):
        arguments.append(short)
    return run(program.removeprefix("launch/"), *arguments, processes=ranks, cwd=clone)


def small(arguments: Sequence[str]) -> list[str]:
    """Settings that make a training short; imported weights give its shape."""
    named = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    further = 2 if "checkpoint.new_data=true" in arguments else 0  # than the phase before
    steps = [f"{name}={min(int(named[name]), most + further)}" for name, most in STEPS.items() if name in named]
    quiet = [] if "tracking.wandb" in named else ["tracking.wandb=disabled"]
    return [*([] if is_imported(arguments) else SHAPE), *LENGTH, *steps, *quiet]


def is_imported(arguments: Sequence[str]) -> bool:
    return any(argument.startswith("+model=imported/") for argument in arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_other_command_names_what_exists(page: Path) -> None:
    for command in commands(page):
        if not runs_here(command):
            check(command)


def check(command: Command) -> None:
    """Whether what a command names is there: program, options, settings. A training must fit H100s, planned."""
    match command.program:
        case "make":
            subprocess.run(["make", "--dry-run", *command.arguments], cwd=ROOT, check=True, capture_output=True)
        case "pip":
            (extras,) = (word for word in command.arguments if word.startswith(".["))
            declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(extras[2:-1].split(",")) <= declared.keys()
        case "wandb":
            assert command.arguments[0] in ("login", "sync")
        case "vllm":
            assert command.arguments[0] in ("serve", "bench")
        case "python" if command.arguments[0] == "-m" and command.arguments[1].startswith("vllm."):
            pass  # vLLM's own module, in its environment
        case "source" | "mkdir" | "apt-get" | "dpkg" | "tar" | "curl":
            pass
        case "launch/hybrid_vs_dense.sh" | "launch/te_vs_local.sh":
            size, _, *settings = command.arguments
            plan([f"+model={size}_hybrid", *settings], 1)
        case "launch/multinode.sh":
            assert set(command.variables) <= set(re.findall(r"^#   (\w+) ", (ROOT / command.program).read_text(), re.M))
            check_program(command)
        case "sbatch":
            assert (ROOT / command.arguments[0]).is_file()
            check_program(command)
        case _:
            check_program(command)


def check_program(command: Command) -> None:
    ranks, program, arguments = unwrapped(command)
    settings = [word for word in arguments if is_setting(word)]
    name = Path(program).stem
    if name == "pretrain":
        plan([first_choice(setting) for setting in settings], ranks)
    elif name in SCHEMAS:
        register_all()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config.to_object(compose(name, settings))
    else:
        assert [word for word in arguments if word.startswith("--") and word not in help_of(program)] == []
        # an earlier command of the page makes the file
        settings = [word for word in settings if not word.startswith("layout=file:")]
        if settings:
            plan(settings if settings[0].startswith("+model=") else ["+model=7b_hybrid", *settings], 1)


@cache
def help_of(program: str) -> str:
    shown = run(program.removeprefix("launch/"), "--help", processes=0).succeeded()
    return shown.out


def is_setting(word: str) -> bool:
    """Of the run itself: how a sweep starts its jobs is Hydra's own."""
    return "=" in word and not word.lstrip("+").startswith("hydra")


def first_choice(setting: str) -> str:
    """A setting with its first value of a sweep."""
    override = OverridesParser.create().parse_override(setting)
    if override.is_interval_sweep():
        return f"{override.key_or_group}={override.value().start}"
    return (
        f"{override.key_or_group}={next(override.sweep_string_iterator())}" if override.is_sweep_override() else setting
    )


def plan(settings: Sequence[str], ranks: int) -> None:
    cfg = compose_run(settings)
    assert "It fits" in format_plan(preview(cfg, max(ranks, smallest_world(cfg)), target_gpu("h100-80gb")))


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_a_guide_opens_with_a_command_that_works_as_pasted(page: Path) -> None:
    first = blocks(page)[0]
    assert first.language == "sh"
    assert not first.needs
    assert "\n## " not in page.read_text().split("```")[0]


def test_the_readme_is_short_and_names_every_guide() -> None:
    text = README.read_text()
    assert len(text.splitlines()) < 200
    assert len(text.split()) < 1800
    assert [page.name for page in GUIDES if f"](docs/{page.name})" not in text] == []


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        assert path.is_relative_to(ROOT)
        if heading:
            assert heading in headings(path), f"{target}#{heading}"


def headings(page: Path) -> set[str]:
    """As GitHub links to them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@cache
def known_settings() -> frozenset[str]:
    names = {"hydra.sweep.dir", "hydra/launcher", "hydra/sweeper", *config_groups(CONF)}
    for schema in (config.LocalSweepConfig, config.SlurmSweepConfig):
        names |= set(settings_of(schema, "hydra.launcher."))
    return frozenset(names.union(*(settings_of(schema) for schema in SCHEMAS.values())))


def settings_of(schema: type, prefix: str = "") -> Iterator[str]:
    for name, value in get_type_hints(schema).items():
        yield prefix + name
        if is_dataclass(value):
            yield from settings_of(value, f"{prefix}{name}.")


def named_settings(page: Path) -> Iterator[str]:
    """Settings in a page's text: `name=value`, and `section.name` of a section that there is."""
    sections = "|".join(sorted({name.partition(".")[0] for name in known_settings() if "." in name}))
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)):
        for word in code.split():
            if word.rstrip(",").endswith((".png", ".json", ".jsonl")):
                continue
            if match := re.match(rf"'?\+?([a-z][\w./]*)=|((?:{sections})\.\w+(?:\.\w+)*)$", word):
                yield match[1] or match[2]


@pytest.mark.parametrize("page", [*PAGES, CONTRIBUTING], ids=lambda page: page.stem)
def test_settings_in_the_text_exist(page: Path) -> None:
    known = known_settings()
    unknown = {
        name
        for name in named_settings(page)
        if name not in known and not name.startswith(("layout.patterns.", "layout.kinds.", "optim.options."))
    }
    assert unknown == set()


def test_contributing_lists_the_rooms_in_the_order_of_imports() -> None:
    rows = re.findall(r"^\| (`.+?) \|", CONTRIBUTING.read_text(), re.M)
    listed = [set(re.findall(r"`(\w+)/?`", row)) for row in rows]
    assert listed == [*ORDER, {"launch"}]
