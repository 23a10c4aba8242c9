"""Figures read from the text of compiled programs, worked out by hand: texts of small programs, shortened."""

from __future__ import annotations

import math

from llama_jax.plan import hlo
from tests.plan import moves

# x @ w in a scan of 5 steps for a v5e; the counter starts at 0 and ends at a constant.
SCAN = """\
HloModule jit_scan, is_scheduled=true

%fused_slice (param_0.12: bf16[5,256,256], param_1.13: s32[]) -> bf16[256,256] {
  %param_0.12 = bf16[5,256,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.13 = s32[]{:T(128)S(6)} parameter(1)
  %constant.2 = s32[]{:T(128)} constant(0)
  %dynamic_slice.15 = bf16[1,256,256]{2,1,0} dynamic-slice(%param_0.12, %param_1.13, %constant.2, %constant.2)
  ROOT %bitcast.8 = bf16[256,256]{1,0:T(8,128)(2,1)} bitcast(%dynamic_slice.15)
}

%fused_matmul (param_0.13: bf16[64,256], param_1.14: bf16[5,256,256], param_2.9: s32[]) -> bf16[64,256] {
  %param_0.13 = bf16[64,256]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1.14 = bf16[5,256,256]{2,1,0:T(8,128)(2,1)} parameter(1)
  %param_2.9 = s32[]{:T(128)S(6)} parameter(2)
  %fusion.11 = bf16[256,256]{1,0} fusion(%param_1.14, %param_2.9), kind=kLoop, calls=%fused_slice
  ROOT %convolution.5 = bf16[64,256]{1,0:T(8,128)(2,1)} convolution(%param_0.13, %fusion.11), dim_labels=bf_io->bf
}

%body (wide.param.2: (s32[], bf16[64,256], bf16[5,256,256])) -> (s32[], bf16[64,256], bf16[5,256,256]) {
  %constant.1 = s32[]{:T(128)} constant(1)
  %wide.param.2 = (s32[]{:T(128)}, bf16[64,256]{1,0:T(8,128)(2,1)S(1)}, bf16[5,256,256]{2,1,0}) parameter(0)
  %step = s32[]{:T(128)} get-tuple-element(%wide.param.2), index=0
  %add.13 = s32[]{:T(128)} add(%step, %constant.1)
  %w = bf16[5,256,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.2), index=2
  %x = bf16[64,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%wide.param.2), index=1
  %fusion.13 = bf16[64,256]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %w, %step), kind=kOutput, calls=%fused_matmul, \
metadata={op_name="jit(scan)/while/body/dot_general"}, backend_config={"window_config":{"estimated_cycles":"4319"}}
  ROOT %tuple.16 = (s32[]{:T(128)}, bf16[64,256]{1,0}, bf16[5,256,256]{2,1,0}) tuple(%add.13, %fusion.13, %w)
}

%condition (wide.param.1: (s32[], bf16[64,256], bf16[5,256,256])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(5)
  %wide.param.1 = (s32[]{:T(128)}, bf16[64,256]{1,0:T(8,128)(2,1)S(1)}, bf16[5,256,256]{2,1,0}) parameter(0)
  %get-tuple-element.28 = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=0
  ROOT %lt.9 = pred[]{:T(512)} compare(%get-tuple-element.28, %constant.5), direction=LT
}

ENTRY %main.3_spmd (param.2: bf16[64,256], param.3: bf16[5,256,256]) -> bf16[64,256] {
  %constant.8 = s32[]{:T(128)} constant(0)
  %param.3 = bf16[5,256,256]{2,1,0:T(8,128)(2,1)} parameter(1)
  %param.2 = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(0)
  %copy-start.1 = (bf16[64,256]{1,0:T(8,128)(2,1)S(1)}, bf16[64,256]{1,0}, u32[]{:S(2)}) copy-start(%param.2)
  %copy-done.1 = bf16[64,256]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.1)
  %tuple.18 = (s32[]{:T(128)}, bf16[64,256]{1,0}, bf16[5,256,256]{2,1,0}) tuple(%constant.8, %copy-done.1, %param.3)
  %while.13 = (s32[]{:T(128)}, bf16[64,256]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/bf16[5,256,256]{2,1,0}) \
while(%tuple.18), condition=%condition, body=%body
  ROOT %get-tuple-element.56 = bf16[64,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%while.13), index=1
}
"""
# Queries and keys for a v5e: rows and heads are spatial dimensions of which the window sees one element.
BATCHED = """\
HloModule jit_batched

%fused (param_0: bf16[8,2,4,128], param_1: bf16[8,2,256,128]) -> bf16[8,2,4,256] {
  %param_0 = bf16[8,2,4,128]{3,2,1,0:T(4,128)(2,1)} parameter(0)
  %param_1 = bf16[8,2,256,128]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution.1 = bf16[8,2,4,256]{3,2,1,0:T(4,128)(2,1)} convolution(%param_0, %param_1), \
window={size=8x2 stride=7x1 lhs_dilate=8x2}, dim_labels=01bf_01oi->01bf
}

ENTRY %main (param: bf16[8,2,4,128], param.1: bf16[8,2,256,128]) -> bf16[8,2,4,256] {
  %param = bf16[8,2,4,128]{3,2,1,0:T(4,128)(2,1)} parameter(0)
  %param.1 = bf16[8,2,256,128]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %fusion = bf16[8,2,4,256]{3,2,1,0:T(4,128)(2,1)} fusion(%param, %param.1), kind=kOutput, calls=%fused
}
"""
# On a GPU: a product of cuBLAS in a loop that XLA knows the length of, and attention of cuDNN.
GPU = """\
HloModule jit_gpu

%body.1 (p: (s32[], bf16[64,256], bf16[512,256])) -> (s32[], bf16[64,256], bf16[512,256]) {
  %p = (s32[], bf16[64,256]{1,0}, bf16[512,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[64,256]{1,0} get-tuple-element(%p), index=1
  %w = bf16[512,256]{1,0} get-tuple-element(%p), index=2
  %gemm = (bf16[64,512]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %fmha = (bf16[1,2,64,128]{3,1,2,0}, u8[0]{0}) custom-call(%x, %w), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %t = (s32[], bf16[64,256]{1,0}, bf16[512,256]{1,0}) tuple(%i, %x, %w)
}

%condition.1 (p.1: (s32[], bf16[64,256], bf16[512,256])) -> pred[] {
  %p.1 = (s32[], bf16[64,256]{1,0}, bf16[512,256]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main.1 (a: (s32[], bf16[64,256], bf16[512,256])) -> (s32[], bf16[64,256], bf16[512,256]) {
  %a = (s32[], bf16[64,256]{1,0}, bf16[512,256]{1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[64,256]{1,0}, bf16[512,256]{1,0}) while(%a), condition=%condition.1, body=%body.1, \
backend_config={"known_trip_count":{"n":"3"}}
}
"""
COLLECTIVES = """\
HloModule jit_collectives

%add (x.3: bf16[], y.1: bf16[]) -> bf16[] {
  %y.1 = bf16[] parameter(1)
  %x.3 = bf16[] parameter(0)
  ROOT %add.1 = bf16[] add(%x.3, %y.1)
}

ENTRY %main (p: bf16[64,512]) -> bf16[64,512] {
  %p = bf16[64,512]{1,0} parameter(0)
  %sum = bf16[64,512]{1,0} all-reduce(%p), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  %start = (bf16[64,512]{1,0}, bf16[256,512]{1,0}) all-gather-start(%p), channel_id=2, replica_groups=[2,4]<=[8], \
dimensions={0}
  %done = bf16[256,512]{1,0} all-gather-done(%start)
  %part = bf16[16,512]{1,0} reduce-scatter(%p), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %swap = bf16[64,512]{1,0} all-to-all(%p), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %next = bf16[64,512]{1,0} collective-permute(%p), channel_id=5, source_target_pairs={{0,1},{1,0}}
}
"""


def test_products_in_a_scan():
    assert hlo.flops(SCAN) == 5 * 2 * 64 * 256 * 256


def test_cycles_of_a_scan_are_those_of_its_fusions():
    assert hlo.estimated_cycles(SCAN) == 5 * 4319


def test_a_loop_of_unknown_length_counts_once():
    assert hlo.flops(SCAN.replace("constant(5)", "parameter(1)")) == 2 * 64 * 256 * 256


def test_products_with_batch_dimensions():
    assert hlo.flops(BATCHED) == 2 * 8 * 2 * 4 * 256 * 128


def test_products_of_cublas_in_a_loop():
    assert hlo.flops(GPU) == 3 * 2 * 64 * 512 * 256


def test_a_convolution_with_padding():
    text = BATCHED.replace("window={size=8x2 stride=7x1 lhs_dilate=8x2}", "window={size=3x2 pad=1_1x0_1}")
    text = text.replace("param_1: bf16[8,2,", "param_1: bf16[3,2,").replace("%param_1 = bf16[8,", "%param_1 = bf16[3,")
    # Along the first dimension 8 outputs see 3 elements each, less one at each end; along the second 2 and 1.
    assert hlo.flops(text) == 2 * 4 * 256 * 128 * (8 * 3 - 2) * (2 + 1)


def test_attention_kernels_are_listed():
    assert hlo.kernels(GPU) == [("__cudnn$fmhaSoftmax", ((64, 256), (512, 256)), 3)]
    kernel = '%put.3 = bf16[8,2]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", config={\n  "body": "x"\n}'
    text = COLLECTIVES.replace("  %done", f"  {kernel}\n  %done")
    assert hlo.kernels(text) == [("put", ((64, 512),), 1)]
    assert moves.collectives(text) == moves.collectives(COLLECTIVES)


def test_bytes_of_collectives():
    size = 64 * 512 * 2
    assert moves.collectives(COLLECTIVES) == {
        "all-reduce": 2 * size * 3 // 4,
        "all-gather": 3 * size,
        "reduce-scatter": size * 3 // 4,
        "all-to-all": size * 3 // 4,
        "collective-permute": size,
    }


def test_bytes_moved_leave_out_what_is_in_vmem():
    weights, counter = 5 * 256 * 256 * 2, 4
    fetched = 64 * 256 * 2
    in_a_step = weights + counter + 3 * counter  # the product; the sum of two counters
    condition = 2 * counter + 1
    assert hlo.bytes_moved(SCAN) == fetched + 5 * (in_a_step + condition)


def test_asynchronous_copies_into_vmem_are_no_moves():
    assert moves.large_moves(SCAN, 1) == []


def test_a_copy_of_a_weight_before_the_loop_is_a_move():
    copied = SCAN.replace("  %tuple.18", "  %copy.1 = bf16[5,256,256]{1,2,0} copy(%param.3)\n  %tuple.18", 1)
    copied = copied.replace("%copy-done.1, %param.3)", "%copy-done.1, %copy.1)")
    assert copied.count("%copy.1)") == 1
    (move,) = moves.large_moves(copied, 5 * 256 * 256 * 2)
    assert move.startswith("copy copy.1 = bf16[5,256,256]{1,2,0} (655360 bytes)")
    assert moves.large_moves(copied, 5 * 256 * 256 * 2 + 1) == []


def test_moves_within_the_loop():
    """Of a weight that comes through the loop's tuple, plainly and in a fusion that does nothing else."""
    line = "  %fusion.13"
    plain = SCAN.replace(line, "  %turned = bf16[5,256,256]{2,1,0} transpose(%w), dimensions={0,2,1}\n" + line)
    assert [move.split()[:2] for move in moves.large_moves(plain)] == []  # 0.6 MB
    assert [move.split()[:2] for move in moves.large_moves(plain, 2**19)] == [["transpose", "turned"]]
    fused = SCAN.replace(line, "  %one = bf16[256,256]{1,0} fusion(%w, %step), kind=kLoop, calls=%fused_slice\n" + line)
    assert [move.split()[:2] for move in moves.large_moves(fused, 1)] == [["fusion", "one"]]


def test_a_copy_of_activations_is_no_move():
    text = SCAN.replace("  ROOT %tuple.16", "  %copy.9 = bf16[64,256]{0,1} copy(%fusion.13)\n  ROOT %tuple.16")
    assert moves.large_moves(text, 1) == []


def test_sizes_of_types():
    sizes = {"pred": 1, "bf16": 2, "f32": 4, "s8": 1, "f8e4m3fn": 1, "u32": 4, "f64": 8, "c64": 8}
    for dtype, size in sizes.items():
        assert hlo.Array(dtype, (3, 5), "").num_bytes == math.prod((3, 5)) * size
    assert hlo.Array("s4", (4,), "").num_bytes == 2
