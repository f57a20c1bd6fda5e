"""The CUDA paths, on a machine without a GPU: what on_cuda.py promises.

A tensor of its says that it is on cuda:0, and torch then asks a device guard and hooks for that device which a CPU build
does not have. Here is a pretended pair, which does nothing. It must be there before torch is, so the tests are another
process's.
"""

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
    if shutil.which("g++") is None:
        pytest.skip("g++ is absent, which compiles the pretended GPU")
    folder = tmp_path_factory.mktemp("guard")
    (folder / "guard.cpp").write_text(GUARD)
    home = Path(torch.__file__).parent
    line = f"g++ -shared -fPIC -std=c++20 guard.cpp -o guard.so -I{home}/include -L{home}/lib -lc10 -ltorch_cpu"
    subprocess.run([*line.split(), f"-Wl,-rpath,{home}/lib"], cwd=folder, check=True)
    return folder / "guard.so"


def passes(code: str, *flags: str) -> None:
    """Whether on_cuda.py's tests pass in a process that begins with this code."""
    line = [
        sys.executable,
        "-c",
        f"{code}; import pytest, sys; sys.exit(pytest.main())",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run([*line, *flags, "tests/on_cuda.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has the guard of real GPUs")
@pytest.mark.parametrize("speed", ["not stress", pytest.param("stress", marks=pytest.mark.stress)])
def test_the_cuda_paths_hold_under_a_pretended_gpu(guard, speed):
    passes(f"import ctypes; ctypes.CDLL({str(guard)!r}, ctypes.RTLD_GLOBAL)", "-m", speed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_every_command_gives_on_a_gpu_what_it_gives_on_the_cpu():
    passes("pass", "-m", "stress or not stress", "-k", "gives")
