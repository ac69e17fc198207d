"""Compile the kernels: `python -m sharednorm_kernels.build`, which `make kernels` runs.

Warnings are errors, and so is a kernel that spills registers or uses local memory: each would be a slow kernel that
nobody asked for.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sharednorm_kernels.files import FATBIN, MAIN_SOURCE, nvcc

# Machine code of 8.0 serves 8.6 and 8.9 too; PTX is compiled by the driver for everything after 9.0.
TARGETS = ("arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90")
COMPILE_SECONDS = 600

_ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for '(?P<target>\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


class BuildFailed(RuntimeError):
    """The kernels could not be compiled, or what came out is not good enough; the message says why."""


@dataclass(frozen=True)
class EntryReport:
    """What the assembler says about one kernel on one target; sizes in bytes, of one thread."""

    name: str
    target: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def uses_local_memory(self) -> bool:
        """Whether anything of it lives in local memory, which is device memory and slow."""
        return bool(self.stack or self.spill_stores or self.spill_loads)


def parse_report(text: str) -> list[EntryReport]:
    """Return what `ptxas -v` says about each kernel on each target.

    Raises:
        BuildFailed: The text is not of the expected form, so nothing can be said about spills.
    """
    headings = list(_ENTRY.finditer(text))
    if not headings:
        raise BuildFailed(f"ptxas reports no kernel:\n{text.strip()}")
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    reports = []
    for heading, end in zip(headings, ends, strict=True):
        section = text[heading.end() : end]
        stack, registers = _STACK.search(section), _REGISTERS.search(section)
        if stack is None or registers is None:
            raise BuildFailed(f"ptxas says nothing about the registers of {heading['name']}:\n{section.strip()}")
        frame, stores, loads = map(int, stack.groups())
        reports.append(EntryReport(heading["name"], heading["target"], int(registers[1]), frame, stores, loads))
    return reports


def refuse_local_memory(reports: Sequence[EntryReport]) -> None:
    """Raise BuildFailed if a kernel uses local memory; the message lists all that do."""
    bad = [
        f"{each.name} on {each.target}: {each.stack} bytes of stack, {each.spill_stores} spilled, "
        f"{each.spill_loads} read back"
        for each in reports
        if each.uses_local_memory
    ]
    if bad:
        raise BuildFailed("kernels use local memory:\n" + "\n".join(bad))


def build(out: Path = FATBIN, source: Path = MAIN_SOURCE, compiler: Path | None = None) -> list[EntryReport]:
    """Compile the kernels into a fatbin, and return what the assembler says about them.

    Raises:
        BuildFailed: There is no nvcc, it fails or warns, or a kernel uses local memory; then `out` stays as it was.
    """
    compiler = compiler or nvcc()
    if compiler is None:
        raise BuildFailed("there is no nvcc in PATH or in /usr/local/cuda/bin: install the CUDA toolkit, 13.0 or later")
    unchecked = out.with_suffix(".unchecked")
    command = [
        str(compiler), "-fatbin", "-std=c++17", "-O3", "--threads", "0", "-Werror", "all-warnings", "-Xptxas", "-v",
        *(word for target in TARGETS for word in ("-gencode", target)), "-o", str(unchecked), str(source),
    ]  # fmt: skip
    try:
        # The command is this module's own, and the compiler is the one that was found.
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)  # noqa: S603 - nvcc and our files
        if done.returncode != 0:
            raise BuildFailed(f"nvcc failed:\n{done.stderr.strip()}\n{done.stdout.strip()}")
        reports = parse_report(done.stderr + done.stdout)
        refuse_local_memory(reports)
        unchecked.replace(out)
    finally:
        unchecked.unlink(missing_ok=True)
    return reports


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print a summary, and return 0; 1 with the reason on stderr if it fails."""
    parser = argparse.ArgumentParser(prog="python -m sharednorm_kernels.build", description="Compile the kernels.")
    parser.add_argument("--out", type=Path, default=FATBIN, help="the fatbin to write")
    parser.add_argument("--verbose", action="store_true", help="list the registers of each kernel")
    options = parser.parse_args(argv)
    try:
        reports = build(options.out)
    except BuildFailed as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if options.verbose:
        for each in sorted(reports, key=lambda report: (report.target, report.name)):
            sys.stdout.write(f"{each.target} {each.name}: {each.registers} registers\n")
    targets = ", ".join(sorted({each.target for each in reports}))
    most = max(each.registers for each in reports)
    sys.stdout.write(
        f"{options.out}: {len(reports)} kernels for {targets}, and PTX; at most {most} registers, no local memory\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
