"""The script for Slurm: what it starts on the nodes."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/train.slurm"
STUBS = {
    "scontrol": 'if [ "$1" = show ]; then echo node-1; echo node-2; else echo "$*" >> requeued; fi',
    "srun": 'echo "$*" > started; exit "$(cat status)"',
}


@pytest.fixture
def sbatch(tmp_path):
    """Runs the script as a job on stubs of Slurm. Returns the exit status, what it starts, and what it queues again."""

    def start(restarts=None, status=0):
        for name, program in STUBS.items():
            (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{program}\n")
            (tmp_path / name).chmod(0o755)
        (tmp_path / "status").write_text(str(status))
        (tmp_path / "venv/bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / "venv/bin/activate").touch()
        environment = {
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "VENV": "venv",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "node-[1-2]",
            "SLURM_JOB_ID": "7",
            **({} if restarts is None else {"SLURM_RESTART_COUNT": str(restarts)}),
        }
        arguments = ["bash", str(SCRIPT), "pretrain.yaml", "batch_size=64"]
        result = subprocess.run(arguments, env=environment, check=False)
        requeued = tmp_path / "requeued"
        return (
            result.returncode,
            (tmp_path / "started").read_text().split(" train ")[1].strip(),
            requeued.read_text().strip() if requeued.exists() else None,
        )

    return start


def test_a_job_that_is_queued_again_continues_if_there_is_a_checkpoint(sbatch):
    assert sbatch() == (0, "pretrain.yaml batch_size=64", None)
    assert sbatch(restarts=1) == (0, "pretrain.yaml batch_size=64 resume=auto", None)


def test_a_preempted_job_is_queued_again_and_a_failed_one_is_not(sbatch):
    assert sbatch(status=1)[::2] == (1, None)
    assert sbatch(status=75)[::2] == (75, "requeue 7")
