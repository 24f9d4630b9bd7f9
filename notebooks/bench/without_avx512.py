"""Run a command with onnxruntime held to AVX2, on a processor that has more: it has no switch of its own.

    python notebooks/bench/without_avx512.py /tmp/avx2 python notebooks/bench/peers.py --simd avx2

A copy of onnxruntime is made in the folder, in which every `cpuid` instruction is an illegal one. A handler, compiled
with gcc and preloaded, answers it without AVX-512, AVX-VNNI, AMX and what belongs to them, as a Zen 3 or an older Core
would. PyTorch and oneDNN are held to AVX2 by their own variables. Linux on x86-64, with objdump from binutils.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

CPUID, ILLEGAL = b"\x0f\xa2", b"\x0f\x0b"
HANDLER = r"""
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdlib.h>
#include <ucontext.h>
static void answer(int number, siginfo_t *info, void *context) {
  greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
  unsigned char *at = (void *)r[REG_RIP];
  if (at[0] != 0x0f || at[1] != 0x0b) abort();
  unsigned a, b, c, d, leaf = r[REG_RAX], part = r[REG_RCX];
  __cpuid_count(leaf, part, a, b, c, d);
  if (leaf == 7 && part == 0) {
    b &= ~0xdc230000u; /* AVX-512: F, DQ, IFMA, PF, ER, CD, BW, VL */
    c &= ~0x00005842u; /* VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
    d &= ~0x03c0010cu; /* 4VNNIW, 4FMAPS, VP2INTERSECT, AMX, FP16 */
  }
  if (leaf == 7 && part == 1) {
    a &= ~0x00a00030u; /* AVX-VNNI, BF16, AMX-FP16, AVX-IFMA */
    d &= ~0x00080430u; /* AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16, AVX10 */
  }
  r[REG_RAX] = a, r[REG_RBX] = b, r[REG_RCX] = c, r[REG_RDX] = d, r[REG_RIP] += 2;
}
__attribute__((constructor)) static void install(void) {
  struct sigaction action = {0};
  action.sa_sigaction = answer, action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, 0);
}
"""


def main() -> None:
    """Make the copy and the handler where they are missing, and run the command with them."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    folder = Path(sys.argv[1]).absolute()
    handler = folder / "handler.so"
    if not handler.exists():
        make(folder, handler)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    held = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "LD_PRELOAD": str(handler), "PYTHONPATH": path}
    os.execvpe(sys.argv[2], sys.argv[2:], {**os.environ, **held})


def make(folder: Path, handler: Path) -> None:
    """Copy onnxruntime, replace its `cpuid` instructions, and compile the handler."""
    found = importlib.util.find_spec("onnxruntime")
    if found is None or found.origin is None:
        sys.exit("onnxruntime is not installed")
    shutil.copytree(Path(found.origin).parent, folder / "onnxruntime", dirs_exist_ok=True)
    for library in (folder / "onnxruntime").rglob("*.so*"):
        data = bytearray(library.read_bytes())
        for address in instructions(library):  # where code lies in the file: the linker of the wheels maps it so
            if data[address : address + 2] != CPUID:
                sys.exit(f"{library.name} is laid out in another way")
            data[address : address + 2] = ILLEGAL
        library.write_bytes(data)
    source = folder / "handler.c"
    source.write_text(HANDLER, "utf-8")
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", str(source), "-o", str(handler)], check=True)


def instructions(library: Path) -> list[int]:
    """Return the addresses of all `cpuid` instructions of a library."""
    listed = subprocess.run(["objdump", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    return [int(address, 16) for address in re.findall(r"^\s*([0-9a-f]+):\t[^\t]*\tcpuid", listed, re.MULTILINE)]


if __name__ == "__main__":
    main()
