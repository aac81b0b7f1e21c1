"""The package as others get it: sdist and wheel are whole, and work from an environment without the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import urllib.request
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def tracked(under: str) -> set[str]:
    """Files that git knows and that are there, relative to `under`."""
    listed = subprocess.run(["git", "ls-files", under], cwd=ROOT, check=True, capture_output=True, text=True)
    return {name.removeprefix("src/") for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


def test_the_wheel_holds_every_file_of_the_package_and_no_other(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in opened.namelist() if name.endswith("METADATA"))
        described = opened.read(metadata).decode()
    assert names == tracked("src/qwenscope")
    for part in (r"py\.typed", r"\.html\.j2", r"\.md\.j2", r"page/app\.js", r"recipes/.*\.yaml", r"content/.*\.yaml"):
        assert any(re.search(part, name) for name in names), part
    assert "qwenscope/lm/standin_model/model.safetensors" in names
    assert "Description-Content-Type: text/markdown" in described
    assert re.search(r"^Version: \d+\.\d+", described, re.MULTILINE)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel that was built from the sdist; what qwenscope needs comes from this one."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with tarfile.open(sdist) as opened:
        inside = {name.partition("/")[2] for name in opened.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "src/qwenscope/__init__.py"} <= inside
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True)
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    # A path alone: the editable installation there is not followed, and ours comes first.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "env" / "bin" / "qwenscope"


def qwenscope(installed: Path, folder: Path, arguments: Sequence[str]) -> str:
    """Run the installed command away from the checkout, offline, and return what it printed."""
    done = subprocess.run([installed, *arguments], cwd=folder, env=bare(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments}: {done.stderr}"
    return done.stdout


def bare() -> dict[str, str]:
    """An environment that names neither the checkout nor a network."""
    return {**{key: value for key, value in os.environ.items() if key != "PYTHONPATH"}, "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_the_installed_package_walks_from_training_to_steering(installed: Path, tmp_path: Path) -> None:
    where = [installed.with_name("python"), "-c", "import qwenscope; print(qwenscope.__file__, qwenscope.__version__)"]
    told = subprocess.run(where, cwd=tmp_path, env=bare(), check=True, capture_output=True, text=True).stdout
    file, version = told.split()
    assert Path(file).is_relative_to(installed.parents[1])
    assert version[0].isdigit()

    assert "stand-in" in qwenscope(installed, tmp_path, ["demo", "--help"])
    small = ["tokens=2048", "warmup_steps=1", "calibration_tokens=1024"]
    sets = [part for value in small for part in ("--set", f"training.{value}")]
    qwenscope(
        installed, tmp_path, ["train", "standin", "--out", "run", *sets, "--set", "activations.window_tokens=2048"]
    )
    steer = ["--sae", "sae_attn_mid", "--latent", "3", "--max-new-tokens", "2", "Book a table"]
    assert "steered" in qwenscope(installed, tmp_path, ["steer", "run", *steer])
    qwenscope(installed, tmp_path, ["index", "run", "--out", "index", "--tokens", "1000"])
    browse = [installed, "browse", "index", "--port", "0"]
    with subprocess.Popen(browse, cwd=tmp_path, env=bare(), stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            address = process.stderr.readline().split()[0]
            assert b"qwenscope" in urllib.request.urlopen(address).read()
        finally:
            process.terminate()
