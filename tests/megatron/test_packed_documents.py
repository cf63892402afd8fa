"""With attention kept inside documents, a packed sequence trains as its documents would one by one."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from s2train.megatron.block_attention import DenseCoreAttention, SparseCoreAttention
from s2train.megatron.core_attention import packed_documents
from s2train.megatron.layout_cache import LayoutCache
from s2train.megatron.model import transformer_config
from s2train.planning import compose_run, hybrid_layout
from tests.data_fixtures import write_dataset
from tests.program import UNSAVED, metrics, pretrain, results_of

pytestmark = [pytest.mark.slow]

# Of float64: in fp32, gradients of these models err a hundred times its rounding, and now and then ten times as much.
TOLERANCE = 1e-11
WITHIN = ["data.attention_within_documents=true", "train.steps=3", "data.path=mine", "data.split=100"]


@pytest.mark.parametrize("tp", [1, 2])
def test_losses_and_gradients_are_those_of_the_documents_one_by_one(tp: int) -> None:
    seed = str(random.randrange(2**31))
    print("seed", seed)
    for model, found in results_of("tests.megatron.packed_program", seed, str(tp), processes=tp).items():
        assert found["losses"] < TOLERANCE, (model, found)
        assert found["gradients"] < TOLERANCE, (model, found)
        assert found["uncut"] > 1e-3, (model, found)


def test_layers_share_the_bounds_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = []

    def op(q: torch.Tensor, *_: Any, cu_seqlens: torch.Tensor, **how: Any) -> torch.Tensor:
        bounds.append(cu_seqlens)
        return q

    for module in ("block_attention", "dense_kernels"):
        monkeypatch.setattr(f"s2train.megatron.{module}.block_sparse_attention", op)
    cfg = compose_run(["+model=tiny_hybrid"])
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    inputs = [torch.randn(32, 2, heads, 16) for heads in (4, 2, 2)]
    packed = packed_documents(torch.tensor([[0, 9, 32], [0, 20, 32]], dtype=torch.int32), 32)
    cache = LayoutCache()
    for number, kind in enumerate((DenseCoreAttention, SparseCoreAttention)):
        layer = kind(
            transformer_config(cfg),
            number + 1,
            AttnMaskType.causal,
            "self",
            pg_collection=SimpleNamespace(tp=group, cp=group),
            layer_layout=hybrid_layout(cfg).layers[number],
            num_query_groups=2,
            cache=cache,
            backend="torch",
            seed=0,
        )
        layer(*inputs, None, packed_seq_params=packed)
    assert [one.tolist() for one in bounds] == 2 * [[0, 9, 32], [0, 20, 32]]
    assert all(
        one is other for one, other in zip(bounds[:2], bounds[2:4], strict=True)
    )  # a kernel finds its schedule of the layer before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the dataset `mine`, of documents of some dozen bytes, and a run of one process on it."""

    folder = tmp_path_factory.mktemp("packed")
    texts = ["".join(random.choices("ab c", k=random.randint(1, 90))) + "x" for _ in range(400)]
    write_dataset(folder / "mine", texts)
    pretrain(folder / "alone", *WITHIN, "checkpoint.interval=1", processes=0, cwd=folder).succeeded()
    return folder


def trace(run_dir: Path) -> list[float]:
    return [value for record in metrics(run_dir) for value in (record["loss"], record["grad_norm"])]


@pytest.mark.parametrize(
    ("processes", "arguments"),
    [
        (
            2,
            [
                "parallel.tp=2",
                "parallel.sequence_parallel=true",
                "train.recompute=selective",
                "train.micro_batch_size=1",
            ],
        ),
        (2, ["parallel.pp=2", "parallel.vpp=2", "train.recompute=mlp"]),
        (0, ["train.recompute=full", "train.micro_batch_size=2"]),
        (2, ["parallel.cp=2", "train.recompute=full"]),
        (2, ["parallel.cp=2", "parallel.cp_exchange=gather"]),
    ],
)
def test_trains_as_one_process_does(folder: Path, processes: int, arguments: list[str], tmp_path: Path) -> None:
    # the first step's weights: drawn otherwise under another division
    start = f"checkpoint.resume={folder / 'alone' / 'checkpoints' / 'iter_0000001'}"
    pretrain(tmp_path, *WITHIN, *arguments, start, UNSAVED, processes=processes, cwd=folder).succeeded()
    expected = trace(folder / "alone")[2:]
    assert len(expected) == 4
    assert trace(tmp_path) == pytest.approx(expected, rel=1e-5)


def test_is_another_loss_than_that_of_attention_across_documents(folder: Path, tmp_path: Path) -> None:
    across = [argument.replace("documents=true", "documents=false") for argument in WITHIN]
    assert pretrain(tmp_path, *across, UNSAVED, processes=0, cwd=folder).status == 0
    # by the largest of all: of untrained models a single loss can be the same to five digits by chance
    apart = [abs(a / b - 1) for a, b in zip(trace(tmp_path), trace(folder / "alone"), strict=True)]
    assert max(apart) > 1e-4
