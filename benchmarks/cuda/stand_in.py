"""Stand-ins for the CUDA libraries: onnxruntime-gpu shows where it would place nodes on a machine without a GPU.

onnxruntime decides the placement of a graph's nodes before it runs any: from its kernel registry and the provider's own
exceptions. Loading the CUDA provider needs libcudart, libcublas, libcudnn and the driver, and asks them little. The
libraries built here answer that little: one device, memory from the host's heap, success everywhere. They compute
nothing, so a session that was made with them must not be run, and they say nothing about speed or results.

Needs gcc and binutils. Written for CUDA 13, which onnxruntime-gpu 1.31 is built for.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

# Functions whose answer matters. Field offsets are those of CUDA 13's cudaDeviceProp, of 1008 bytes.
_RUNTIME = r"""
#include <stdlib.h>
#include <string.h>
static int block(void **out, size_t size) { *out = calloc(1, size ? size : 1); return 0; }
static void put(char *properties, int offset, int value) { memcpy(properties + offset, &value, sizeof value); }
int cudaGetDeviceCount(int *out) { *out = 1; return 0; }
int cudaGetDevice(int *out) { *out = 0; return 0; }
int cudaGetDeviceProperties(char *out, int device) {
    memset(out, 0, 1008);
    put(out, 308, 32); put(out, 320, 1024); put(out, 360, 9); put(out, 364, 0); put(out, 384, 132);
    return 0;
}
int cudaDeviceGetAttribute(int *out, int attribute, int device) {
    *out = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : 1024;
    return 0;
}
int cudaMemGetInfo(size_t *available, size_t *total) { *available = *total = (size_t)1 << 36; return 0; }
int cudaRuntimeGetVersion(int *out) { *out = 13000; return 0; }
int cudaDriverGetVersion(int *out) { *out = 13000; return 0; }
int cudaPointerGetAttributes(char *out, const void *pointer) { memset(out, 0, 88); return 0; }
int cudaMalloc(void **out, size_t size) { return block(out, size); }
int cudaMallocHost(void **out, size_t size) { return block(out, size); }
int cudaHostAlloc(void **out, size_t size, unsigned flags) { return block(out, size); }
int cudaStreamCreate(void **out) { return block(out, 64); }
int cudaStreamCreateWithFlags(void **out, unsigned flags) { return block(out, 64); }
int cudaEventCreate(void **out) { return block(out, 64); }
int cudaEventCreateWithFlags(void **out, unsigned flags) { return block(out, 64); }
int cudaFree(void *block) { free(block); return 0; }
int cudaFreeHost(void *block) { free(block); return 0; }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) { memcpy(to, from, size); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    memcpy(to, from, size);
    return 0;
}
int cudaMemset(void *to, int value, size_t size) { memset(to, value, size); return 0; }
int cudaMemsetAsync(void *to, int value, size_t size, void *stream) { memset(to, value, size); return 0; }
const char *cudaGetErrorString(int code) { return "stand-in"; }
const char *cudaGetErrorName(int code) { return "stand-in"; }
void **__cudaRegisterFatBinary(void *binary) { return calloc(1, 64); }
"""
# The registry lists TensorRT's kernels too, whose provider dereferences what these give it.
_TENSORRT = r"""
static void *table[512];
static void **object = table;
static long nothing(void) { return 0; }
__attribute__((constructor)) static void fill(void) { for (int i = 0; i < 512; i++) table[i] = (void *)nothing; }
int getInferLibVersion(void) { return 101000; }
"""


def build(capi: Path, folder: Path) -> Path:
    """Compile the stand-ins for the libraries that the providers in `capi` (onnxruntime/capi) link to.

    Returns:
        `folder`: put it into LD_LIBRARY_PATH before Python starts.
    """
    cuda, tensorrt = capi / "libonnxruntime_providers_cuda.so", capi / "libonnxruntime_providers_tensorrt.so"
    wanted = _undefined(cuda) | (_undefined(tensorrt) if tensorrt.exists() else set())
    by_library: dict[str, set[str]] = {}
    for symbol in wanted:
        name, _, library = symbol.partition("@")
        by_library.setdefault(library, set()).add(name)
    runtime = {name for library, names in by_library.items() if library.startswith("libcudart") for name in names}
    for library, names in by_library.items():
        if library.startswith(("libcudart", "libcublas")):
            own = _RUNTIME if library.startswith("libcudart") else ""
            _compile(folder, library, own, names, versioned=True)
    if not runtime:
        raise RuntimeError(f"{cuda} links to no libcudart: not the build this was written for")
    # cuDNN is opened by name, so its functions stand in the file as text.
    loaded = set(re.findall(rb"\0(cudnn[A-Z]\w+)\0", cuda.read_bytes()))
    _compile(folder, "libcudnn.so.9", "", {name.decode() for name in loaded}, versioned=True)
    _compile(folder, "libcurand.so.10", "", set())
    _compile(folder, "libcuda.so.1", "", {name for name in by_library.get("", ()) if name.startswith("cuTensorMap")})
    for library in ("libnvinfer.so.10", "libnvonnxparser.so.10"):
        makers = {name for name in by_library.get("", ()) if name.endswith("_INTERNAL") or name == "getPluginRegistry"}
        objects = "".join(f"void *{name}(void) {{ return &object; }}\n" for name in sorted(makers))
        _compile(folder, library, _TENSORRT + objects, set())
    return folder


def _undefined(library: Path) -> set[str]:
    """Symbols that a library takes from others, as ``name@library`` where a version names one."""
    listed = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    )
    return {line.split()[-1] for line in listed.stdout.splitlines()}


def _compile(folder: Path, library: str, own: str, names: set[str], versioned: bool = False) -> None:
    """One library: the functions of `own`, and for the other `names` functions that report success."""
    defined = set(re.findall(r"(\w+)\s*\(", own))
    lines = []
    for name in sorted(names - defined):
        if "Create" in name and not name.startswith("cuda"):
            lines.append(f"int {name}(void **out) {{ static char handle[4096]; *out = handle; return 0; }}")
        elif name == "cudnnGetVersion":
            lines.append(f"unsigned long {name}(void) {{ return 91000; }}")
        elif name.endswith(("String", "StatusName")):
            lines.append(f'const char *{name}(int code) {{ return "stand-in"; }}')
        else:
            lines.append(f"int {name}() {{ return 0; }}")
    source = folder / f"{library}.c"
    source.write_text(own + "\n".join(lines) + "\n")
    command = ["gcc", "-w", "-shared", "-fPIC", str(source), f"-Wl,-soname,{library}", "-o", str(folder / library)]
    if versioned:
        script = folder / f"{library}.map"
        script.write_text(f"{library} {{ global: *; }};\n")
        command.append(f"-Wl,--version-script={script}")
    subprocess.run(command, check=True)
