"""The sample job files are valid, and the batch script answers signals as it says (with our scontrol and torchrun)."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwenscope.recipe import packaged_recipes

EXAMPLES = Path(__file__).parents[2] / "examples"
SBATCH = EXAMPLES / "train.sbatch"
SKY: dict[str, Any] = yaml.safe_load((EXAMPLES / "train.sky.yaml").read_text())


def write_command(folder: Path, name: str, body: str) -> None:
    """An executable `name` that notes its arguments in `name`.log and runs `body`."""
    path = folder / name
    path.write_text(f'#!/bin/bash\necho "$@" >> "{folder}/{name}.log"\n{body}\n')
    path.chmod(0o755)


def said(folder: Path, name: str) -> str:
    log = folder / f"{name}.log"
    return log.read_text() if log.exists() else ""


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **more}


@pytest.fixture
def sbatch(tmp_path: Path) -> Any:
    """Start the batch script as Slurm would; torchrun runs until SIGTERM, unless it is told to end at once."""
    write_command(tmp_path, "scontrol", "")
    started: list[subprocess.Popen[bytes]] = []

    def start(torchrun: str) -> subprocess.Popen[bytes]:
        write_command(tmp_path, "torchrun", torchrun)
        command = ["bash", str(SBATCH), "standin", str(tmp_path / "run"), "--set", "seed=7"]
        started.append(subprocess.Popen(command, env=environment(tmp_path, SLURM_JOB_ID="42", SLURM_GPUS_ON_NODE="4")))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


UNTIL_TERM = """sleep 1000 &
trap "kill $!; exit 143" TERM
echo > "$(dirname "$0")/ready"
wait"""


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """A pipe: reading it waits until torchrun has come so far."""
    os.mkfifo(tmp_path / "ready")
    return tmp_path / "ready"


@pytest.mark.parametrize(
    ("signum", "queued"), [(signal.SIGUSR1, "requeue 42\n"), (signal.SIGTERM, "")], ids=["end of the slot", "cancelled"]
)
def test_a_signal_saves_and_only_the_end_of_a_slot_queues_again(
    sbatch: Any, ready: Path, tmp_path: Path, signum: int, queued: str
) -> None:
    process = sbatch(UNTIL_TERM)
    ready.read_text()
    process.send_signal(signum)
    assert process.wait(20) == 143
    assert said(tmp_path, "scontrol") == queued
    arguments = f"-m qwenscope train standin --out {tmp_path / 'run'} --resume --set seed=7\n"
    assert said(tmp_path, "torchrun") == f"--standalone --nproc-per-node=4 --max-restarts=3 {arguments}"


@pytest.mark.parametrize("code", [0, 6])
def test_a_job_that_ends_by_itself_passes_its_code_on(sbatch: Any, tmp_path: Path, code: int) -> None:
    assert sbatch(f"exit {code}").wait(20) == code
    assert said(tmp_path, "scontrol") == ""


def test_slurm_directives_precede_the_first_command() -> None:
    lines = SBATCH.read_text().splitlines()
    directives = [position for position, line in enumerate(lines) if line.startswith("#SBATCH")]
    first = next(position for position, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(directives) < first
    assert {line.split("=")[0] for line in lines if line.startswith("#SBATCH")} >= {
        "#SBATCH --signal",
        "#SBATCH --requeue",
    }


def test_the_sky_file_has_known_keys_and_a_packaged_recipe() -> None:
    assert set(SKY) == {"name", "resources", "workdir", "envs", "file_mounts", "setup", "run"}
    assert set(SKY["resources"]) == {"accelerators", "use_spot", "disk_size"}
    assert SKY["resources"]["use_spot"] is True
    assert SKY["envs"]["RECIPE"] in packaged_recipes()
    for script in (SKY["setup"], SKY["run"]):
        subprocess.run(["bash", "-n"], input=script.encode(), check=True)


def run_sky(folder: Path, home: Path) -> subprocess.CompletedProcess[bytes]:
    variables = environment(folder, HOME=str(home), RECIPE="standin", SKYPILOT_NUM_GPUS_PER_NODE="8")
    script = SKY["run"].replace("/bucket", str(folder / "bucket"))
    return subprocess.run(["bash"], input=script.encode(), env=variables, timeout=20, capture_output=True, check=False)


def test_the_sky_run_brings_back_what_is_kept_and_keeps_what_is_new(tmp_path: Path) -> None:
    bucket, home = tmp_path / "bucket", tmp_path / "home"
    old = bucket / "checkpoints" / "step-00000002"
    old.mkdir(parents=True)
    (old / "state.json").write_text("2")
    home.mkdir()
    write_command(
        tmp_path,
        "torchrun",
        'cat "$HOME/run/checkpoints/step-00000002/state.json" || exit 1\n'
        'mkdir -p "$HOME/run/checkpoints/step-00000004" "$HOME/run/checkpoints/.step-6.tmp" "$HOME/run/saes/sae_a"\n'
        'echo 4 > "$HOME/run/checkpoints/step-00000004/state.json"\n'
        'echo {} > "$HOME/run/status.json"; echo w > "$HOME/run/saes/sae_a/weights.safetensors"',
    )
    done = run_sky(tmp_path, home)
    assert done.returncode == 0, done.stderr
    assert said(tmp_path, "torchrun").endswith(f"-m qwenscope train standin --out {home}/run --resume\n")
    kept = {str(path.relative_to(bucket)) for path in bucket.rglob("*") if path.is_file()}
    assert kept == {
        "checkpoints/step-00000002/state.json",
        "checkpoints/step-00000004/state.json",
        "status.json",
        "saes/sae_a/weights.safetensors",
    }


def test_a_failed_sky_run_fails(tmp_path: Path) -> None:
    write_command(tmp_path, "torchrun", "exit 6")
    assert run_sky(tmp_path, tmp_path).returncode == 6
