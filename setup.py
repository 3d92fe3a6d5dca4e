"""Builds FlashCore: lib/libflashcore.so (the C core and its kernels, no Python) and _C.abi3.so, which links to it.

What is built depends on what is there:
    nvcc from CUDA_HOME, CUDA_PATH or the PATH      -> CPU and CUDA kernels
    no nvcc, but a GPU (or FLASHCORE_CUDA=1)        -> the same, with pip's CUDA 13 compiler as build requirements
    neither (or FLASHCORE_CUDA=0)                   -> CPU kernels alone

Environment:
    FLASHCORE_CUDA         0: never build CUDA kernels; 1: always, and fail where they cannot be built
    FLASHCORE_CUDA_ARCHS   "80 90a 75+PTX": machine code for sm_80 and sm_90a, PTX of compute_75 for the rest. Default:
                           the GPUs that are present; with none present, just that list
    FLASHCORE_STRICT       1: warnings, register spills and serialized wgmma fail the build
    FLASHCORE_SANITIZE     "address,undefined": instrument the C code
    MAX_JOBS, CC, CXX, NVCC  parallel compilers; which C compiler, C++ compiler and nvcc
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80 90a 75+PTX"
OLDEST_NVCC = (12, 4)
# All that nvcc needs to compile and to link statically; CCCL because cuda_fp16.h includes <nv/target>.
PIP_CUDA = ["nvcc", "nvvm", "crt", "runtime", "cccl"]
PIP_CUDA_REQUIREMENTS = [f"nvidia-{'nvvm' if part == 'nvvm' else 'cuda-' + part}==13.0.*" for part in PIP_CUDA]

STRICT = os.environ.get("FLASHCORE_STRICT") == "1"
SANITIZE = os.environ.get("FLASHCORE_SANITIZE", "")


def say(text: str) -> None:
    sys.stderr.write(f"flashcore: {text}\n")  # in one piece: several compilers report at once
    sys.stderr.flush()


def stop(text: str) -> SystemExit:
    return SystemExit(f"\nflashcore: {text}\n")


# ---- what is on this machine ----


def gpu_capabilities() -> list[str]:
    """Compute capabilities of the GPUs present, ["9.0"]; empty where there are none."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    run = subprocess.run([smi, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True)
    return sorted(set(re.findall(r"^\d+\.\d+$", run.stdout, re.M))) if run.returncode == 0 else []


def find_nvcc() -> Path | None:
    """The CUDA compiler: NVCC, CUDA_HOME, CUDA_PATH, the PATH, or pip's package, in this order."""
    if nvcc := os.environ.get("NVCC"):
        if (found := shutil.which(nvcc)) is None:
            raise stop(f"NVCC={nvcc} is no program; set it to nvcc's path or unset it.")
        return Path(found)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            if not (nvcc_path := Path(home, "bin", "nvcc")).exists():
                raise stop(f"{variable}={home} has no bin/nvcc; set it to a CUDA Toolkit, 12.4 or newer, or unset it.")
            return nvcc_path
    if found := shutil.which("nvcc"):
        return Path(found)
    return pip_nvcc()


def pip_nvcc() -> Path | None:
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or [] if spec else []:
        if (nvcc := Path(place, "cu13", "bin", "nvcc")).exists():
            return nvcc
    return None


def wants_cuda() -> bool | None:
    """FLASHCORE_CUDA: True, False, or None where it is not set."""
    match os.environ.get("FLASHCORE_CUDA", ""):
        case "":
            return None
        case "0":
            return False
        case "1":
            return True
        case other:
            raise stop(f"FLASHCORE_CUDA={other}; allowed: 0, 1, or unset.")


def cuda_requirements() -> list[str]:
    """pip's CUDA compiler, where nothing else would give one and CUDA kernels are wanted or of use."""
    if wants_cuda() is False or find_nvcc() is not None:
        return []
    return PIP_CUDA_REQUIREMENTS if wants_cuda() or gpu_capabilities() else []


@dataclass(frozen=True)
class Cuda:
    nvcc: Path
    version: tuple[int, int]
    include: Path
    static_runtime: Path
    archs: tuple[str, ...]  # "80", "90a", "75+PTX"

    def defines(self) -> list[str]:
        """What kernels.h must know: rows of variants.def for sm_90a alone exist only where that is a target."""
        return ["-DFC_WITH_CUDA=1", *(["-DFC_BUILD_90A=1"] if "90a" in self.archs else [])]

    @property
    def toolkit(self) -> tuple[str, str]:
        return str(self.nvcc.parent.parent), f"CUDA-{self.version}"

    @staticmethod
    def find() -> Cuda | None:
        if wants_cuda() is False:
            say("FLASHCORE_CUDA=0: building the CPU kernels alone.")
            return None
        nvcc = find_nvcc()
        if nvcc is None:
            if wants_cuda():
                raise stop(
                    "FLASHCORE_CUDA=1, but there is no nvcc. Install the CUDA Toolkit, 12.4 or newer, nvcc on PATH "
                    f"or in CUDA_HOME, or: pip install {' '.join(PIP_CUDA_REQUIREMENTS)}"
                )
            say("no nvcc and no GPU: building the CPU kernels alone. For the CUDA kernels too, set FLASHCORE_CUDA=1.")
            return None
        compiler = os.environ.get("CXX") or "g++"
        if shutil.which(compiler) is None:
            raise stop(
                f"nvcc needs a C++ compiler, and there is no {compiler}. Install it (apt install g++), or set "
                "FLASHCORE_CUDA=0."
            )
        version = nvcc_version(nvcc)
        if version < OLDEST_NVCC:
            raise stop(
                f"{nvcc} is CUDA {version[0]}.{version[1]}; 12.4 or newer is needed. Update it or set FLASHCORE_CUDA=0."
            )
        include, runtime = cuda_folders(nvcc)
        return Cuda(nvcc, version, include, runtime, choose_archs())


def nvcc_version(nvcc: Path) -> tuple[int, int]:
    run = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    found = re.search(r"release (\d+)\.(\d+)", run.stdout)
    if not found:
        raise stop(f"{nvcc} --version says no version: {(run.stdout + run.stderr).strip()[:300]}")
    return int(found[1]), int(found[2])


def cuda_folders(nvcc: Path) -> tuple[Path, Path]:
    """Where cuda_runtime_api.h and libcudart_static.a are: nvcc itself knows its toolkit's root."""
    dry = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null", "-o", "/dev/null"], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.M)
    roots = [Path(top[1].strip()) if top else nvcc.parent.parent, nvcc.resolve().parent.parent]
    includes = [
        root / folder for root in roots for folder in ("include", f"targets/{platform.machine()}-linux/include")
    ]
    libraries = [
        root / folder for root in roots for folder in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib")
    ]
    include = next((p for p in includes if (p / "cuda_runtime_api.h").exists()), None)
    library = next((p / "libcudart_static.a" for p in libraries if (p / "libcudart_static.a").exists()), None)
    if include is None or library is None:
        missing = "cuda_runtime_api.h" if include is None else "libcudart_static.a"
        raise stop(
            f"{nvcc} is there, but {missing} is not. Install the toolkit's runtime (pip: nvidia-cuda-runtime), or set "
            "FLASHCORE_CUDA=0."
        )
    return include, library


def choose_archs() -> tuple[str, ...]:
    """FLASHCORE_CUDA_ARCHS, else the GPUs present, else a list that serves every GPU from sm_75 on."""
    text = os.environ.get("FLASHCORE_CUDA_ARCHS") or ""
    if not text:
        # Hopper's own instructions need the 'a' target.
        present = [c.replace(".", "") for c in gpu_capabilities()]
        text = " ".join("90a" if c == "90" else c for c in present) or DEFAULT_ARCHS
    archs = tuple(arch.replace(".", "").replace("+ptx", "+PTX") for arch in re.split(r"[;,\s]+", text.strip()))
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", arch) or int(re.match(r"\d+", arch)[0]) < 75:
            raise stop(
                f"FLASHCORE_CUDA_ARCHS names {arch!r}; allowed: 75 and up, such as 80, 90a, 120 or 75+PTX, with spaces "
                "between."
            )
    return archs


# ---- what is to be built ----


@dataclass(frozen=True)
class Variant:
    """A row of kernels/variants.def."""

    op: str  # forward or backward
    family: str
    dtype: str
    head_dim: str
    mask: str
    block_m: str
    block_n: str
    threads: str
    arch: str

    @property
    def name(self) -> str:
        op = "" if self.op == "forward" else f"{self.op}_"
        return f"{self.family}_{op}{self.dtype}_d{self.head_dim}_{self.mask}_{self.block_m}x{self.block_n}"

    def serves(self, arch: str) -> bool:
        """Is a row for its arch to be compiled for this target? '90a' means that one alone."""
        target = arch.removesuffix("+PTX")
        return target == self.arch if self.arch.endswith("a") else int(target.rstrip("af")) >= int(self.arch)

    def defines(self) -> list[str]:
        return [f"-DFC_{field.upper()}={value}" for field, value in vars(self).items() if field not in ("op", "arch")]


def read_variants() -> list[Variant]:
    text = (ROOT / "kernels/variants.def").read_text()
    return [
        Variant("backward" if backward else "forward", *(column.strip() for column in row.split(",")))
        for backward, row in re.findall(r"^FC_(BACKWARD_)?VARIANT\(([^)]*)\)", text, re.M)
    ]


# Whose headers a source may include: a change of the C core's leaves the CUDA kernels as they are.
HEADER_FOLDERS = {".c": ["include", "kernels", "csrc"], ".cu": ["include", "kernels"]}
INCLUDES = {suffix: [f"-I{ROOT / folder}" for folder in folders] for suffix, folders in HEADER_FOLDERS.items()}


@dataclass(frozen=True)
class Compile:
    label: str
    command: list[str]
    source: Path
    output: Path
    toolkit: tuple[str, str] | None = None  # CUDA's folder, and the version that stands for it in the key

    def key(self) -> str:
        """Changes when the command, the source or any header that it may include does."""
        command = " ".join(self.command)
        if self.toolkit:  # pip's nvcc lies in another folder in each isolated build
            command = command.replace(self.toolkit[0], self.toolkit[1])
        digest = hashlib.sha256(command.encode())
        headers = (p for folder in HEADER_FOLDERS[self.source.suffix] for p in sorted((ROOT / folder).rglob("*")))
        for path in [self.source, *(p for p in headers if p.suffix in (".h", ".cuh", ".def"))]:
            digest.update(path.read_bytes())
        return digest.hexdigest()


C_FLAGS = ["-std=gnu11", "-O3", "-g1", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra", "-Wshadow=local"]
# Kernels: contract a*b+c into fused multiply-adds and trap on nothing, but honour NaN and infinity.
CPU_KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
ISA_FLAGS = {
    "forward_avx2.c": AVX2_FLAGS,
    "forward_avx512.c": AVX512_FLAGS,
    "backward_avx2.c": AVX2_FLAGS,
    "backward_avx512.c": AVX512_FLAGS,
}


def c_flags() -> list[str]:
    flags = [*C_FLAGS, *(["-Werror"] if STRICT else [])]
    if SANITIZE:
        flags += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1"]
    return flags


def revision(cuda: Cuda | None) -> str:
    """A digest of all that decides which kernel is fastest: the library's sources, and what compiles them for what."""
    digest = hashlib.sha256(f"{cuda.version} {cuda.archs}".encode() if cuda else b"")
    for folder in ("include", "csrc", "csrc/cpu", "kernels", "kernels/*"):
        for path in sorted(p for p in ROOT.glob(f"{folder}/*") if p.is_file()):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def c_compiles(compiler: list[str], temp: Path, cuda: Cuda | None) -> Iterable[Compile]:
    """The C core and the CPU kernels."""
    for source in sorted([*(ROOT / "csrc").glob("*.c"), *(ROOT / "csrc/cpu").glob("*.c")]):
        flags = [*c_flags(), *INCLUDES[".c"]]
        if source.parent.name == "cpu":
            flags += CPU_KERNEL_FLAGS
            if platform.machine() in ("x86_64", "AMD64"):
                flags += ISA_FLAGS.get(source.name, [])
        if source.name == "error.c":
            flags.append(f'-DFC_REVISION="{revision(cuda)}"')
        if cuda:
            flags += [*cuda.defines(), f'-DFC_CUDA_ARCHS="{" ".join(cuda.archs)}"', f"-I{cuda.include}"]
        output = temp / f"{source.parent.name}_{source.stem}.o"
        yield Compile(
            str(source.relative_to(ROOT)),
            [*compiler, *flags, "-c", str(source), "-o", str(output)],
            source,
            output,
            cuda and cuda.toolkit,
        )


def cuda_compiles(cuda: Cuda, temp: Path) -> Iterable[Compile]:
    """One for each row of variants.def, with machine code for every target that it serves."""
    for variant in read_variants():
        targets = [arch for arch in cuda.archs if variant.serves(arch)]
        if not targets:
            continue
        source = ROOT / "kernels" / variant.family / f"{variant.op}.cu"
        output = temp / f"{variant.name}.o"
        command = [
            str(cuda.nvcc),
            "-c",
            str(source),
            "-o",
            str(output),
            "-std=c++17",
            "-O3",
            "-lineinfo",
            "-Xfatbin=-compress-all",  # with -lineinfo's text more than half of the library; the driver unpacks it
            "-DNDEBUG",
            *INCLUDES[".cu"],
        ]
        command += [
            *cuda.defines(),
            *variant.defines(),
            "--expt-relaxed-constexpr",
            "-Xptxas",
            "-v",
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden",
        ]
        for arch in targets:
            number = arch.removesuffix("+PTX")
            kind = "compute" if arch.endswith("+PTX") else "sm"
            command += ["-gencode", f"arch=compute_{number},code={kind}_{number}"]
        yield Compile(f"{variant.name} for {' '.join(targets)}", command, source, output, cuda.toolkit)


def run_compile(job: Compile) -> tuple[float, str]:
    """Seconds taken (0.0: nothing had changed) and what the compiler said."""
    record = job.output.with_suffix(".key")
    key = job.key()
    if job.output.exists() and record.exists() and record.read_text() == key:
        return 0.0, ""
    record.unlink(missing_ok=True)
    start = time.monotonic()
    run = subprocess.run(job.command, capture_output=True, text=True)
    said = run.stdout + run.stderr
    if run.returncode != 0:
        raise stop(f"compiling {job.label} failed:\n  {shlex.join(job.command)}\n{said}")
    check_resources(job, said)
    record.write_text(key)
    return time.monotonic() - start, said


def check_resources(job: Compile, said: str) -> None:
    """ptxas on registers: spills and serialized wgmma cost speed silently; a dropped setmaxnreg makes a kernel hang."""
    dropped = re.findall(r".*(?:C7508|setmaxnreg' ignored).*", said)
    slow = [
        line
        for line in re.findall(r".*spill stores.*", said)
        if not re.search(r"\b0 bytes spill stores, 0 bytes spill loads", line)
    ]
    slow += re.findall(r".*Potential Performance Loss.*", said)
    for line in dropped + slow:
        say(f"{job.label}: {line.strip()}")
    if dropped or (slow and STRICT):
        raise stop(f"{job.label}: the kernel does not fit its registers as meant (above).")


def run_compiles(jobs: list[Compile]) -> None:
    """In parallel, a line of progress each; the largest first, so that they do not end alone."""
    workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    jobs = sorted(jobs, key=lambda job: job.source.suffix != ".cu")
    done = 0

    def one(job: Compile) -> None:
        nonlocal done
        seconds, said = run_compile(job)
        done += 1
        registers = re.findall(r"Used (\d+) registers", said)
        detail = f", {'/'.join(registers)} registers" if registers else ""
        say(f"[{done}/{len(jobs)}] {job.label} ({f'{seconds:.1f} s' if seconds else 'unchanged'}{detail})")
        warnings = [line for line in said.splitlines() if "warning" in line]
        for line in warnings:
            say(line)

    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(one, job) for job in jobs]:
            future.result()


class BuildFlashCore(build_ext):
    """The library first, then the extension that links to it."""

    def run(self) -> None:
        package = ROOT / "flashcore" if self.inplace else Path(self.build_lib).resolve() / "flashcore"
        library = package / "lib" / "libflashcore.so"
        self.build_library(library)
        header = package / "include" / "flashcore.h"
        header.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "include/flashcore.h", header)
        for extension in self.extensions:
            extension.library_dirs = [str(library.parent)]
        self.force = True  # setuptools does not know the extension's headers
        super().run()

    def build_library(self, library: Path) -> None:
        cuda = Cuda.find()
        compiler = shlex.split(os.environ.get("CC") or ("gcc" if shutil.which("gcc") else "cc"))
        if shutil.which(compiler[0]) is None:
            raise stop(f"there is no C compiler ({compiler[0]}). Install one (apt install gcc), or set CC.")
        # Not setuptools' build_temp: an editable install throws that away, and every kernel with it.
        temp = ROOT / "build" / ("objects-sanitize" if SANITIZE else "objects")
        temp.mkdir(parents=True, exist_ok=True)
        jobs = list(c_compiles(compiler, temp, cuda))
        if cuda:
            say(f"CUDA {cuda.version[0]}.{cuda.version[1]} kernels for {' '.join(cuda.archs)}, by {cuda.nvcc}")
            jobs += cuda_compiles(cuda, temp)
        start = time.monotonic()
        run_compiles(jobs)
        library.parent.mkdir(parents=True, exist_ok=True)
        # nvcc's host code needs a little of libstdc++ (guards of local statics); it goes in statically, and hidden.
        linker = [os.environ.get("CXX") or "g++", "-static-libstdc++", "-static-libgcc"] if cuda else compiler
        link = [
            *linker,
            "-shared",
            "-o",
            str(library),
            *(str(job.output) for job in jobs),
            "-Wl,-soname,libflashcore.so",
        ]
        link += ["-Wl,--exclude-libs,ALL", "-Wl,--as-needed"] + (
            [f"-fsanitize={SANITIZE}"] if SANITIZE else ["-Wl,-z,defs"]
        )
        if cuda:
            link += [str(cuda.static_runtime), "-ldl", "-lrt"]
        link += ["-lm", "-pthread"]
        run = subprocess.run(link, capture_output=True, text=True)
        if run.returncode != 0:
            raise stop(f"linking libflashcore.so failed:\n  {shlex.join(link)}\n{run.stdout + run.stderr}")
        say(f"libflashcore.so: {library.stat().st_size / 1e6:.1f} MB in {time.monotonic() - start:.0f} s")


def extension() -> Extension:
    import numpy

    return Extension(
        "flashcore._C",
        sources=[str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc/python").glob("*.c"))],
        include_dirs=[str(ROOT / "include"), str(ROOT / "csrc"), numpy.get_include()],
        define_macros=[("Py_LIMITED_API", "0x030B0000")],
        py_limited_api=True,
        libraries=["flashcore"],
        extra_compile_args=c_flags(),
        extra_link_args=["-Wl,-rpath,$ORIGIN/lib", *([f"-fsanitize={SANITIZE}"] if SANITIZE else [])],
    )


def version() -> str:
    return re.search(r'#define FC_VERSION "([^"]+)"', (ROOT / "include/flashcore.h").read_text())[1]


setup(
    version=version(),
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildFlashCore},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    setup_requires=cuda_requirements(),
)
