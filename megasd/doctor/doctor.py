"""`megasd doctor`: whether this machine, or with --preflight the ranks of a job, can train.

Every finding is one sentence. Exit code 1: something is wrong. What cannot be seen, such as GPUs
on a machine without, is said and is no fault. Imports nothing heavy until it runs.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megasd.doctor.machine import Finding

LOCAL_SECONDS = 120


def add_doctor_command(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="whether this machine, or the ranks of a job, can train",
        description="Looks at GPUs, driver, clocks, ECC, versions, the run folder, and lets local "
        "ranks add numbers up. With --preflight, under torchrun or srun: compares all ranks of "
        "the job, measures the links between nodes and names a bad node. Exit code 1: something "
        "is wrong.",
    )
    doctor.add_argument("--preflight", action="store_true", help="examine the ranks of a job")
    doctor.add_argument(
        "--folder", default="runs", metavar="FOLDER", help="where runs will be kept (runs)"
    )
    doctor.add_argument(
        "--network",
        type=float,
        metavar="GB_PER_SECOND",
        help="of one GPU to other nodes, for --preflight; default: a 400 Gb/s card",
    )
    doctor.add_argument("--json", action="store_true", help="a list of objects")
    doctor.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """The exit code."""
    if args.preflight:
        from megasd.doctor.preflight import run_preflight

        network = None if args.network is None else args.network * 1e9
        findings = run_preflight(Path(args.folder), expected_network=network)
        # The first rank speaks for all; one that never met the others speaks for itself.
        is_first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
        speaks = is_first or "cannot reach" in findings[0].sentence
    else:
        findings, speaks = examine(Path(args.folder)), True
    if speaks:
        _print(findings, as_json=args.json)
    return int(any(finding.level == "wrong" for finding in findings))


def _print(findings: list["Finding"], *, as_json: bool) -> None:
    from megasd.doctor.machine import as_values

    if as_json:
        print(json.dumps(as_values(findings)))
        return
    for finding in findings:
        print(finding)
    wrong = sum(finding.level == "wrong" for finding in findings)
    print(f"{wrong} of {len(findings)} findings are wrong" if wrong else "nothing is wrong")


def examine(folder: Path) -> list["Finding"]:
    """Every finding about this machine."""
    from megasd.doctor.machine import (
        check_folder,
        check_gpus,
        check_transformer_engine,
        check_versions,
        gather_facts,
        own_requirements,
    )

    facts = gather_facts()
    has_gpu = bool(facts.gpus) or facts.visible_gpus > 0
    return [
        *check_gpus(facts),
        *check_versions(facts.versions, own_requirements(), has_gpu=has_gpu),
        *check_transformer_engine(facts),
        *_sandbox(),
        *check_folder(folder),
        *_local_ranks(folder, facts.visible_gpus or 2),
    ]


def _sandbox() -> list["Finding"]:
    """Whether programs of rollouts can be contained, for verifiers that run them."""
    import warnings

    from megasd.doctor.machine import Finding
    from megasd.rewards import sandbox

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reason = sandbox.check()
    if reason is not None:
        return [Finding("wrong", f"verifiers cannot run programs: {reason}")]
    lacks = [Finding("unseen", str(warning.message)) for warning in caught]
    return lacks or [Finding("ok", "verifiers can run programs in the sandbox")]


def _local_ranks(folder: Path, count: int) -> list["Finding"]:
    """The preflight over this machine's GPUs, or over two CPU ranks: NCCL, or gloo."""
    from megasd.doctor.machine import Finding

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in place.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        command = [sys.executable, "-m", "megasd.doctor.doctor", "doctor"]
        command += ["--preflight", "--json", "--folder", str(folder)]
        ranks.append(
            subprocess.Popen(
                command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
    try:
        answers = [rank.communicate(timeout=LOCAL_SECONDS) for rank in ranks]
    except subprocess.TimeoutExpired:
        for rank in ranks:
            rank.kill()
            rank.communicate()
        return [Finding("wrong", f"{count} local ranks hang in an all-reduce; see NCCL_DEBUG=INFO")]
    for number, (rank, (_, said)) in enumerate(zip(ranks, answers, strict=True)):
        if rank.returncode not in (0, 1) or (number == 0 and not answers[0][0].strip()):
            last = said.strip().splitlines()[-1] if said.strip() else f"code {rank.returncode}"
            return [Finding("wrong", f"local rank {number} of {count} fails: {last}")]
    found = [Finding(**one) for one in json.loads(answers[0][0])]
    links = [finding for finding in found if "all-reduce" in finding.sentence]
    return links or [finding for finding in found if finding.level == "wrong"]


def main(arguments: list[str]) -> int:
    """The command by itself, as the local ranks are started."""
    parser = argparse.ArgumentParser(prog="megasd")
    add_doctor_command(parser.add_subparsers(required=True))
    args = parser.parse_args(arguments)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
