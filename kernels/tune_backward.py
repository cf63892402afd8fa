"""Which form of the backward is right and fastest on this GPU? `python -m s2train.kernels.tune_backward`

Compiles and checks the variants side by side in processes of their own, then times those that are right one by one.
A variant that fails or hangs is a line of the table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial

import torch
import triton
from torch import Tensor

from . import spec as spec_module
from .backward import backward
from .forward import forward
from .hopper_backward import Variant, hopper_backward, s2_hopper_bwd
from .layout import BlockLayout
from .reference import reference_attention
from .spec import AttentionSpec, to_bhsd

VARIANTS: dict[str, Variant | None] = {
    "portable": None,
    "order2 st2": Variant(2, 2, 1),
    "order1 st3": Variant(3, 1, 0),
    "order1 st2": Variant(2, 1, 1),
    "order0 st2": Variant(2, 0, 1),
    "order0 st3": Variant(3, 0, 0),
}
# length, KV heads, block, local, format
TIMINGS = (
    (32768, 32, 128, 8, "sbhd"),
    (131072, 32, 128, 8, "sbhd"),
    (32768, 32, 64, 16, "sbhd"),
    (32768, 8, 128, 8, "sbhd"),
    (32768, 32, 128, 8, "bhsd"),
)
# s_q, s_k, offset, block, heads, KV heads, batch, causal, format; the portable kernels are compiled for the timings too
CHECKS = (
    (1024, 1024, 0, 128, 4, 4, 1, True, "sbhd"),
    (1000, 1000, 0, 64, 4, 4, 2, True, "sbhd"),
    (700, 1001, 301, 128, 8, 2, 1, True, "bshd"),
    (500, 901, 0, 64, 2, 2, 1, False, "bhsd"),
)
HEADS = 32


def _backward(variant: Variant | None, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    return backward(*args) if variant is None else hopper_backward(*args, variant=variant)  # type: ignore[arg-type]


def _poisoned() -> Callable[[], None]:
    """Kernel outputs start as NaN until the function returned is called."""
    plain = spec_module.empty

    def poison(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    spec_module.empty = poison

    def restore() -> None:
        spec_module.empty = plain

    return restore


def _error(x: Tensor, y: Tensor) -> float:
    return ((x.float() - y.float()).norm() / y.float().norm().clamp(min=1e-30)).item()


def check(name: str) -> None:
    """One line: relative errors of dq, dk, dv in every check, and what the kernel takes."""
    variant, lines = VARIANTS[name], []
    torch.backends.cuda.matmul.allow_tf32 = False
    restore = _poisoned()
    good = True
    for s_q, s_k, offset, block, heads, kv_heads, batch, causal, form in CHECKS:
        torch.manual_seed(s_q)
        n_q, n_k = -(-(offset + s_q) // block), -(-s_k // block)
        layout = BlockLayout.from_mask(torch.rand(heads, n_q, n_k, device="cuda") < 0.4, block)
        spec = AttentionSpec(128**-0.5, causal, offset, None, form)  # type: ignore[arg-type]

        def random(count: int, s: int, batch: int = batch, form: str = form) -> Tensor:
            shape = {"sbhd": (s, batch, count, 128), "bshd": (batch, s, count, 128), "bhsd": (batch, count, s, 128)}
            return torch.randn(shape[form], device="cuda").bfloat16()

        leaves = [random(heads, s_q), random(kv_heads, s_k), random(kv_heads, s_k)]
        dout, dlse = random(heads, s_q), torch.randn(batch, heads, s_q, device="cuda")
        exact = [x.float().requires_grad_() for x in leaves]
        o, e = reference_attention(*exact, layout, causal=causal, query_offset=offset, format=spec.format)  # type: ignore[call-arg]
        loss = (o * dout.float()).sum() + (e.masked_fill(e == -torch.inf, 0) * dlse).sum()
        gold = [to_bhsd(x, spec.format) for x in torch.autograd.grad(loss, exact)]
        views = [to_bhsd(x, spec.format) for x in leaves]
        if variant is None:
            forward(*views, layout, spec)
        out, lse = to_bhsd(o.detach().bfloat16(), spec.format), e.detach().float().contiguous()
        arguments = (*views, out, lse, to_bhsd(dout, spec.format), dlse, layout, spec)
        for _ in range(3):
            errors = [_error(x, y) for x, y in zip(_backward(variant, *arguments), gold, strict=True)]
            good &= all(x <= 1e-2 for x in errors)
        lines.append("/".join(f"{a:.1e}" for a in errors))
    restore()
    kernel = ""
    if variant is not None:
        for compiled in next(iter(s2_hopper_bwd.device_caches.values()))[0].values():
            regs, spills = (getattr(compiled, x, None) for x in ("n_regs", "n_spills"))
            kernel = f"regs {regs} spills {spills} smem {compiled.metadata.shared}"
    print(f"{'RIGHT' if good else 'WRONG'} {name}: dq/dk/dv {'; '.join(lines)} {kernel}", flush=True)


def _median(f: Callable[[], object]) -> float:
    return triton.testing.do_bench(f, warmup=20, rep=120, return_mode="median")  # type: ignore[no-any-return]


def time_all(names: list[str], start: int) -> None:
    """Timings number `start` and later, each announced by a line with @."""
    item = 0
    for length, kv_heads, block, local, form in TIMINGS:
        if item + len(names) <= start:
            item += len(names)
            continue
        torch.cuda.empty_cache()
        shape = (length, 1, HEADS, 128) if form == "sbhd" else (1, HEADS, length, 128)
        kv_shape = tuple(kv_heads if x == HEADS else x for x in shape)
        spec = AttentionSpec(128**-0.5, True, 0, None, form)  # type: ignore[arg-type]
        q, dout = (to_bhsd(torch.randn(shape, device="cuda", dtype=torch.bfloat16), spec.format) for _ in range(2))
        k, v = (to_bhsd(torch.randn(kv_shape, device="cuda", dtype=torch.bfloat16), spec.format) for _ in range(2))
        blocks = torch.arange(length // block, device="cuda")
        distance = blocks[:, None] - blocks[None, :]
        patterns = torch.stack([(distance < local) | ((blocks - o) % 16 == 0)[None, :] for o in range(16)])
        patterns &= distance >= 0
        pattern_of_head = [h % 16 for h in range(HEADS)]
        layout = BlockLayout.from_patterns(patterns, pattern_of_head, block)
        below = patterns.sum((1, 2)) - len(blocks)
        kept = [int(n) * block**2 + len(blocks) * block * (block + 1) // 2 for n in below.tolist()]
        flops = 10 * 128 * sum(kept[p] for p in pattern_of_head)
        del patterns
        out, lse = forward(q, k, v, layout, spec)
        arguments = (q, k, v, out, lse, dout, None, layout, spec)
        reference = backward(*arguments)
        torch.cuda.synchronize()
        case = f"{length // 1024}k 32/{kv_heads} B={block} {form}"
        for name in names:
            if item >= start:
                print(f"@{item} {name} {case}", flush=True)
                variant = VARIANTS[name]
                restore = _poisoned()
                error = max(_error(x, y) for x, y in zip(_backward(variant, *arguments), reference, strict=True))
                restore()
                ms = _median(partial(_backward, variant, *arguments))
                line = f"{case:<22} {name:<14} {ms:8.3f} ms {flops / ms / 1e9:5.0f} TFLOP/s"
                if variant is not None:
                    main = _median(partial(hopper_backward, *arguments, variant=variant, only_main=True))
                    line += f" (main kernel {main:.3f} ms {flops / main / 1e9:.0f})"
                print(f"{line}  against portable {error:.1e}{'' if error < 1e-2 else ' WRONG'}", flush=True)
            item += 1


def _run(arguments: list[str], seconds: float) -> str:
    command = [sys.executable, "-m", "s2train.kernels.tune_backward", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"HANGS {arguments[1]}: nothing after {seconds:.0f} s"
    lines = [x for x in done.stdout.splitlines() if x.startswith(("RIGHT", "WRONG"))]
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return lines[-1] if lines else f"FAILS {arguments[1]}: {last[:300]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m s2train.kernels.tune_backward", description=__doc__)
    parser.add_argument("--seconds", type=float, default=110, help="for everything")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    parser.add_argument("--time", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check or args.time:
        try:
            check(args.check) if args.check else time_all(args.time.split(","), args.start)
        except Exception:
            traceback.print_exc()
            sys.stdout.flush()
            os._exit(3)
        return 0

    began = time.time()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    verdicts: dict[str, str] = {}

    def judge(name: str) -> None:
        verdicts[name] = _run(["--check", name], 50)
        print(f"[{time.time() - began:.0f} s] {verdicts[name]}", flush=True)

    threads = [threading.Thread(target=judge, args=(name,)) for name in VARIANTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [name for name in VARIANTS if name == "portable" or verdicts[name].startswith("RIGHT")]
    start, total = 0, len(names) * len(TIMINGS)
    while start < total and time.time() - began < args.seconds:
        start = _time_from(start, names, began, args.seconds)
    print(f"{time.time() - began:.0f} s", flush=True)
    return 0


def _time_from(start: int, names: list[str], began: float, seconds: float) -> int:
    """Run the timings in a process; the number of the one to go on with if it broke."""
    command = [sys.executable, "-u", "-m", "s2train.kernels.tune_backward", "--time", ",".join(names)]
    child = subprocess.Popen(
        [*command, "--start", str(start)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    state = {"item": start, "last": time.time() + 25}
    tail: list[str] = []

    def pump() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            state["last"] = time.time()
            if line.startswith("@"):
                state["item"] = int(line[1:].split()[0])
            elif "TFLOP" in line:
                print(line, end="", flush=True)
            else:
                tail.append(line)

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    while child.poll() is None:
        time.sleep(0.2)
        if time.time() - state["last"] > 15 or time.time() - began > seconds:
            child.kill()
            child.wait()
            print(f"number {state['item']} stopped: hangs, or out of time", flush=True)
    thread.join(2)
    if child.returncode == 0:
        return len(names) * len(TIMINGS)
    print(f"number {state['item']} broke: {(tail or ['no output'])[-1].strip()[:300]}", flush=True)
    return int(state["item"]) + 1


if __name__ == "__main__":
    sys.exit(main())
