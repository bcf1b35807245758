"""The C++ part under sanitizers: reading or writing out of bounds and undefined behavior fail the test."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest

from tests.support.limits import PROCESS_S

FOLDER = Path(__file__).parent
SOURCE = FOLDER.parents[2] / "moelpr" / "data" / "csrc" / "language_bits.cpp"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1", "-shared", "-fPIC"]

# A read past the end of an array, which the sanitizers must find.
PLANTED = """
extern "C" int planted(int place) {
    int values[4] = {0, 1, 2, 3};
    int *volatile where = values;
    return where[place];
}
"""

RUN = """
import importlib.util, sys
import moelpr.data, pytest
spec = importlib.util.spec_from_file_location("moelpr.data._language_bits", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["moelpr.data._language_bits"] = moelpr.data._language_bits = module
from moelpr.data import language_bits
assert language_bits._language_bits.__file__ == sys.argv[1]
sys.exit(pytest.main(["-q", "--noconftest", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def compile_with_sanitizers(source: Path, output: Path, *words: str) -> None:
    done = subprocess.run(
        ["c++", *SANITIZE, *words, str(source), "-o", str(output)], capture_output=True, text=True, timeout=PROCESS_S
    )
    if done.returncode:
        pytest.skip(f"the compiler has no sanitizers: {done.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which Python, itself without sanitizers, runs libraries with them; checked with a planted bug."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.cpp").write_text(PLANTED)
    compile_with_sanitizers(folder / "planted.cpp", folder / "planted.so")
    names = "libasan.so", "libstdc++.so"  # the second: exceptions cross the first
    libraries = [subprocess.check_output(["c++", f"-print-file-name={name}"], text=True).strip() for name in names]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # otherwise small arrays are in Python's pools, where overruns go unnoticed
    }
    code = f"import ctypes, sys; ctypes.CDLL('{folder}/planted.so').planted(int(sys.argv[1]))"
    words = [sys.executable, "-c", code]
    fine, wrong = (subprocess.run([*words, n], env=environment, capture_output=True, text=True) for n in "35")
    if fine.returncode:
        pytest.skip(f"sanitizers can't be loaded into Python: {fine.stderr.strip().splitlines()[-1]}")
    assert wrong.returncode and "AddressSanitizer: stack-buffer-overflow" in wrong.stderr, wrong.stderr
    return environment


def test_the_tests_of_the_format_pass_under_sanitizers(environment: dict[str, str], tmp_path: Path) -> None:
    module = tmp_path / f"_language_bits{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    compile_with_sanitizers(SOURCE, module, "-std=c++17", "-fvisibility=hidden", *includes)
    tests = [str(FOLDER / "test_language_bits.py")]
    command, place = [sys.executable, "-c", RUN, str(module), *tests], FOLDER.parents[2]
    done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, timeout=PROCESS_S)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    assert " passed" in done.stdout
