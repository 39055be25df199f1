"""Figures of machine code, from text as NVIDIA's tools and XLA write it."""

import pytest

from dsv3_jax.planner import cubin

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'mla_attention' for 'sm_90a'
ptxas info    : Function properties for mla_attention
    128 bytes stack frame, 124 bytes spill stores, 120 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 128 bytes cumulative stack size
ptxas info    : Compile time = 244.860 ms
ptxas info    : Compiling entry function 'other' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 39 registers, used 1 barriers, 2048 bytes smem
"""
THUNKS = """000: kKernel [source] fusion grid: [1, 1, 1] threads: [8, 1, 1]  shared_memory: 0 bytes
001: kCustomKernel [source | sink] mla_attention grid: [32, 128, 1] threads: [256, 1, 1]  shared_memory: 131072 bytes
"""
SASS = """.section .text.mla_attention
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0a10*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0a20*/              @!P0 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0a30*/              @P1 HMMA.16816.F32.BF16 R4, R8, R12, R4 ;  /* HMMA in a comment */
"""


def test_registers_and_spills_are_each_kernel_s():
    assert cubin.resources(PTXAS) == {
        "mla_attention": cubin.Resources(255, 124, 120, 0),
        "other": cubin.Resources(39, 0, 0, 2048),
    }
    with pytest.raises(ValueError, match="expected registers and spills of k, got"):
        cubin.resources("ptxas info : Compiling entry function 'k' for 'sm_90a'\n nothing")


def test_a_launch_has_its_shared_memory():
    assert cubin.launches(THUNKS) == {"mla_attention": cubin.Launch(4096, 256, 131072)}


def test_only_instructions_are_counted_not_comments():
    assert cubin.tensor_instructions(SASS) == {"HGMMA": 2, "HMMA": 1}
