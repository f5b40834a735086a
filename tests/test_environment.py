"""Folders follow the environment variables; the machine is described as it is; nothing heavy is imported for it."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from compressor import environment

CPUINFO = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512_vnni avx512_bf16 fma\n"


def test_the_cache_is_where_it_is_asked_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "mine"))
    assert environment.cache_dir() == tmp_path / "mine"
    assert environment.weights_dir() == tmp_path / "mine" / "weights"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COMPRESSOR_CACHE", "~/mine")
    assert environment.cache_dir() == tmp_path / "mine"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPRESSOR_CACHE", "here")
    assert environment.cache_dir() == tmp_path / "here"
    assert not list(tmp_path.iterdir())  # naming a folder makes none


def test_without_a_wish_it_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert environment.cache_dir() == tmp_path / "xdg" / "compressor"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert environment.cache_dir() == tmp_path / ".cache" / "compressor"


def test_library_caches_go_there_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path))
    monkeypatch.setenv("NNCF_EXTENSION_LOAD_TIMEOUT", "5")
    unset = {"TORCH_EXTENSIONS_DIR": "torch_extensions", "TORCHINDUCTOR_CACHE_DIR": "torch_inductor"}
    for name in unset:
        monkeypatch.setenv(name, "x")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    environment.prepare_process()
    assert {name: os.environ[name] for name in unset} == {k: str(tmp_path / v) for k, v in unset.items()}
    assert os.environ["NNCF_EXTENSION_LOAD_TIMEOUT"] == "5"


def test_the_cpu_is_read_from_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: CPUINFO)
    monkeypatch.setattr(environment, "PACKAGES", ())  # installed packages are read as text too
    assert environment.cpu_flags() == {"fpu", "avx2", "avx512_vnni", "avx512_bf16", "fma"}
    assert environment.cpu_model() == "Some CPU @ 2 GHz"
    assert environment.describe()["isa"] == ["avx2", "avx512_bf16", "avx512_vnni", "fma"]
    monkeypatch.setattr(Path, "read_text", lambda self: "processor: 0\n")
    assert environment.cpu_flags() == frozenset()
    assert environment.cpu_model()


def test_a_system_without_proc_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", absent)
    assert environment.cpu_flags() == frozenset()
    assert environment.cpu_model() in (platform.processor(), platform.machine())


def test_versions_name_what_decides_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment.versions()
    assert {"python", "torch", "nncf", "openvino", "onnxruntime"} <= set(found)
    assert found["python"] == platform.python_version()
    monkeypatch.setattr(environment, "PACKAGES", ("numpy", "no-such-package"))
    assert set(environment.versions()) == {"python", "numpy"}


def test_the_description_is_json_and_counts_usable_processors() -> None:
    described = environment.describe()
    assert json.loads(json.dumps(described)) == described
    assert 1 <= environment.usable_cpus() <= (os.cpu_count() or 1)
    assert described["cpus"] == environment.usable_cpus()


def test_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, compressor.environment as e; e.describe()\n"
        "print([m for m in ('torch', 'numpy', 'openvino', 'psutil') if m in sys.modules])"
    )
    repository = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
