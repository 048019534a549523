"""What every kernel is compiled to for GPUs, on any machine: room, spills, widths of reads, and tensor cores."""

from __future__ import annotations

import dataclasses
import json

import machinecode
import machinecode_table
import pytest
import triton
from machinecode import Code

from tokcompile.bench.kernelworkloads import WORKLOADS

COPIES = {
    *("fill_mask", "gather_keys", "gather_many", "gather_mask", "gather_pairs", "gather_tokens", "mark_pack"),
    *("mark_tokens", "merge_keys", "merge_pairs", "topk_mask", "turn_pairs", "unturn_keys"),
}
"""What reads and writes whole rows of tokens, or of a mask."""
PRODUCTS = {
    ("attend", "_part"),
    ("attend_chosen", "_part"),
    ("attend_with_sums", "_rows"),
    ("attention_received", "row_parts"),
    ("attention_received", "column_parts"),
    ("attention_row", "row_parts"),
    ("key_attention", "row_parts"),
    ("key_attention", "column_parts"),
    ("key_votes", "row_parts"),
    ("mark_pack", "_pack"),
    ("match_pairs", "_best"),
    ("merge_keys", "_merge"),
    ("received_by_sums", "column_parts"),
}
"""Kernels that multiply matrices. Others multiply, too: too few rows at a time, or numbers of their own."""
JOINS = {"_joined", "columns_of_kept", "heads_joined", "rows_joined"}
"""Kernels that bring together what the parts of an attention left: they have one tile."""
_ANGLES = {("turned_votes", "_logits", *which): 16 for which in [("bfloat16", 80), ("bfloat16", 90), ("float32", 90)]}
SPILLS = {
    "3.6": {("topk_mask", "_mark", "float32", 80): 8, ("mark_pack", "_pack", "bfloat16", 90): 8, **_ANGLES},
    "3.7": _ANGLES,
}
"""By release of Triton and by kernel: bytes that even the best tile spills at most. Those of angles are computed once a
program, before it goes through the heads."""
ARRAYS = {"_turn": 32, "_logits": 32}
"""Bytes of arrays: the sine of an angle that is very large multiplies it by hundreds of bits of 1 / pi."""

PTX = """
	.local .align 4 .b8 	__local_depot0[28];
	ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	@%p1 ld.global.nc.L1::evict_last.L2::cache_hint.v2.b64 { %rd2, %rd3 }, [ %rd4 + 0 ], %rd9;
	ld.global.b16 { %rs1 }, [ %rd5 + 0 ];
	cp.async.cg.shared.global [ %r5 + 0 ], [ %rd6 + 0 ], 0x10, %r7;
	cp.async.ca.shared.global [ %r5 + 0 ], [ %rd6 + 0 ], 4, 4;
	ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r5 ];
	st.local.b32 [%rd7], %r1;
	st.global.v2.b32 [ %rd8 + 0 ], { %r1, %r2 };
"""
SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;     /* 0x00000a00ff017b82 */
                                                              /* 0x000fe20000000800 */
        /*0010*/              @P1  LDG.E.128 R4, desc[UR4][R2.64] ;  /* 0x000000 */
        /*0020*/                   NOP;                       /* 0x0000000000007918 */
"""
CODE = Code("topk_mask", "_mark", "bfloat16", 80, "4 warps, 3 stages", 64, 0, 0, 1024, 900, (16,), (8, 16), False)


def test_widths_of_reads_and_writes() -> None:
    assert machinecode.widths(PTX, "ld.global") == (2, 16)
    assert machinecode.widths(PTX, "st.global") == (8,)
    assert machinecode.reads(PTX) == (2, 4, 16)


def test_tensor_cores_are_seen() -> None:
    assert not machinecode.tensor_cores(PTX)
    assert machinecode.tensor_cores("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {")
    assert machinecode.tensor_cores("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16")


def test_registers_and_spills() -> None:
    said = " Function _turn:\n  REG:128 STACK:56 SHARED:1024 LOCAL:0 CONSTANT[0]:640 TEXTURE:0\n"
    assert machinecode.usage(said, PTX) == (128, 56, 24)
    assert machinecode.usage(said, "") == (128, 56, 56)
    assert machinecode.usage(said.replace("56", "32"), PTX) == (128, 32, 0)
    with pytest.raises(ValueError, match="nothing of registers"):
        machinecode.usage("cuobjdump fatal", "")


def test_instructions_but_for_padding() -> None:
    assert machinecode.instructions(SASS) == 2


def test_room_in_shared_memory() -> None:
    code = dataclasses.replace(CODE, shared=100 << 10)
    assert code.fits() and code.fits(90) and not code.fits(89)


def test_a_row_of_the_page() -> None:
    """Tiles that do not fit are counted, and not told of."""
    wide = dataclasses.replace(CODE, tile="8 warps, 3 stages", registers=255, spilled=40, stack=72, shared=300 << 10)
    here = dataclasses.replace(CODE, architecture=90, registers=80, tensor_cores=True)
    text = machinecode_table.page([CODE, wide, here, dataclasses.replace(here, registers=90)], "today")
    row = "| topk_mask | _mark | bfloat16 | 2 | 1 / 2 / 1 | 64 / 80–90 | 0 | 0 | 1 | 16 | 8, 16 | no / yes |"
    assert row in text.splitlines() and "wrote this:\ntoday." in text


def test_a_kernel_without_a_tile_that_fits_is_said() -> None:
    wide = dataclasses.replace(CODE, shared=300 << 10)
    row = machinecode_table.line([wide, dataclasses.replace(wide, architecture=90)])
    assert "| 0 / 0 / 0 | none | none |" in row


def test_a_line_of_json_is_read_back() -> None:
    assert Code.read(json.dumps(dataclasses.asdict(CODE))) == CODE


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted(WORKLOADS))
def test_what_a_kernel_is_compiled_to(op: str) -> None:
    codes = machinecode_table.compiled(op)
    allowed = SPILLS.get(".".join(triton.__version__.split(".")[:2]), {})
    groups: dict[tuple[str, str, str, int], list[Code]] = {}
    for code in codes:
        assert code.tensor_cores == ((op, code.kernel) in PRODUCTS), code
        assert code.stack - code.spilled == ARRAYS.get(code.kernel, 0), code
        if op in COPIES:
            assert code.reads[-1] == code.writes[-1] == 16, code
        groups.setdefault((op, code.kernel, code.dtype, code.architecture), []).append(code)
    assert {name[2] for name in groups} == {str(each).removeprefix("torch.") for each in WORKLOADS[op].dtypes}
    for name, tiles in groups.items():
        assert (len(tiles) > 1) == (name[1] not in JOINS), f"{len(tiles)} tiles of {name}"
        # Those of sm_80 also run on sm_86 and sm_89, which have less shared memory.
        small = [code for code in tiles if code.fits(89)] if name[3] == 80 else tiles
        fit = [code for code in small if code.fits()]
        assert fit, f"no tile of {name} fits"
        least, most = min(code.spilled for code in fit), allowed.get(name, 0)
        assert least <= most, f"every tile of {name} spills, {least} bytes at least"
        assert least > 0 or name not in allowed, f"{name} spills no more: its exception can go"


@pytest.mark.slow
@pytest.mark.parametrize("op", machinecode.WIDEST)
def test_heads_of_256_floats_have_room_in_99_kilobytes(op: str) -> None:
    codes = machinecode_table.compiled("--widest", "--architecture", "80", op)
    for kernel in {code.kernel for code in codes}:
        assert any(code.fits(89) for code in codes if code.kernel == kernel), kernel
