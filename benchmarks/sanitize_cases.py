"""One small call of every operator and its gradient, for compute-sanitizer (``benchmarks/gpu.sh sanitize``).

Sizes on both sides of a warp and of a tile, channels that 16-byte accesses fit and that they do not, half precision
(tensor cores) and float32. Nothing is compared here: the test suite does that.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType

from diffrate_ext import ops

IMAGES, HEADS = 2, 2
KERNEL = "diffrate"  # in the name of every kernel of ours, as gpu.sh tells the sanitizer


def cases(
    device: torch.device, dtype: torch.dtype, tokens: int, channels: int
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Operators by name, on 2 images of so many tokens; a head has ``channels`` channels."""
    randn = partial(torch.randn, device=device, dtype=dtype)
    rand = partial(torch.rand, device=device)
    k_p, k_m = tokens * 5 // 6, tokens * 2 // 3

    def leaf(*shape: int) -> Tensor:
        return randn(*shape).requires_grad_()

    x, residual = (leaf(IMAGES, tokens, HEADS * channels) for _ in range(2))
    # views of one packed projection, as timm has them
    packed = randn(IMAGES, tokens, 3, HEADS, channels).permute(2, 0, 3, 1, 4)
    q, k, v = (part.requires_grad_() for part in packed.unbind(0))
    size, importance = 1 + rand(IMAGES, tokens), rand(IMAGES, tokens - 1)
    mask = (torch.arange(tokens, device=device) < tokens - 2).float().repeat(IMAGES, 1)
    dst = torch.randint(-1, k_m, (IMAGES, tokens), device=device)
    kept = torch.tensor([k_p, k_m], dtype=torch.float32, device=device)
    probabilities = [rand(tokens).requires_grad_() for _ in range(2)]

    yield "sort_tokens", lambda: ops.sort_tokens(x, importance, size)
    yield "prune_merge", lambda: ops.prune_merge(x, importance, k_p, k_m, size, residual=residual)
    norm = ops.Norm(randn(HEADS * channels), randn(HEADS * channels))

    def normalized() -> Any:
        with torch.no_grad():  # with gradients it is not fused
            return ops.prune_merge(x, importance, k_p, k_m, size, residual=residual, norm=norm)

    yield "prune_merge, with a norm", normalized
    yield "add_norm", lambda: ops.add_norm(x.detach(), residual.detach(), norm)
    weighted: dict[str, Any] = {"mean_rule": "weighted", "size_rule": "sum"}
    yield "prune_merge, weighted", lambda: ops.prune_merge(x, rand(IMAGES, HEADS, tokens), k_p, k_m, size, **weighted)
    yield "merge_reduce", lambda: ops.merge_reduce(x, dst, k_m)
    yield (
        "merge_reduce, weighted and with a residual",
        lambda: ops.merge_reduce(x, dst, k_m, weights=size, residual=residual),
    )
    yield "bipartite_match", lambda: ops.bipartite_match(k.detach(), tokens // 4)
    yield "class_attention", lambda: ops.class_attention(q.detach(), k.detach(), size)
    yield "received_attention", lambda: ops.received_attention(q.detach(), k.detach(), size)
    for kind in ("class", "received"):
        options: dict[str, Any] = {"prefix": 1, "importance_from": kind}
        yield f"proportional_attention, {kind}", partial(ops.proportional_attention, q, k, v, size, **options)
        given = mask.clone().requires_grad_()
        yield f"masked_attention, {kind}", partial(ops.masked_attention, q, k, v, given, size, **options)

    def by_rows() -> Any:
        with torch.no_grad():  # with gradients there are no rows on the way
            rows = ops.proportional_attention(q, k, v, size, importance_from="class_rows")[1]
            assert rows is not None
            return ops.prune_merge(x, rows, k_p, k_m, size, residual=residual)

    yield "proportional_attention, class rows into prune_merge", by_rows
    logits = torch.randn(3, tokens - 1, device=device, requires_grad=True)
    yield "compression_rate", lambda: ops.compression_rate(logits, tokens - 1)
    alive = mask.clone().requires_grad_()
    ordered = importance + mask[:, 1:]  # what is masked is the least important
    yield "masked_prune_merge", lambda: ops.masked_prune_merge(x, alive, ordered, size, *probabilities, *kept)


def run_all(device: torch.device) -> int:
    """Runs every case, forward and backward; returns how many."""
    torch.manual_seed(0)
    count = 0
    shapes = [(17, 32), (70, 64), (70, 37)]
    for dtype, (tokens, channels) in itertools.product((torch.float16, torch.bfloat16, torch.float32), shapes):
        for name, call in cases(device, dtype, tokens, channels):
            print(f"{name}, {dtype}, {tokens} tokens, {channels} channels", flush=True)
            results = call()
            results = results if isinstance(results, tuple) else (results,)
            total = sum(result.float().sum() for result in results if result.requires_grad)
            if isinstance(total, Tensor):
                total.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            count += 1
    return count


def kernels_of(device: torch.device) -> set[str]:
    """Names of the kernels of ours that run, without the sanitizer: were there none, it would have nothing to check."""
    with torch.profiler.profile() as profile:
        run_all(device)
    on_gpu = (event for event in profile.key_averages() if event.device_type == DeviceType.CUDA)
    return {event.key for event in on_gpu if KERNEL in event.key}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--kernels", action="store_true", help="list the kernels that run; fail where there are none")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if not arguments.kernels:
        print(f"{run_all(device)} calls")
        return
    names = sorted(kernels_of(device))
    print("\n".join(names))
    if not names:
        raise SystemExit(f"no kernel with '{KERNEL}' in its name ran")


if __name__ == "__main__":
    main()
