"""What a kernel's own name says: Tensor Cores, its tile, and whether a label fits."""

from __future__ import annotations

import pytest

from flashcore.surveys.cublaslt import kernel_names


@pytest.mark.parametrize(
    ("name", "uses"),
    [
        ("nvjet_sm90_hsh_64x48_64x16_1x2_h_bz_NNT", True),
        ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1", True),
        ("ampere_fp16_s16816gemm_fp16_64x64_ldg8_f2f_stages_64x5_tn", True),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_f16_s161616gemm_f16_16x16_128x2_nn_align8>", True),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize64x32x8_stage3_warpsize2x2x1_ffma_aligna4", False),
        ("void gemmSN_NN_kernel<float, 128, 2, 4, 8>", False),
        ("void gemvNSP_kernel<__half, __half, __half, float, 1, 32, 4, 1024>", False),
        ("void dot_kernel<float, 128, 0>", False),
        ("ampere_sgemm_32x128_tn", False),
        ("a_kernel_nobody_has_seen", None),
        (None, None),
    ],
)
def test_tensor_cores_are_read_from_the_kernels_own_name(name, uses):
    assert kernel_names.uses_tensor_cores(name) is uses


def test_the_kernel_that_multiplies_is_told_from_its_helpers():
    assert kernel_names.main_kernel(["Memset (Device)", "nvjet_hsh_64x8", "cublasLt::splitKreduce_kernel<32>"]) == (
        "nvjet_hsh_64x8"
    )
    assert kernel_names.main_kernel([]) is None
    assert kernel_names.short("void dot_kernel<float, 128>(cublasDotParams<float>)") == "dot_kernel<float, 128>"


def test_f14_is_found_by_the_tile_alone():
    ran = "nvjet_sm90_hsh_64x96_64x8_1x2_h_bz_NNT"
    assert kernel_names.label_problem("64x96", ran) is None and kernel_names.label_problem("TILE_96x64", ran) is None
    assert "computes 64x96" in kernel_names.label_problem("128x64", ran)
    assert "no kernel was seen" in kernel_names.label_problem("128x64", None)
    assert kernel_names.label_problem("UNDEFINED", "dot_kernel<float>") is None
    assert kernel_names.label_agrees("dot_kernel<float>", "128x64") is None


@pytest.mark.parametrize(
    ("name", "tile"),
    [
        ("nvjet_sm90_hsh_64x48_64x16_1x2_h_bz_NNT", (64, 48)),
        ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x256x64_warpgroupsize1x1x1", (128, 256)),
        ("ampere_fp16_s16816gemm_fp16_64x32_ldg8_f2f_stages_64x5_tn", (64, 32)),
        ("void dot_kernel<float, 128, 0>", None),
        ("", None),
        (None, None),
    ],
)
def test_the_tile_is_the_first_pair_of_sides_in_a_name(name, tile):
    assert kernel_names.tile_in(name) == tile


def test_a_name_is_cut_and_a_kernel_in_an_unnamed_namespace_is_left_whole():
    assert len(kernel_names.short("void k" * 60)) <= kernel_names.LONGEST
    unnamed = "void (anonymous namespace)::copy<float>(float*)"
    assert kernel_names.short(unnamed) == "(anonymous namespace)::copy<float>(float*)"


def test_helpers_alone_are_named_by_the_first_of_them():
    assert kernel_names.main_kernel(["Memset (Device)", "splitKreduce_kernel"]) == "Memset (Device)"


def test_a_survey_that_saw_another_kernel_speaks_against_a_label_whose_tile_fits():
    ran, surveyed = "nvjet_hsh_64x96_64x8_h", "nvjet_hsh_64x96_64x9_h"
    assert kernel_names.label_problem("64x96", ran, ran) is None
    assert surveyed in kernel_names.label_problem("64x96", ran, surveyed)
