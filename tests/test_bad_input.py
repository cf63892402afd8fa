"""Bad input is rejected with one clear line that names the setting and the remedy, and nothing is written."""

from pathlib import Path

import pytest

from s2train.command_line.program import run_command
from tests.program import SMALL, Outcome, error_line, run


def attempt(run_dir: Path, *arguments: str, processes: int = 0, by_torchrun: bool = False) -> Outcome:
    settings = [*SMALL, f"run_dir={run_dir}", *arguments]
    outcome = run("pretrain.py", *settings, processes=processes, by_torchrun=by_torchrun)
    assert outcome.status != 0
    return outcome


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["layout.layers=DXSS"], ["layout.layers=DXSS", "unknown letter X", "D (dense)"]),
        (["train.seq_length=8"], ["train.seq_length=8", "block"]),
        (["parallel.tp=2"], ["parallel.tp=2", "--nproc-per-node 2"]),
        (["data.path=missing/corpus"], ["data.path=missing/corpus", "prepare_data.py"]),
        (["model.vocab_size=128"], ["model.vocab_size=128", "257"]),
        (["checkpoint.resume=nowhere"], ["checkpoint.resume=nowhere"]),
        (["schedule.kind=shfted"], ["schedule.kind=shfted", "shifted"]),
        (["train.global_batch_size=7"], ["train.global_batch_size=7"]),
        (["train.precision=fp9"], ["train.precision=fp9", "bf16, fp32"]),
        (["layout.pattern.stride=1" + "0" * 30], ["layout.pattern.stride=10", "beyond 64 bits. Set a smaller one"]),
        (
            ["+layout.patterns.R={kind:ranges,ranges:[[null,-1" + "0" * 30 + "]]}"],
            ["layout.patterns.R.ranges=[[null,-1", "beyond 64 bits"],
        ),
        (["layer_backend=te"], ["layer_backend=te", "local"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else "",
)
def test_a_setting_that_cannot_work_is_rejected(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    line = error_line(attempt(tmp_path / "run", *arguments))
    assert all(word in line for word in words), line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_typo_in_a_key_is_rejected(tmp_path: Path) -> None:
    assert "train.setps" in attempt(tmp_path / "run", "train.setps=3").err


@pytest.mark.slow
def test_heads_that_tp_does_not_divide_are_rejected_by_all_ranks_with_one_line(tmp_path: Path) -> None:
    arguments = ["parallel.tp=2", "model.num_attention_heads=3", "model.num_query_groups=1", "model.head_dim=16"]
    line = error_line(attempt(tmp_path / "run", *arguments, processes=2))
    assert "parallel.tp=2" in line or "model.num_attention_heads=3" in line


def test_an_empty_data_file_is_rejected(tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"empty{suffix}").touch()
    assert "data.path" in error_line(attempt(tmp_path / "run", f"data.path={tmp_path / 'empty'}"))


@pytest.mark.long
def test_an_apex_that_is_not_nvidias_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    outcome = attempt(tmp_path / "run", processes=2, by_torchrun=True)
    assert "pip uninstall apex" in (line := error_line(outcome))
    assert outcome.err.splitlines()[-2].endswith(line)  # the root cause in torchrun's own report


@pytest.mark.parametrize(("ranks", "rank"), [("2", "0"), ("1", "1")])
def test_one_process_in_an_environment_of_several_is_rejected(
    ranks: str, rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setenv("RANK", rank)
    assert "unset it to start one" in error_line(attempt(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_a_run_folder_that_cannot_be_created_is_rejected_by_its_name(tmp_path: Path, processes: int) -> None:
    (tmp_path / "file").touch()
    outcome = attempt(tmp_path / "file" / "run", processes=processes)
    assert outcome.status != 0
    line = error_line(outcome)
    assert line.startswith(f"error: run_dir={tmp_path}/file/run: can't be written")
    assert "another folder" in line


def test_ctrl_c_ends_a_program_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_command(interrupted)
    assert end.value.code == 130
    assert capsys.readouterr().err.splitlines() == ["interrupted; saved files are kept"]
