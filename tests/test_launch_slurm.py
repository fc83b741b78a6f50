"""When scripts/launch_slurm.sbatch queues itself again; stand-ins of SLURM's commands write their arguments down."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "launch_slurm.sbatch"
COMMANDS = {
    "srun": """while [[ $1 == --* ]]; do shift; done; exec "$@" """,
    "scontrol": """echo "scontrol $*" >> "$CALLS" """,
    ".venv/bin/python": """printf '%s\n' "$@" >> "$CALLS"; exit "$STATUS" """,
}
ONCE_MORE = {75: (0, 20), 69: (0,), 76: (0,), 137: (0,)}  # exit status: after how many starts it is queued again


@pytest.mark.parametrize("restarts", [0, 20])
@pytest.mark.parametrize("status", [0, 1, 2, 69, 75, 76, 77, 137, 143])
def test_what_may_go_on_is_queued_again(status, restarts, tmp_path):
    for name, command in COMMANDS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/bash\n{command}\n")
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "STATUS": str(status)}
    env |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    command = ["bash", SCRIPT, "--config.out_dir=/shared/a run"]
    assert subprocess.run(command, env=env, timeout=60).returncode == status
    started = ["-m", "jaxgpt.train", "--config.out_dir=/shared/a run", "--config.init_from=auto"]
    queued = ["scontrol requeue 7"] * (restarts in ONCE_MORE.get(status, ()))
    assert calls.read_text().splitlines() == started + queued
