"""Compile every variant of the Triton kernels for GPUs that need not be here: `python compile_for_gpu.py`.

The interpreter accepts Python that the compiler refuses, so running kernels in it is not enough. Triton compiles for a
target that it is told; only launching needs the device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tersor.lowbit.codecs import channel_scale, encode_keys_channelwise, encode_values_channel_separable
from tersor.lowbit.kernels.delta_linear import DeltaGroup, PackedDelta
from tersor.lowbit.kernels.delta_linear import triton as deltas
from tersor.lowbit.kernels.packed_attention import PackedPart, RawPart, Window
from tersor.lowbit.kernels.packed_attention import triton as attention
from tersor.lowbit.kernels.probe_sums import triton as probes
from tersor.lowbit.kernels.quantize_pack import triton as packing
from tersor.lowbit.packing import packed_width


class AbsentDevice:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


class CompileOnly:
    """Stands in for a kernel: a launch compiles it, with each of ``choices``, and prints that it did."""

    def __init__(self, kernel: Any, *choices: dict[str, int]):
        self.kernel, self.choices = kernel, choices or ({},)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            for choice in self.choices:
                compiled = self.kernel.warmup(*args, **kwargs, **choice, grid=grid)
                assert compiled.asm["cubin"]
                print(self.kernel.__name__)

        return launch


def main() -> None:
    attention._attend = CompileOnly(attention._attend.fn, {"BLOCK_TOKENS": 64, "num_warps": 4})
    attention._merge = CompileOnly(attention._merge)
    packing._quantize_pack_kernel = CompileOnly(packing._quantize_pack_kernel)
    probes._row_lse, probes._column_sums = CompileOnly(probes._row_lse), CompileOnly(probes._column_sums)
    deltas._delta_linear_kernel = CompileOnly(deltas._delta_linear_kernel)
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 20, 64, generator=generator).half() for _ in range(2))
    factor, valid = torch.ones(1, 1, 20), torch.ones(1, 1, 20, dtype=torch.bool)
    positions = torch.arange(20, dtype=torch.int32)[None, None]
    mask, bias = torch.ones(1, 1, 1, 40, dtype=torch.bool), torch.zeros(1, 8, 1, 40)
    scale = channel_scale(values)
    plain: list[Any] = [RawPart(keys, values)]
    full: list[Any] = [RawPart(keys.bfloat16(), values.bfloat16(), positions, valid, factor, factor)]
    for bits in (2, 3, 4, 8):
        coded = encode_keys_channelwise(keys, bits), encode_values_channel_separable(values, bits, scale)
        plain.append(PackedPart(*coded, scale))
        full.append(PackedPart(*coded, scale, positions, valid, factor, factor))
    driver.set_active(AbsentDevice(90))
    window = Window(keys, values, 17, valid[0])
    query = torch.zeros(1, 8, 1, 64, dtype=torch.float16)
    attention.packed_attention(query, full, window, scaling=0.125, mask=mask, score_bias=bias)
    attention.packed_attention(torch.zeros(1, 8, 3, 64), plain, window, scaling=0.125)
    rows, seen = torch.arange(5), torch.ones(1, 5, 20, dtype=torch.bool)
    asked = torch.zeros(1, 8, 20, 64)
    probes.probe_sums(asked, keys.float(), rows, scaling=0.125)
    probes.probe_sums(asked.half(), keys, rows, scaling=0.125, allowed=seen)
    probes.probe_sums(asked.bfloat16(), keys.bfloat16(), rows, scaling=0.125, lse=torch.zeros(1, 8, 20))
    minimum, step = full[-1].keys.minimum, full[-1].keys.step
    packing.quantize_pack(keys, minimum, step, 4)
    for bits in (2, 3, 4, 8):
        packing.quantize_pack(keys, minimum, step, bits, scale)
    rows = torch.tensor([2, 0])
    for bits in (1, 2, 3, 4, 8):
        codes, index = torch.zeros(96, packed_width(80, bits), dtype=torch.uint8), torch.arange(3, dtype=torch.int32)
        delta = PackedDelta(codes, torch.ones(96).half(), index, torch.zeros(96, 3), bits, 2 ** (bits - 1), 80)
        x, y = torch.zeros(3, 80, dtype=torch.bfloat16), torch.zeros(3, 96, dtype=torch.bfloat16)
        deltas.delta_linear(x, y, [DeltaGroup(delta, rows)])
        deltas.delta_linear(x.float(), y.float(), [DeltaGroup(delta, None)])


if __name__ == "__main__":
    assert not triton.knobs.runtime.interpret, "the interpreter compiles nothing: unset TRITON_INTERPRET"
    main()
