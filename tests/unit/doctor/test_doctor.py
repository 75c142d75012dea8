"""`megasd doctor`: every fault of a machine is a sentence, and what cannot be seen is said."""

import dataclasses
import json
import os
import socket
from pathlib import Path

import pytest

from megasd.doctor import doctor, preflight
from megasd.doctor.doctor import main
from megasd.doctor.machine import (
    GPU,
    Facts,
    Finding,
    check_folder,
    check_gpus,
    check_transformer_engine,
    check_versions,
    read_gpus,
)

GOOD = GPU("NVIDIA H200", "580.1", 143771, 5, 1980, "Enabled", 0, False)
SMI = """#!/bin/sh
case "$1" in
*clocks_event*) {slowed};;
*clocks_throttle*) {older};;
*) printf 'NVIDIA H200, 580.65.06, 143771, 4, 1980, Enabled, 0\\n{second}\\n';;
esac
"""


def wrong(findings: list[Finding]) -> list[str]:
    return [finding.sentence for finding in findings if finding.level == "wrong"]


def machine(*gpus: GPU, visible: int | None = None) -> Facts:
    return Facts(gpus=gpus, visible_gpus=len(gpus) if visible is None else visible)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path / "nvidia-smi"


def test_nvidia_smi_is_read_and_an_old_driver_that_knows_a_field_less_too(smi: Path) -> None:
    second = "NVIDIA H200, 580.65.06, 143771, 4, 1980, [N/A], [N/A]"
    answer = r"printf 'Not Active, Active\n[N/A], [N/A]\n'"
    for slowed, older in ((answer, "exit 2"), ("exit 2", answer)):
        smi.write_text(SMI.format(second=second, slowed=slowed, older=older))
        smi.chmod(0o755)
        gpus = read_gpus()
        assert gpus is not None
        assert gpus[0] == GPU("NVIDIA H200", "580.65.06", 143771, 4, 1980, "Enabled", 0, True)
        assert (gpus[1].ecc, gpus[1].ecc_errors, gpus[1].is_slowed) == ("[N/A]", None, False)
    smi.write_text(SMI.format(second=second, slowed="exit 2", older="exit 2"))
    assert [gpu.is_slowed for gpu in read_gpus() or ()] == [None, None]
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert read_gpus() is None


def test_good_gpus_are_ok_and_each_fault_is_named_with_its_gpu() -> None:
    assert wrong(check_gpus(machine(GOOD, GOOD))) == []
    for change, said in (
        ({"memory_used": 30 * 1024}, "GPU 1: 30.0 GiB are in use by other programs; end them"),
        ({"ecc_errors": 2}, "GPU 1: 2 uncorrected ECC errors since the driver was loaded; take"),
        ({"is_slowed": True}, "GPU 1: its hardware slows the clock; look at cooling and power"),
        ({"name": "NVIDIA H100"}, "the GPUs are not alike: NVIDIA H100, 140 GiB and NVIDIA H200"),
    ):
        (found,) = wrong(check_gpus(machine(GOOD, dataclasses.replace(GOOD, **change))))
        assert found.startswith(said)


def test_a_driver_that_torch_cannot_use_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (said,) = wrong(check_gpus(machine(GOOD, GOOD, visible=0)))
    assert said.startswith("torch sees 0 of 2 GPUs: its CUDA does not fit the driver")


def test_a_transformer_engine_that_does_not_import_is_a_fault_of_its_node() -> None:
    half = dataclasses.replace(machine(GOOD), transformer_engine="OSError: libcudnn.so.9")
    (said,) = wrong(check_transformer_engine(half))
    assert "cannot be imported (OSError: libcudnn.so.9); mend its installation, or set " in said
    assert check_transformer_engine(machine(GOOD)) == []
    float8 = {"blockwise": "requires CUDA >= 12.9.", "tensorwise": None, "delayed": None}
    (found,) = check_transformer_engine(dataclasses.replace(machine(GOOD), float8=float8))
    assert (found.level, found.sentence) == (
        "ok",
        "model.fp8.recipe can be tensorwise, delayed; not blockwise: requires CUDA >= 12.9.",
    )
    both = [machine(GOOD), dataclasses.replace(half, host="bad", rank=1)]
    (said,) = wrong(preflight._about_each_node(both))
    assert said.startswith("node bad: Transformer Engine is installed and cannot be imported")


def test_what_cannot_be_seen_is_said_and_is_no_fault() -> None:
    (finding,) = check_gpus(Facts())
    assert finding.level == "unseen"
    blind = dataclasses.replace(GOOD, ecc_errors=None, is_slowed=None, memory_used=None)
    unseen = [f.sentence for f in check_gpus(machine(blind)) if f.level == "unseen"]
    assert len(unseen) == 3


def test_versions_are_held_against_the_packages_own_ranges() -> None:
    ranges = [
        "torch<2.14,>=2.11.0a0",
        "megatron-core<0.17,>=0.16.1",
        'transformer-engine[pytorch]<2.12,>=2.9; extra == "gpu"',
        'vllm<0.27,>=0.26; extra == "gpu"',
        'ruff>=0.9; extra == "dev"',
    ]
    have: dict[str, str | None] = {
        "python": "3.11.7",
        "torch": "2.13.0+cpu",
        "megatron-core": "0.15.0",
        "transformer-engine": None,
        "vllm": "0.32.0",
    }
    (said,) = wrong(check_versions(have, ranges, has_gpu=False))
    assert said == "megatron-core 0.15.0 does not fit: install megatron-core <0.17,>=0.16.1"
    assert wrong(check_versions(have, ranges, has_gpu=True))[1:] == [
        "transformer-engine is missing: install transformer-engine <2.12,>=2.9",
        "vllm 0.32.0 does not fit: install vllm <0.27,>=0.26",
    ]


def test_a_folder_is_left_as_it_was(tmp_path: Path) -> None:
    assert wrong(check_folder(tmp_path / "runs" / "of" / "mine")[-1:]) == []
    assert not (tmp_path / "runs" / "of" / "mine").exists()
    assert wrong(check_folder(tmp_path)) == []
    file = tmp_path / "file"
    file.write_text("")
    (said,) = wrong(check_folder(file))
    assert said == f"{file} cannot be written: File exists; choose another run folder"


def test_a_machine_without_gpus_is_examined_with_gloo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--json", "--folder", str(tmp_path)]) == 0
    found = [Finding(**one) for one in json.loads(capsys.readouterr().out)]
    assert wrong(found) == []
    said = " ".join(finding.sentence for finding in found)
    for part in ("megatron-core 0.16", f"{tmp_path} can be written", "all-reduce within the node"):
        assert part in said


def test_something_wrong_is_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_local_ranks", lambda *_: [])  # seconds, and seen above
    (tmp_path / "file").write_text("")
    assert main(["doctor", "--folder", str(tmp_path / "file")]) == 1
    assert "WRONG" in capsys.readouterr().out


# ---- preflight, as far as it is arithmetic ---------------------------------------------------


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(preflight, "ARRIVAL_SECONDS", 1)
    (finding,) = preflight.join(torch.device("cpu"), rank=0, world_size=4)
    assert finding.sentence.startswith("ranks 1-3 of 4 did not arrive in 1 seconds")
    # A job script knows where they should be.
    monkeypatch.setenv("MEGASD_NODES", "a,b,engines")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert [finding.sentence.split(" did ")[0] for finding in preflight.absent([1, 2, 3], 4)] == [
        "node a: its rank 1 of 4",
        "node b: its ranks 2-3 of 4",
    ]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 33])
def test_every_node_meets_its_neighbours_in_rounds_of_disjoint_pairs(count: int) -> None:
    rounds = preflight.ring_rounds(count)
    for pairs in rounds:
        members = [node for pair in pairs for node in pair]
        assert len(set(members)) == len(members)
    met = {frozenset(pair) for pairs in rounds for pair in pairs}
    assert met == {frozenset((i, (i + 1) % count)) for i in range(count)}
    assert len(rounds) <= 3


@pytest.mark.parametrize(
    ("name", "within"),
    [
        ("NVIDIA H100 80GB HBM3", 180e9),
        ("NVIDIA B200", 360e9),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 PCIe", None),
    ],
)
def test_a_bandwidth_is_expected_of_the_gpus_that_the_planner_knows(
    name: str, within: float | None
) -> None:
    own = machine(dataclasses.replace(GOOD, name=name))
    assert preflight.expectations(own, None, 1) == (within, within and 20e9)
    assert preflight.expectations(own, 100e9, 1) == (within, 40e9)
    assert preflight.expectations(Facts(), None, 1) == (0, 0)


@pytest.mark.parametrize(
    ("name", "network", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", None, 160e9),  # 40% of 8 x 50 GB/s
        ("NVIDIA H100 80GB HBM3", 25e9, 80e9),
        ("NVIDIA H100 80GB HBM3", 100e9, 180e9),  # NVLink is the narrowest place
        ("NVIDIA A100-SXM4-80GB", 25e9, 80e9),
        ("NVIDIA H100 PCIe", 50e9, 20e9),  # its host may be the narrowest place
    ],
)
def test_a_node_reaches_other_nodes_through_all_of_its_adapters(
    name: str, network: float | None, expected: float
) -> None:
    own = machine(dataclasses.replace(GOOD, name=name))
    assert preflight.expectations(own, network, 8)[1] == pytest.approx(expected)


def test_a_node_with_one_adapter_of_eight_is_named_and_one_with_seven_is_not() -> None:
    """As an all-reduce measures it: what leaves the node, over the time that its adapters take."""
    nodes = [preflight.Node(host=f"n{i}", ranks=[*range(8 * i, 8 * i + 8)]) for i in range(3)]
    own = machine(dataclasses.replace(GOOD, name="NVIDIA H100 80GB HBM3"))
    payload, n, adapter = 256 * 2**20, 16, 0.9 * 50e9
    speeds = {}
    for place, adapters in enumerate((8, 1, 7)):
        leaves = 2 * (n - 1) / n * payload  # in a ring, by all of its channels together
        seconds = leaves / (adapters * adapter)
        speeds[place] = 2 * (n - 1) / n * payload / seconds
    expected = preflight.expectations(own, None, 8)[1]
    (said,) = wrong(preflight.slow_nodes(nodes, speeds, expected, "to other nodes"))
    assert said.startswith("node n1: all-reduce to other nodes at 45.00 GB/s, expected is 160.00")
    assert said.endswith("take the node out of the job")
    every = wrong(
        preflight.slow_nodes(nodes, dict.fromkeys(range(3), 9e9), expected, preflight.ACROSS)
    )
    assert len(every) == 3
    assert all("network_gb_per_second" in sentence for sentence in every)


def test_without_an_expectation_nodes_are_compared_with_each_other() -> None:
    nodes = [preflight.Node(host=f"n{i}", ranks=[i]) for i in range(4)]
    speeds = {0: 10e9, 1: 11e9, 2: 2e9, 3: 10e9}
    (said,) = wrong(preflight.slow_nodes(nodes, speeds, None, "to other nodes"))
    assert said.startswith("node n2: all-reduce to other nodes at 2.00 GB/s, the median is 10.00")
    assert wrong(preflight.slow_nodes(nodes, speeds, 1e9, "to other nodes")) == []


def test_nodes_with_scattered_or_too_few_ranks_are_named() -> None:
    nodes = [
        preflight.Node(host=host, ranks=ranks)
        for host, ranks in (("a", [0, 1]), ("b", [2, 4]), ("c", [3, 5]), ("d", [6]))
    ]
    said = wrong(preflight.check_layout_of(nodes))
    assert [sentence.split(":")[0] for sentence in said] == ["node d", "node b", "node c"]
