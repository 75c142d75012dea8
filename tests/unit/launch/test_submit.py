"""`megasd submit` without Slurm: what it refuses, and the script that it would submit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megasd.cli import main
from megasd.configuration.load import load_config, to_yaml
from megasd.launch.site import Site, check_site, seconds
from megasd.launch.timing import Timing
from megasd.metrics.run_folder import CONFIG_FILE
from tests.unit.workspace import make_model, make_workspace, write

SHELLCHECK = Path(sys.executable).with_name("shellcheck")
SITES = Path(__file__).parents[3] / "slurm" / "sites"


@pytest.fixture(autouse=True)
def _inside_a_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_workspace(tmp_path))


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines of the script."""
    assert main(["submit", "config.yaml", "--dry-run", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out.splitlines()


def refusals(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["submit", "config.yaml", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    return [line.removeprefix("megasd: error: ") for line in lines]


def test_a_dry_run_prints_the_script_and_leaves_nothing_behind(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = dry_run(capsys, "--nodes", "4", "--gpus-per-node", "2", "parallel.tensor=2")
    asked = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert {"nodes=4", "ntasks-per-node=2", "gpus-per-node=2", "time=4:00:00"} <= set(asked)
    assert {"signal=B:USR1@300", "requeue", "dependency=singleton"} <= set(asked)
    assert f"chdir={Path.cwd()}" in asked
    assert f"output={Path.cwd()}/runs/tried/logs/%j.log" in asked
    assert "# run tried: 4 nodes x 2 GPUs = 8 ranks" in lines
    assert not Path("runs").exists()


def test_flags_go_before_the_site_file_and_add_to_its_lists(
    capsys: pytest.CaptureFixture[str],
) -> None:
    site = {"partition": "slow", "account": "we", "gpus_per_node": 4, "mem": None}
    site |= {"environment": {"A": "1", "B": "2"}, "directives": {"constraint": "h100", "nice": ""}}
    write("site.yaml", to_text(site))
    flags = ["--site=site.yaml", "--partition=fast", "--env=B=3", "--env=C=it's"]
    lines = dry_run(capsys, *flags, "--time=1-0")
    for line in ("partition=fast", "account=we", "gpus-per-node=4", "constraint=h100", "nice"):
        assert f"#SBATCH --{line}" in lines
    assert "#SBATCH --time=1-0" in lines
    assert not any("--mem" in line for line in lines)
    exports = [line for line in lines if line.startswith(("export A", "export B", "export C"))]
    assert exports == ["export A=1", "export B=3", "export C='it'\"'\"'s'"]


def test_text_of_a_site_file_is_what_was_written(capsys: pytest.CaptureFixture[str]) -> None:
    """To YAML 1.1 the times are 43200 and 7200: as minutes, a month and five days."""
    text = "time: 12:00:00\naccount: 0123\nmem: 0\nmpi: no\npartition: 1e3\n"
    text += "srun: [--kill=on, 010]\n"
    text += "directives: {time-min: 2:00:00, nice: 010, begin: 2026-01-01}\n"
    text += "environment: {ON: yes, A: 1e3, B: 0123, C: 1:30, D: 2026-01-01, E: '${HOME}', F: 1.50}"
    write("site.yaml", text)
    lines = dry_run(capsys, "--site=site.yaml")
    asked = ("time=12:00:00", "account=0123", "mem=0", "partition=1e3", "time-min=2:00:00")
    for line in (*asked, "nice=010", "begin=2026-01-01"):
        assert f"#SBATCH --{line}" in lines
    for line in ("ON=yes", "A=1e3", "B=0123", "C=1:30", "D=2026-01-01", "E='${HOME}'", "F=1.50"):
        assert f"export {line}" in lines
    assert any(" --mpi=no " in line and " --kill=on 010" in line for line in lines)
    write("site.yaml", "gpus_per_node: 1:30\nenvironment: {A: null}\ntime: [1]\n")
    assert {*refusals(capsys, "--site=site.yaml")} >= {
        'site.yaml: gpus_per_node: got "1:30"; write a whole number',
        'site.yaml: environment: got {"A": null}; write a section whose values are text, like '
        "{A: b}",
        "site.yaml: time: got [1]; write text",
    }


def to_text(values: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(values)


def test_both_kinds_of_impossible_layout_are_refused_with_node_counts_that_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = refusals(capsys, "--nodes=3", "--gpus-per-node=2", "parallel.tensor=4")
    assert len(said) == 3
    assert "parallel.tensor: 4 does not divide the 2 key-value heads" in said[1]
    assert "which do not divide the world size 6" in said[0]
    assert said[2] == ("command line: --nodes 3: with 2 GPUs per node these would fit: 2, 4, 8, 16")


def test_every_fault_of_config_site_flags_and_paths_is_said_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    site = {"partitoin": "x", "gpus_per_node": "many", "shared": ["/shared"]}
    write("site.yaml", to_text({**site, "preflight": "perhaps", "network_gb_per_second": 0}))
    said = "\n".join(
        refusals(
            *(capsys, "--site=site.yaml", "--time=5", "--env=B", "--mount=here", "--nodes=2"),
            *("run.steps=0", "data.files=[none.jsonl]"),
        )
    )
    for sentence in (
        "site.yaml: partitoin: unknown key; did you mean partition?",
        'site.yaml: gpus_per_node: got "many"; write a whole number',
        'site.yaml: preflight: got "perhaps"; write true or false',
        "site.yaml: network_gb_per_second: 0.0 is out of range; set it above 0",
        "command line: --env B: not KEY=VALUE",
        "command line: time: the limit of 300 s leaves nothing to train",
        "command line: mounts: there is no image",
        "command line: mounts: here: here is not an absolute path",
        "command line: run.steps: 0 is out of range",
        "command line: data.files: ",
        "config.yaml: model.path: ",
    ):
        assert sentence in said, f"{sentence}\n not in\n{said}"
    assert "is under none of the folders that all nodes see (/shared" in said


def test_what_bash_or_sbatch_would_take_for_something_else_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    site = {"account": "a\nb", "directives": {"comment": "x\ny"}, "environment": {"Ä": "1"}}
    write("site.yaml", to_text(site))
    said = "\n".join(refusals(capsys, "--site=site.yaml"))
    for sentence in (
        "site.yaml: account: 'a\\nb' has a line break",
        "site.yaml: directives.comment: 'x\\ny' has a line break",
        "site.yaml: environment: 'Ä' is not the name of a variable",
    ):
        assert sentence in said


def test_what_a_container_would_not_see_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    here = Path.cwd()
    said = refusals(capsys, "--image=i.sqsh", f"--mount={here}/model", f"--mount={here}:/work")
    assert any("run.directory" in sentence for sentence in said)
    assert not any("model.path" in sentence for sentence in said)
    lines = "\n".join(dry_run(capsys, "--image=i.sqsh", f"--mount={here}"))
    assert f"--container-image=i.sqsh --container-mounts={here}:{here}" in lines
    assert "train=(python -m megasd.cli train" in lines


def test_a_run_that_began_goes_on_if_it_is_still_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = ["rollout.temperature=0.9"]
    folder = Path("runs/tried")
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(to_yaml(load_config("config.yaml", overrides)))
    assert "# resumed run tried: 1 node x 8 GPUs = 8 ranks" in dry_run(
        capsys, *overrides, "run.steps=20"
    )
    (said,) = refusals(capsys, "--dry-run", "rollout.temperature=0.8")
    assert said.startswith("command line: rollout.temperature: differs from ")


def test_engines_on_servers_get_nodes_behind_those_of_the_ranks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = ["rollout.engine=vllm", "rollout.vllm.placement=server", "rollout.vllm.engines=3"]
    container = ["--image=i.sqsh", f"--mount={Path.cwd()}"]
    lines = dry_run(capsys, *server, *container, "--gpus-per-node=4", "rollout.vllm.tensor=2")
    assert "#SBATCH --nodes=3" in lines
    summary = "# run tried: 1 node x 4 GPUs = 4 ranks, and 3 engines of 2 GPUs on 2 nodes"
    assert summary in lines
    assert any("--relative=1 --nodes=2 --ntasks=3" in line for line in lines)
    assert any("--relative=0 --nodes=1 --ntasks=4" in line for line in lines)
    said = refusals(capsys, *server, *container, "--gpus-per-node=1", "rollout.vllm.tensor=2")
    assert any("an engine of 2 GPUs does not fit on a node of 1" in sentence for sentence in said)


def test_colocated_engines_lie_within_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["rollout.engine=vllm", "--image=i.sqsh", f"--mount={Path.cwd()}", "--nodes=2"]
    run += ["rollout.prompts_per_step=24"]
    for gpus, tensor, fitting in ((2, 4, "1, 2"), (6, 4, "1, 2"), (3, 2, "1")):
        (said,) = refusals(capsys, *run, f"--gpus-per-node={gpus}", f"rollout.vllm.tensor={tensor}")
        assert said == (
            f"command line: rollout.vllm.tensor: colocated engines of {tensor} GPUs do not fill "
            f"nodes of {gpus}, and an engine lies on one node; with this layout these fit: "
            f"{fitting}"
        )
    dry_run(capsys, *run, "--gpus-per-node=4", "rollout.vllm.tensor=2")
    # Beside a trainer on CPUs an engine is one process.
    make_model(Path("wide"), head_dim=32)
    on_cpu = ["run.device=cpu", "model.path=wide", "rollout.vllm.tensor=4"]
    dry_run(capsys, *run, "--gpus-per-node=2", *on_cpu)


@pytest.mark.skipif(not SHELLCHECK.exists(), reason="shellcheck is not installed")
@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_shellcheck_finds_nothing_in_a_script_with_all_parts(
    runtime: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write("site.yaml", to_text({"runtime": runtime, "setup": "module load it\n"}))
    server = ["rollout.engine=vllm", "rollout.vllm.placement=server"]
    container = ["--image=i.sqsh", f"--mount={Path.cwd()}", "--chain=2", "--site=site.yaml"]
    script = "\n".join(dry_run(capsys, *server, *container, "--env=A=it's"))
    done = subprocess.run([SHELLCHECK, "-"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_setup_lines_that_bash_cannot_read_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    write("site.yaml", to_text({"setup": "if true"}))
    (said, *_) = refusals(capsys, "--dry-run", "--site=site.yaml")
    assert said.startswith("setup: bash cannot read the job script")


def test_slurm_is_only_needed_to_submit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("bin").mkdir()
    Path("bin/bash").symlink_to(shutil.which("bash") or "/bin/bash")
    monkeypatch.setenv("PATH", str(Path("bin").absolute()))
    (said,) = refusals(capsys)
    assert said.startswith("sbatch: not found")


def test_a_lead_is_chosen_and_what_does_not_fit_the_limit_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    timing = Timing(gpu="H100", step=600, shortest_step=90, longest_work=500, save=100)
    monkeypatch.setattr("megasd.launch.submit.estimate", lambda config, nodes, gpu: timing)
    assert main(["submit", "config.yaml", "--dry-run", "checkpoint.every=1"]) == 0
    printed = capsys.readouterr()
    assert "#SBATCH --signal=B:USR1@660" in printed.out
    assert "until=$((SECONDS + 630))" in printed.out
    assert printed.err == ""
    write("site.yaml", "signal_lead_seconds: 90\n")
    assert main(["submit", "config.yaml", "--dry-run", "--site=site.yaml"]) == 0
    printed = capsys.readouterr()
    assert "#SBATCH --signal=B:USR1@90" in printed.out
    assert "megasd: warning: signal_lead_seconds: 90 s before" in printed.err
    (said,) = refusals(capsys, "--dry-run", "--site=site.yaml", "--time=2:50")
    assert said.startswith("time: the limit of 170 s ends before a first step does")


@pytest.mark.parametrize(
    ("says", "code", "fragment"),
    [
        ("Unable to contact slurm controller (connect failure)", 1, "submit again when Slurm"),
        ("Socket timed out on send/recv operation", 1, "submit again when Slurm answers"),
        ("Invalid account or account/partition combination specified", 2, "change what the job"),
    ],
)
def test_a_scheduler_that_is_away_is_trouble_that_may_pass(
    says: str,
    code: int,
    fragment: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first job of the chain is in the queue then, and named."""
    sbatch = '[ "$1" = --test-only ] || { [ ! -e queued ] && touch queued && echo 41; } || '
    _put_sbatch(sbatch + f'{{ echo "sbatch: error: {says}" >&2; exit 1; }}', monkeypatch)
    assert main(["submit", "config.yaml", "--chain=2"]) == code
    said = capsys.readouterr().err
    assert says in said
    assert fragment in said
    assert "in the queue already, of this chain: 41" in said


def test_a_scheduler_that_hangs_is_not_waited_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megasd.launch.submit.ANSWER_SECONDS", 0.1)
    _put_sbatch("exec sleep 60", monkeypatch)
    assert main(["submit", "config.yaml"]) == 1
    assert "no answer in 0.1 seconds" in capsys.readouterr().err


def _put_sbatch(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("bin").mkdir()
    write("bin/sbatch", f"#!/bin/bash\n{body}\n")
    Path("bin/sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path('bin').absolute()}:{os.environ['PATH']}")


@pytest.mark.parametrize("name", sorted(path.name for path in SITES.glob("*.yaml")))
def test_the_site_files_make_scripts(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    where = f"--mount={Path.cwd()}" if "image" in (SITES / name).read_text() else "--env=A=1"
    assert dry_run(capsys, f"--site={SITES / name}", where)[0] == "#!/bin/bash"


def test_time_limits_are_read_as_slurm_reads_them() -> None:
    limits = {
        **{"90": 5400, "90:30": 5430, "4:00:00": 14400, "1-0": 86400, "1-2:30": 95400},
        **{"2-12:00:01": 216001, "UNLIMITED": float("inf"), "tomorrow": None, "1:2:3:4": None},
    }
    assert {limit: seconds(limit) for limit in limits} == limits
    assert check_site(Site()) == []
