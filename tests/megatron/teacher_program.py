"""Measures what scorers learn from a teacher, on one process; prints JSON."""

import json
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from s2train.attention.random_numbers import stateless_seed
from s2train.attention.selection.targets import sampled_positions
from s2train.config import LayoutConfig, ModelConfig, ParallelConfig, PretrainConfig, TrainConfig
from s2train.megatron.block_selection import BlockSelectionCoreAttention
from s2train.megatron.core_attention import cores_of
from s2train.megatron.layer_backends import choose_backend
from s2train.megatron.setup import initialize, shutdown
from s2train.megatron.teacher import Teacher, build_teacher
from s2train.planning import hybrid_layout
from tests.attention import block_selection_oracle as oracle
from tests.attention.conformance_program import BATCH, BLOCK, LENGTH, VOCABULARY, build

QK = list[tuple[Tensor, Tensor]]  # queries and keys of each layer
Columns = dict[str, list[float]]  # values of each layer
SEED = int(torch.randint(1 << 30, ()))
CPU = torch.device("cpu")


def config(teacher: str | None, recompute: str = "none") -> PretrainConfig:
    kind = {"kind": "block_selection", "scorer": "sea", "features": 8, "channels": 4, "sinks": 0, "top_k": 1}
    return PretrainConfig(
        model=ModelConfig("taught", 3, 32, 48, 4, 2, vocab_size=VOCABULARY, init_std=0.2),
        layout=LayoutConfig("BDB", BLOCK, kinds={"B": kind | {"warm_up_steps": 1, "teacher": teacher}}),
        parallel=ParallelConfig(),
        train=TrainConfig(steps=1, seq_length=LENGTH, global_batch_size=1, precision="fp32", recompute=recompute),
        seed=SEED,
    )


def student_of(teacher: str | None, recompute: str = "none") -> GPTModel:
    """A student whose weights are the same in every call."""
    torch.manual_seed(SEED)
    return build(config(teacher, recompute))


def taught(recompute: str = "none") -> tuple[GPTModel, Teacher]:
    """A student, and a teacher with other weights."""
    cfg, student = config("dense", recompute), student_of("dense", recompute)
    model = build_teacher(cfg, hybrid_layout(cfg), choose_backend("local"), CPU)
    generator = torch.Generator().manual_seed(SEED + 1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return student, Teacher(model, [student])


def students_of(gpt: GPTModel) -> list[BlockSelectionCoreAttention]:
    return [core for core in cores_of(gpt) if isinstance(core, BlockSelectionCoreAttention)]


def micro_batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(SEED + number)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    return tokens, torch.arange(LENGTH).expand_as(tokens).contiguous()


def watch(gpt: GPTModel) -> QK:
    """List that each layer's queries and keys are added to."""
    seen: QK = []
    for core in cores_of(gpt):
        core.register_forward_pre_hook(lambda _, given: seen.append((given[0].detach(), given[1].detach())))
    return seen


def train(student: GPTModel, teacher: Teacher | None, step: int, micro_batches: int = 1) -> Columns:
    """What the layers record in one step, each a mean over its micro batches; gradients stay."""
    student.zero_grad()
    for core in students_of(student):
        core.step, core.is_logged = step, True
    for number in range(micro_batches):
        tokens, positions = micro_batch(number)
        if teacher is not None:
            teacher.teach(tokens, positions)
        student(tokens, positions, None, labels=tokens.roll(-1, 1)).mean().backward()
    found: Columns = {}
    for core in students_of(student):
        for name, (total, count) in core.records.take().items():
            found.setdefault(name, []).append(float(total / count))
    return found


def by_definition(
    core: BlockSelectionCoreAttention, own: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]
) -> Columns:
    """Losses and recall of one layer in float64: its own scores and lists, and another's probabilities."""
    query, key = (x.double() for x in own)
    read = oracle.read(core, query, key)[:, ::2]
    weights = {weight.name: getattr(core, weight.name).detach().double() for weight in core.own_weights}
    taught_query, taught_key = (x.double() for x in other)
    position = torch.arange(LENGTH)
    products = torch.einsum("qbhd,kbhd->bhqk", taught_query, taught_key.repeat_interleave(2, 2)) * core.softmax_scale
    rows = products.masked_fill(position > position[:, None], -torch.inf).softmax(-1).unflatten(1, (2, 2)).mean(2)
    if core.warms_up:
        targets = [list(range(at, min(at + BLOCK, LENGTH))) for at in range(0, LENGTH, BLOCK)]
    else:
        seed = stateless_seed(core.seed, core.step, core.layer_number, "rows")
        targets = [[at] for at in sampled_positions(LENGTH, core.kind.settings.sampled_rows, seed, CPU).tolist()]
    total = {"kl": 0.0, "mse": 0.0, "recall": 0.0}
    for sequence in range(BATCH):
        scores = oracle.scores(core, weights, query[:, sequence], key[:, sequence])
        for at in targets:
            share = len(at) / sum(map(len, targets)) / BATCH / 2
            total["recall"] += share * float((rows * read)[sequence][:, at].sum(-1).mean(-1).sum())
            chosen = oracle.candidates(core, at[0] // BLOCK)
            for g in range(2) if chosen else ():
                mass = rows[sequence, g, at].mean(0)
                mass = torch.stack([mass[c * BLOCK : (c + 1) * BLOCK].sum() for c in chosen])
                estimate = scores[g, at[0] // BLOCK, chosen].softmax(-1)
                total["kl"] += share * float((mass * (mass / mass.sum() / estimate).log()).sum())
                total["mse"] += share * float((estimate * mass.sum() - mass).square().sum())
    return {name: [value] for name, value in total.items()}


def against_oracle() -> dict[str, Any]:
    """By phase: recorded values of the two layers, those by definition, and those without a teacher."""
    found = {}
    for phase, step in (("warm-up", 1), ("selected", 2)):
        student, teacher = taught()
        own, other = watch(student), watch(teacher.model)
        recorded = train(student, teacher, step)
        expected: Columns = {}
        for core in students_of(student):
            layer = core.layer_number - 1
            for name, value in by_definition(core, own[layer], other[layer]).items():
                expected.setdefault(name, []).extend(value)
        alone = train(student_of(None), None, step)
        found[phase] = {"recorded": recorded, "expected": expected, "alone": alone}
    return found


def of_equal_weights() -> dict[str, Any]:
    """What a dense step records with a teacher of the student's own weights, and without one."""
    student, teacher = taught()
    own = student.state_dict()
    teacher.model.load_state_dict({name: own[name] for name in teacher.model.state_dict()})
    return {"taught": train(student, teacher, 1), "alone": train(student_of(None), None, 1)}


def recomputed() -> dict[str, bool]:
    """By way and phase: whether two micro batches give the bits of a step that recomputes nothing."""
    found = {}
    for recompute in ("selective", "full"):
        for phase, step in (("warm-up", 1), ("selected", 2)):
            values = []
            for way in ("none", recompute):
                student, teacher = taught(way)
                records = train(student, teacher, step, micro_batches=2)
                values.append((records, [weight.grad for weight in student.parameters()]))
            (one, gradients), (other, again) = values
            same = [torch.equal(a, b) for a, b in zip(gradients, again, strict=True)]  # type: ignore[arg-type]
            found[f"{recompute}, {phase}"] = one == other and all(same)
    return found


def frozen() -> dict[str, bool]:
    """Whether a step leaves the teacher without gradients, in the student's state nothing of it, and no draw."""
    before = torch.get_rng_state()
    cfg = config("dense")
    build_teacher(cfg, hybrid_layout(cfg), choose_backend("local"), CPU)
    drew = not torch.equal(torch.get_rng_state(), before)
    student, teacher = taught()
    train(student, teacher, 1)
    return {
        "draws": drew,
        "gradients": any(weight.grad is not None for weight in teacher.model.parameters()),
        "in the student": student.state_dict().keys() != student_of(None).state_dict().keys(),
        "of the student": any("student" in name or "sea" in name for name, _ in teacher.model.named_modules()),
        "head": any("output_layer" in name for name, _ in teacher.model.named_parameters()),
    }


@torch.no_grad()
def evaluated() -> bool:
    """Whether an evaluation without a teacher's pass gives finite losses."""
    student = student_of("dense").eval()
    tokens, positions = micro_batch(0)
    return bool(student(tokens, positions, None, labels=tokens).isfinite().all())


def untaught() -> str:
    """What a training step says without a teacher's pass."""
    try:
        train(student_of("dense"), None, 1)
    except RuntimeError as error:
        return str(error)
    return ""


def main() -> None:
    initialize(ParallelConfig(), 1)
    results = {
        "against_oracle": against_oracle(),
        "of_equal_weights": of_equal_weights(),
        "recomputed": recomputed(),
        "frozen": frozen(),
        "evaluated": evaluated(),
        "untaught": untaught(),
    }
    shutdown()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
