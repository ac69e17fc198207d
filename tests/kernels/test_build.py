"""Finding and compiling the kernels: what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from sharednorm_kernels import FatbinMissing, fatbin, files, sources
from sharednorm_kernels.build import BuildFailed, build, main, parse_report, refuse_local_memory

REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'apply_f32' for 'sm_90'
ptxas info    : Function properties for apply_f32
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 59 registers, used 0 barriers
ptxas info    : Compiling entry function 'moments_f16' for 'sm_80'
ptxas info    : Function properties for moments_f16
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 61 registers, used 1 barriers, 416 bytes cmem[0]
"""
NVCC = files.nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


def test_a_report_is_read() -> None:
    reports = parse_report(REPORT.format(stack=0, stores=0, loads=0))
    assert [(each.name, each.target, each.registers) for each in reports] == [
        ("apply_f32", "sm_90", 59),
        ("moments_f16", "sm_80", 61),
    ]
    refuse_local_memory(reports)


@pytest.mark.parametrize(("stack", "stores", "loads"), [(8, 0, 0), (0, 4, 0), (0, 0, 4)])
def test_local_memory_is_refused_by_name(stack: int, stores: int, loads: int) -> None:
    with pytest.raises(BuildFailed, match="apply_f32 on sm_90") as caught:
        refuse_local_memory(parse_report(REPORT.format(stack=stack, stores=stores, loads=loads)))
    assert "moments_f16" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "ptxas info    : Compiling entry function 'f' for 'sm_90'\n"])
def test_a_report_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(BuildFailed, match="ptxas"):
        parse_report(text)


def test_the_sources_are_there_with_the_main_one() -> None:
    assert files.MAIN_SOURCE in sources()
    assert all(path.is_file() for path in sources())


def test_a_missing_fatbin_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHAREDNORM_FATBIN", raising=False)
    for compiler in (Path("/usr/bin/nvcc"), None):
        monkeypatch.setattr(files, "nvcc", lambda found=compiler: found)
        with pytest.raises(FatbinMissing, match="make kernels") as caught:
            fatbin(tmp_path / "sharednorm.fatbin")
        assert ("install the CUDA toolkit" in str(caught.value)) == (compiler is None)


def test_a_fatbin_is_returned_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "sharednorm.fatbin"
    path.write_bytes(b"\x50\xed\x55\xba")
    assert fatbin(path) == b"\x50\xed\x55\xba"


def test_a_fatbin_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHAREDNORM_FATBIN", raising=False)
    assert files.fatbin_path() == files.FATBIN
    path = tmp_path / "elsewhere.fatbin"
    monkeypatch.setenv("SHAREDNORM_FATBIN", str(path))
    assert files.fatbin_path() == path
    with pytest.raises(FatbinMissing, match=r"SHAREDNORM_FATBIN names .*elsewhere\.fatbin, which is not a file"):
        fatbin()
    path.write_bytes(b"elsewhere")
    assert fatbin() == b"elsewhere"


@needs_nvcc
def test_the_kernels_compile_without_a_warning_and_without_local_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sharednorm.fatbin"
    assert main(["--out", str(out), "--verbose"]) == 0
    said = capsys.readouterr().out
    assert "sm_80, sm_90, and PTX" in said
    assert "forward_cluster8_f32" in said
    assert out.stat().st_size > 100_000
    assert list(tmp_path.iterdir()) == [out]


@needs_nvcc
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param("int unused;", "unused", id="a warning"),
        pytest.param("undeclared();", "undeclared", id="an error"),
        pytest.param("float a[64]; for (int i = 0; i < 64; ++i) a[i * n % 64] = x[i]; *x = a[n];", "bytes of stack",
                     id="local memory"),
    ],
)  # fmt: skip
def test_a_kernel_that_is_not_good_enough_leaves_the_fatbin_as_it_was(tmp_path: Path, body: str, reason: str) -> None:
    source, out = tmp_path / "bad.cu", tmp_path / "bad.fatbin"
    source.write_text(f'extern "C" __global__ void bad(float *x, int n) {{ {body} }}\n')
    out.write_bytes(b"as it was")
    with pytest.raises(BuildFailed, match=reason):
        build(out, source)
    assert out.read_bytes() == b"as it was"
    assert not out.with_suffix(".unchecked").exists()


def test_without_a_compiler_the_build_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sharednorm_kernels.build.nvcc", lambda: None)
    assert main(["--out", str(tmp_path / "out.fatbin")]) == 1
    assert "install the CUDA toolkit" in capsys.readouterr().err
