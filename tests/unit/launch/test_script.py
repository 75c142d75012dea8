"""What the job script does, run by bash with stand-ins for Slurm's commands."""

import os
import subprocess
from pathlib import Path

import pytest

from megasd.cli import main
from tests.unit.workspace import make_workspace, write

# Each task of a step is started; the step ends as the worst of them.
SRUN = r"""#!/bin/bash
echo "$*" >>srun.calls
while [ "$1" != bash ]; do
    case $1 in --ntasks=*) n=${1#*=} ;; --ntasks-per-node=*) per=${1#*=} ;; esac
    shift
done
worst=0
export JOB=$PPID
for ((i = 0; i < n; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$((i % per)) SLURM_NTASKS=$n "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do
    wait "$task" || worst=$?
done
exit "$worst"
"""
SCONTROL = r"""#!/bin/bash
echo "$*" >>scontrol.calls
case "$*" in
    "show hostnames"*) printf 'n1\nn2\n' ;;
    "show node"*) echo "NodeName=n1 NodeAddr=127.0.0.1 " ;;
    "") # commands from stdin, of which the last one fails where there is `lost`
        cat >>scontrol.calls
        [ ! -e lost ] || { sed -i '$d' scontrol.calls; echo "Job is pending" >&2; exit 1; } ;;
esac
"""
# The words of `squeue` in turn, an error for those in brackets.
SQUEUE = r"""#!/bin/bash
echo "$*" >>squeue.calls
word=$(sed -n "$(wc -l <squeue.calls)p" squeue.answers)
case $word in
    \[*) echo "slurm_load_jobs error: ${word//[][]/}" >&2; exit 1 ;;
    *) echo "$word" ;;
esac
"""
# A rank ends with the code in `code`; an engine's agent the first time with 1.
PYTHON = r"""#!/bin/bash
who=rank$RANK
[[ $* == *vllm.host* ]] && who=engine$SLURM_PROCID
said="${CUDA_VISIBLE_DEVICES-none} $(ulimit -Sn) ${FROM_SETUP-none}"
echo "$said $TORCH_FR_DUMP_TEMP_FILE" >>"$who"
if [ "$who" = "rank$RANK" ]; then
    until [ "$(cat engine* 2>/dev/null | wc -l)" -ge "${STARTS-0}" ]; do /bin/sleep 0.02; done
    [ -z "${CANCELLED-}" ] || kill -TERM "$JOB"
    exit "$(cat code)"
fi
[ "$(wc -l <"$who")" = 2 ]
"""
UNREACHABLE = "[Unable to contact slurm controller (connect failure)]"


@pytest.fixture(autouse=True)
def _inside_a_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_workspace(tmp_path))
    Path("bin").mkdir()
    stand_ins = {"srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE, "python": PYTHON}
    for name, text in {**stand_ins, "sleep": "#!/bin/bash\n", "sbatch": "#!/bin/bash\n"}.items():
        write(f"bin/{name}", text)
        Path("bin", name).chmod(0o755)
    write("code", "0")


class Job:
    """One attempt of a job, from beginning to end."""

    def __init__(
        self,
        capsys: pytest.CaptureFixture[str],
        site: str = "",
        *arguments: str,
        avoids: str = "",
        **env: str,
    ) -> None:
        write("site.yaml", f"python: {Path.cwd()}/bin/python\npreflight: false\n{site}")
        given = ["--site=site.yaml", "--gpus-per-node=2", "--dry-run", *arguments]
        assert main(["submit", "config.yaml", *given]) == 0, capsys.readouterr().err
        script = capsys.readouterr().out
        assert script.count("\navoid=\n") == 1
        write("job.sh", script.replace("\navoid=\n", f"\navoid={avoids}\n"))
        Path("runs/tried/submissions/001").mkdir(parents=True, exist_ok=True)
        environment = {"PATH": f"{Path.cwd()}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        environment |= {"SLURM_JOB_NODELIST": "n[1-2]", **env}
        done = subprocess.run(
            ["bash", "job.sh"], env=environment, capture_output=True, text=True, timeout=60
        )
        self.code = done.returncode
        self.log = done.stdout + done.stderr


def called(name: str) -> list[str]:
    file = Path(f"{name}.calls")
    return file.read_text().splitlines() if file.exists() else []


def test_setup_lines_may_look_at_unset_variables_and_use_any_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write("activate.sh", 'if [ -n "$NOBODY_SET_THIS" ]; then :; fi\nfalse | cat\nset -eu\n')
    site = "setup: |\n  source activate.sh\n  export FROM_SETUP=yes\n"
    job = Job(capsys, site)
    assert (job.code, "the ranks ended with 0" in job.log) == (0, True), job.log
    assert Path("rank1").read_text().split()[2] == "yes"
    assert "setup" not in job.log


def test_a_setup_that_fails_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(capsys, "setup: |\n  cd /nowhere/at/all\n  export FROM_SETUP=yes\n")
    assert "setup: ended with 1: cd /nowhere/at/all" in job.log
    assert job.code == 0  # what may be missing is the site's to know
    job = Job(capsys, "setup: |\n  set -e\n  cd /nowhere/at/all\n")
    assert "setup: ended the job with 1 at: cd /nowhere/at/all" in job.log
    assert job.code == 1


def test_a_saved_run_goes_back_to_the_queue_though_slurm_is_away_for_a_while(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write("code", "85")
    write("squeue.answers", f"{UNREACHABLE}\n" * 3 + "RUNNING\n")
    job = Job(capsys)
    assert "squeue fails, asking again for a while: slurm_load_jobs error: Unable" in job.log
    assert "requeue 7" in called("scontrol"), job.log
    assert len(called("squeue")) == 4


def test_nodes_are_left_out_though_slurm_goes_away_behind_the_requeue(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write("code", "1")
    write("squeue.answers", "RUNNING\n")
    write("lost", "")
    job = Job(capsys, avoids="n1")
    assert called("scontrol")[-2:] == ["requeue 7", "update jobid=7 excnodelist=n1"], job.log
    assert "refuses to requeue" not in job.log


@pytest.mark.parametrize("state", ["COMPLETING", "[Invalid job id specified]", ""])
def test_a_job_that_is_cancelled_is_not_requeued(
    state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write("code", "85")
    write("squeue.answers", f"{state}\nRUNNING\n")
    job = Job(capsys)
    assert (job.code, len(called("squeue"))) == (143, 1), job.log
    assert "no requeue" in job.log
    assert "requeue 7" not in called("scontrol")


def test_a_cancelled_job_whose_ranks_save_in_time_stays_cancelled(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Slurm sends TERM to all; its queue may be late to know."""
    write("code", "85")
    write("squeue.answers", "RUNNING\n" * 9)
    job = Job(capsys, CANCELLED="yes")
    assert "the ranks ended with 85 after TERM" in job.log
    assert (job.code, "requeue 7" in called("scontrol")) == (143, False), job.log


def test_a_run_that_a_person_stopped_is_not_started_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write("code", "130")
    job = Job(capsys)
    assert (job.code, called("squeue")) == (130, []), job.log
    assert "submit again to go on" in job.log


def test_every_engine_of_a_node_has_gpus_of_its_own_whatever_slurm_sets(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And an agent that dies is started again; and its cores are a share of its node's."""
    server = ["rollout.engine=vllm", "rollout.vllm.placement=server", "rollout.vllm.engines=2"]
    server += ["rollout.vllm.tensor=2", "--gpus-per-node=4", "--image=i", f"--mount={Path.cwd()}"]
    site = "gpu_request: none\ncpus_per_task: 12\n"
    for visible, expected in (
        ({}, ["0,1", "2,3"]),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, ["4,5", "6,7"]),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, ["0,1", "0,1"]),  # each task sees only its own
    ):
        for number in (0, 1):
            Path(f"engine{number}").unlink(missing_ok=True)
        Job(capsys, site, *server, STARTS="4", **visible)
        for number, gpus in enumerate(expected):
            starts = [line.split()[0] for line in Path(f"engine{number}").read_text().splitlines()]
            assert starts == [gpus, gpus]
    engines = next(line for line in called("srun") if "--job-name=engines" in line)
    ranks = next(line for line in called("srun") if "--job-name=train" in line)
    assert "--cpus-per-task=24 " in engines
    assert "--cpus-per-task=12 " in ranks


def test_ranks_may_open_many_files_and_leave_what_nccl_was_at(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Job(capsys, "setup: ulimit -Sn 512\n")
    _, files, _, dump = Path("rank0").read_text().split()
    assert files == "unlimited" or int(files) > 1024
    assert dump == f"{Path.cwd()}/runs/tried/logs/7-0/nccl-rank-"
