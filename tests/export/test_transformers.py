"""An export in Hugging Face's transformers: the same logits and the same tokens as alone."""

import json
from pathlib import Path

import pytest
import torch

from s2train.export.modeling_s2 import S2ForCausalLM
from tests.export.test_export import VOCABULARY, relative, write_llama
from tests.program import pretrain, run

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow]


def exported(folder: Path, *settings: str) -> str:
    own = ["train.precision=fp32", "model.init_std=0.2", "train.steps=2", "optim.warmup_steps=1", *settings]
    trained = pretrain(folder / "run", *own, processes=0)
    assert trained.status == 0, trained.err
    done = run("export.py", f"checkpoint={folder / 'run'}", f"output={folder / 'out'}", processes=0)
    assert done.status == 0, done.err
    return str(folder / "out")


def test_a_hybrid_loads_by_its_own_modelling_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = exported(tmp_path)
    # Where transformers copies modelling files to; read when it is imported.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    alone = S2ForCausalLM.from_folder(folder)
    tokens = torch.randint(0, 257, (2, 75))
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, alone(tokens).logits)
        made = theirs.generate(tokens, max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(made, alone.greedy(tokens, 9))


def test_without_sparse_layers_it_is_transformers_own_llama(tmp_path: Path) -> None:
    folder = exported(tmp_path, "layout=dense")
    assert "auto_map" not in json.loads((Path(folder) / "config.json").read_text())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(theirs) is transformers.LlamaForCausalLM
    tokens = torch.randint(0, 257, (2, 75))
    with torch.no_grad():
        assert relative(theirs(tokens).logits, S2ForCausalLM.from_folder(folder)(tokens).logits) < 2e-5


def test_a_llama_of_transformers_own_can_be_imported(tmp_path: Path) -> None:
    theirs = transformers.LlamaForCausalLM.from_pretrained(write_llama(tmp_path / "written")).eval()
    theirs.save_pretrained(tmp_path / "saved")
    done = run(
        "import.py", f"weights={tmp_path / 'saved'}", f"output={tmp_path / 'start'}", "precision=fp32", processes=0
    )
    assert done.status == 0, done.err
    back = run("export.py", f"checkpoint={tmp_path / 'start'}", f"output={tmp_path / 'out'}", processes=0)
    assert back.status == 0, back.err
    tokens = torch.randint(0, VOCABULARY, (2, 75))
    with torch.no_grad():
        again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert relative(again(tokens).logits, theirs(tokens).logits) < 2e-5
