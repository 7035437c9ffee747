"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for sm_90.

The interpreter has to be selected before triton is first imported, so its tests run in a separate process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")


def test_triton_kernels_in_the_interpreter():
    inner = Path(__file__).with_name("interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(inner)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


F32, BF16, I64, INT, FLOAT = "*fp32", "*bf16", "*i64", "i32", "fp32"
SIGNATURES = {
    "lse_update_kernel": (F32, INT, I64, F32, F32, F32, F32, INT, INT, FLOAT),
    "dlogits_kernel": (F32, INT, BF16, INT, I64, F32, F32, F32, F32, F32, INT, INT, FLOAT),
    "scale_kernel": (BF16, F32, INT),
    "errors_kernel": (BF16, INT, F32, INT, F32, BF16, INT, F32, INT),
}


@pytest.mark.parametrize("flags", [True, False])
@pytest.mark.parametrize("name", SIGNATURES)
def test_kernels_compile_for_a_gpu(name, flags, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mirage_dist.kernels import triton_rows, triton_steer

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_rows, name, None) or getattr(triton_steer, name)
    typed = dict(zip(kernel.arg_names, SIGNATURES[name], strict=False))
    constants = {n: 4096 if n == "BLOCK" else flags for n in kernel.arg_names if n.isupper()}
    source = ASTSource(
        fn=kernel,
        signature={n: typed.get(n, "constexpr") for n in kernel.arg_names},
        constexprs={(kernel.arg_names.index(n),): value for n, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 1})
    assert compiled.asm["cubin"]
    if name == "dlogits_kernel":
        # It overwrites its input in a narrower dtype: all reads of a tile come before its first write.
        loop = compiled.asm["ptx"].split("bar.sync")
        assert len(loop) == 2
        assert "st.global" not in loop[0]
        assert "ld.global" not in loop[1]
