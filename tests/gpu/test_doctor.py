"""`megasd doctor` with GPUs: nvidia-smi as it really answers, NCCL between them."""

import json
from pathlib import Path

import pytest
import torch

from megasd.doctor.doctor import main
from megasd.doctor.machine import Finding, read_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_nvidia_smi_answers_every_question() -> None:
    gpus = read_gpus()
    assert gpus
    for gpu in gpus:
        assert "NVIDIA" in gpu.name
        assert gpu.memory_total is not None
        assert gpu.memory_used is not None
        assert gpu.clock is not None
        assert gpu.is_slowed is not None


def test_the_gpus_are_seen_and_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json", "--folder", str(tmp_path)])  # others may hold memory: 0 or 1
    found = [Finding(**one) for one in json.loads(capsys.readouterr().out)]
    assert any("driver" in one.sentence for one in found)
    assert not any("hang" in one.sentence or "fails" in one.sentence for one in found)
    if torch.cuda.device_count() > 1:
        assert any(one.sentence.startswith("all-reduce within") for one in found)
