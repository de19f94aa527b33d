"""Compiles a device source with NVRTC, for one architecture after another.

    nvrtc.py LIBNVRTC SOURCE INCLUDE... -- ARCHITECTURE...

ARCHITECTURE is compute_NN (PTX) or sm_NN (machine code); one that this NVRTC does not know is left out. Prints a line
for each, and ends with 1 when one failed or none was left.
"""
import ctypes
import sys

INVALID_OPTION = 5


def log(nvrtc, program):
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, text)
    return text.value.decode(errors="replace").strip()


def compile_for(nvrtc, path, source, includes, architecture):
    """None where the architecture is unknown, "" for success, else what went wrong."""
    program = ctypes.c_void_p()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, path.encode(), 0, None, None) != 0:
        return "nvrtcCreateProgram failed"
    options = [f"--gpu-architecture={architecture}", "--std=c++17"]
    options += [f"-I{include}" for include in includes]
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    code = nvrtc.nvrtcCompileProgram(program, len(options), array)
    text = log(nvrtc, program)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if code == INVALID_OPTION and "architecture" in text:
        return None
    if code != 0:
        return text or f"nvrtcCompileProgram gave {code}"
    # A warning is a failure too, but for the one that all new versions give for old architectures.
    warnings = [line for line in text.splitlines() if "Architectures prior to" not in line]
    return "\n".join(warnings)


def main():
    split = sys.argv.index("--")
    library, path, *includes = sys.argv[1:split]
    nvrtc = ctypes.CDLL(library)
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    with open(path, "rb") as file:
        source = file.read()
    done = failed = 0
    for architecture in sys.argv[split + 1 :]:
        result = compile_for(nvrtc, path, source, includes, architecture)
        if result is None:
            result = "unknown to this version"
        elif result:
            failed += 1
        else:
            done += 1
            result = "ok"
        print(f"NVRTC {major.value}.{minor.value}, {architecture}: {result}")
    sys.exit(1 if failed or not done else 0)


main()
