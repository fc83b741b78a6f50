"""What scripts/launch_tpu.sh asks of gcloud, a stand-in of which writes its arguments down."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "launch_tpu.sh"
GCLOUD = """#!/bin/bash
echo "$@" >> "$CALLS"
case "$*" in
*ssh*$FAILS*) exit 3 ;;
*describe*--format*) echo ACTIVE ;;
*describe*) exit 1 ;; # not queued yet
esac
"""


@pytest.mark.parametrize(
    ("slices", "nodes", "named", "fails", "status"),
    [
        (1, "--node-id jaxgpt", ["jaxgpt"], "no-node", 0),
        (2, "--node-count 2 --node-prefix jaxgpt", ["jaxgpt-0", "jaxgpt-1"], "no-node", 0),
        (2, "--node-count 2 --node-prefix jaxgpt", ["jaxgpt-0", "jaxgpt-1"], "jaxgpt-0", 3),
    ],
)
def test_every_host_of_every_slice_gets_the_command(slices, nodes, named, fails, status, tmp_path):
    script, gcloud, calls = tmp_path / "launch", tmp_path / "gcloud", tmp_path / "calls"
    script.write_text(SCRIPT.read_text().replace("slices=1", f"slices={slices}"))
    gcloud.write_text(GCLOUD)
    gcloud.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "FAILS": fails}
    command = ["bash", script, "--config.out_dir=/shared/a run"]
    assert subprocess.run(command, env=env, timeout=60).returncode == status
    created, *rest = [line for line in calls.read_text().splitlines() if "describe" not in line]
    assert f"create jaxgpt --project my-project --zone us-east5-b {nodes} --accelerator-type" in created
    set_up, started = rest[:slices], rest[slices:]
    assert {line.split()[4] for line in set_up} == set(named) and all("--worker=all" in line for line in set_up)
    if status:
        assert not started, "a slice that is not set up starts nothing"
    else:
        assert {line.split()[4] for line in started} == set(named)
        assert all(r"--config.out_dir=/shared/a\ run" in line for line in started)
