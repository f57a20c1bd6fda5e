"""The CUDA paths, on a machine without a GPU: what on_cuda.py promises.

A tensor of its says that it is on cuda:0, and torch then asks a device guard and hooks for that device which a CPU build
does not have. Here is a pretended pair, which does nothing. It must be there before torch is, so the tests are another
process's.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

GUARD = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
struct Guard final : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return {DeviceType::CUDA, 0}; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream) const noexcept override { return getStream(getDevice()); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}
namespace at {
struct Hooks : CUDAHooksInterface {
  Hooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}
"""


@pytest.fixture(scope="module")
def guard(tmp_path_factory) -> Path:
    """The pair as a library, compiled against the torch that is here."""
    if torch.version.cuda is not None or shutil.which("g++") is None:
        pytest.skip("this torch has a guard of its own" if torch.version.cuda else "g++ is absent, which builds one")
    folder = tmp_path_factory.mktemp("guard")
    (folder / "guard.cpp").write_text(GUARD)
    home = Path(torch.__file__).parent
    line = f"g++ -shared -fPIC -std=c++20 guard.cpp -o guard.so -I{home}/include -L{home}/lib -lc10 -ltorch_cpu"
    subprocess.run([*line.split(), f"-Wl,-rpath,{home}/lib"], cwd=folder, check=True)
    return folder / "guard.so"


@pytest.mark.parametrize("speed", ["not stress", pytest.param("stress", marks=pytest.mark.stress)])
def test_the_cuda_paths_hold_under_a_pretended_gpu(guard, speed):
    code = (
        f"import ctypes, sys; ctypes.CDLL({str(guard)!r}, ctypes.RTLD_GLOBAL); import pytest; sys.exit(pytest.main())"
    )
    line = [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", "-m", speed, "tests/on_cuda.py"]
    done = subprocess.run(line, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
