"""The program that compares models in vLLM."""

import json
from pathlib import Path

import pytest

from s2train.layouts.patterns import Dense
from s2train.layouts.patterns.window import SlidingWindow
from s2train.serving.benchmark import composed_config, main, write_config
from tests.inference.cached_models import layers_of
from tests.serving.exports import write_export


def test_results_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result.json").touch()
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path / "result.json")])
    assert "results are not overwritten" in capsys.readouterr().err


def test_a_missing_vllm_is_named_before_a_model_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("s2train.serving.benchmark.installed_version", lambda package: None)
    with pytest.raises(SystemExit):
        main([])
    assert "vLLM is not installed: see docs/serving.md" in capsys.readouterr().err


def test_configs_are_written_for_vllms_own_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--models", "tiny_hybrid", "--lengths", "5000", "--write-configs", str(tmp_path / "shapes")]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "shapes" / "tiny_hybrid" / "config.json").read_text())
    assert found["architectures"] == ["S2ForCausalLM"]
    assert found["max_position_embeddings"] > 5000
    with pytest.raises(SystemExit):
        main(arguments)
    assert "nothing is overwritten" in capsys.readouterr().err


def test_configs_of_two_models_with_one_name_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--models", "a/final", "b/final", "--write-configs", str(tmp_path / "shapes")])
    assert "two models have one name" in capsys.readouterr().err
    assert not (tmp_path / "shapes").exists()


def test_models_have_the_config_of_their_exports() -> None:
    hybrid, dense = (composed_config([f"+model={name}"]) for name in ("7b_hybrid", "7b_dense"))
    assert (hybrid["architectures"], dense["architectures"]) == (["S2ForCausalLM"], ["LlamaForCausalLM"])
    assert hybrid["num_hidden_layers"] == dense["num_hidden_layers"] == len(hybrid["layout"]["layers"])


@pytest.mark.parametrize(("trained", "longest", "written"), [(256, 1 << 20, 1 << 20), (4096, 300, 4096)])
def test_a_model_is_built_for_the_longest_sequence(trained: int, longest: int, written: int, tmp_path: Path) -> None:
    write_config(tmp_path / "model", {"max_position_embeddings": trained, "hidden_size": 8}, longest)
    found = json.loads((tmp_path / "model" / "config.json").read_text())
    assert found == {"max_position_embeddings": written, "hidden_size": 8}


@pytest.mark.slow
def test_a_model_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from s2train.serving.measure import measure
    from tests.serving import engine  # settings of a CPU

    assert engine.os.environ["HF_HUB_OFFLINE"] == "1"
    folder = write_export(
        tmp_path / "export",
        layers_of([SlidingWindow(1)] * 4, [Dense()] * 4, num_kv_heads=2, block_size=32),
        length=2048,
    )
    own = {"enforce_eager": True, "dtype": "float32", "max_num_seqs": 4, "num_gpu_blocks_override": 200}
    *_, found = measure(folder, {"lengths": [40, 100], "batches": [1, 3, None], "tokens": 20, "vllm": own})
    short, long = found["lengths"]
    # of 120 tokens a sequence has the newest block of each KV head, and 8 pages of 16 tokens in the dense layer
    assert (found["pages"], short["fit"], long["fit"]) == (200, 199 // (2 + 4), 199 // (2 + 8))
    assert [batch["batch"] for batch in short["batches"]] == [1, 3, 4]
    assert [batch["batch"] for batch in long["batches"]] == [1, 3, 4]
    assert all(batch["tokens_per_s"] > 0 for row in (short, long) for batch in row["batches"])
    assert all(row["first_token_s"] > 0 for row in (short, long))
    assert not any(batch["preempted"] for row in (short, long) for batch in row["batches"])


@pytest.mark.slow
def test_as_many_sequences_join_as_the_pages_hold(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from s2train.serving.measure import Load, sequences_that_join
    from tests.serving.engine import engine

    layout = layers_of([SlidingWindow(1)] * 4, [Dense()] * 4, num_kv_heads=2, block_size=32)
    folder = write_export(tmp_path / "export", layout)
    with engine(folder, max_model_len=512, max_num_seqs=32, num_gpu_blocks_override=90) as served:
        load = Load(served.llm)
        most = sequences_that_join(load.pages, 70, 60, budget=40)
        load.add(most, 70)
        load.decode(60)
        assert load.preempted() == 0
        load.stop()
        assert served.pool.get_num_free_blocks() == served.pool.num_gpu_blocks - 1
        with pytest.raises(RuntimeError, match="before it was stopped"):  # some wait until others have ended
            load.add(most + 8, 70)
