"""`bench doctor` says what there is, and advises what would help here and nothing else."""

import dataclasses
import json

import pytest

from bench import doctor
from bench.doctor import GIB, Gpu, Machine, advice, as_text, examine

PLAIN = Machine(
    system="Linux x86_64",
    cpu="some CPU",
    cores=4,
    load=0.5,
    memory=16 * GIB,
    free=8 * GIB,
    instructions=["AVX2"],
    gpus=[],
    threads=4,
    python="3.12.0",
    versions={"torch": "2.14.0+cpu"},
)
GPU = Gpu("some GPU", 80 * GIB, bf16=True)


def advised(disk=100 * GIB, **changes):
    return "\n".join(advice(dataclasses.replace(PLAIN, **changes), disk))


@pytest.fixture(scope="module")
def health(tmp_path_factory):
    """What is said of a results folder with a training and a run, and of a data folder with CIFAR-10."""
    place = tmp_path_factory.mktemp("doctor")
    for file in (
        "results/checkpoints/digits/dwf/tiny-0a/model.safetensors",
        "results/runs/digits/dwf/quick-0b/record.json",
        "data/cifar-10-python.tar.gz",
    ):
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).touch()
    return examine(place / "results", place / "data")


def test_what_lies_where_is_said(health):
    assert health.data.there == ["digits", "cifar10"]
    assert health.checkpoints.there == ["dwf on digits (tiny)"]
    assert health.runs.there == ["digits/dwf/quick-0b"]


def test_the_machine_is_this_one(health):
    import os

    import torch

    assert 1 <= health.machine.cores <= (os.cpu_count() or 1)
    assert health.machine.threads == torch.get_num_threads()
    assert health.machine.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert len(health.machine.gpus) == torch.cuda.device_count()
    assert 0 < health.machine.free <= health.machine.memory and health.disk > 0


def test_json_is_all_of_it(health):
    said = json.loads(json.dumps(health.as_json()))
    assert said["machine"]["cores"] == health.machine.cores
    assert said["data"]["there"] == ["digits", "cifar10"] and said["advice"] == health.advice
    assert set(said) == {field.name for field in dataclasses.fields(health)}


def test_the_text_has_a_line_for_every_fact_and_ends_with_advice(health):
    lines = as_text(health).splitlines()
    named = [line.split()[0] for line in lines]
    for word in ("machine", "cores", "memory", "accelerator", "versions", "data", "checkpoints", "runs"):
        assert word in named
    assert set(doctor.OPTIONAL) <= set(named)
    at = lines.index("what would help:")
    assert lines[at + 1 :] == [f"  {line}" for line in health.advice]


def test_a_results_folder_that_is_not_there_is_none_yet(tmp_path):
    found = examine(tmp_path / "a" / "b", tmp_path / "c")
    assert found.data.there == ["digits"] and found.runs.there == []
    assert "none yet" in as_text(found) and not (tmp_path / "a").exists()


def test_a_cpu_is_told_of_gpus_and_a_gpu_is_not():
    assert "no GPU" in advised() and "cannot use a GPU" in advised()
    assert "cannot use a GPU" not in advised(versions={"torch": "2.14.0"})
    assert "no GPU" not in advised(gpus=[GPU])


def test_bf16_is_advised_where_the_hardware_has_it():
    assert "bf16" not in advised() and "bf16" not in advised(gpus=[dataclasses.replace(GPU, bf16=False)])
    assert "--precision bf16" in advised(gpus=[GPU])
    assert "--precision bf16" in advised(instructions=["AMX bf16"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"threads": 1}, "torch uses 1 of 4 cores"),
        ({"threads": 8}, "torch uses 8 threads on 4 core"),
        ({"load": 9.0}, "the machine is busy: 9.0 processes for 4 core"),
        ({"free": GIB}, "1.0 GiB of memory are free"),
        ({"disk": GIB // 2}, "0.50 GiB are free on the disk"),
    ],
)
def test_what_holds_a_machine_back_is_said_and_only_then(changes, said):
    assert said in advised(**changes) and said.split()[0] + " " + said.split()[1] not in advised()


@pytest.mark.parametrize(
    ("quota", "cores"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 64), ("", 64)]
)
def test_a_container_has_as_many_cores_as_its_quota(monkeypatch, quota, cores):
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert doctor.cores(quota) == cores


def test_what_the_system_says_is_read():
    info = "processor : 0\nmodel name : Fast\nflags : avx2 amx_bf16\n\nprocessor : 1\nmodel name : Other\n"
    assert doctor.cpu(info) == ("Fast", {"avx2", "amx_bf16"}) and doctor.cpu("") == ("", set())
    assert doctor.meminfo("MemTotal:  2 kB\nHugePages_Total:  3\nodd\n") == {
        "MemTotal": 2048,
        "HugePages_Total": 3,
    }


def test_a_package_that_is_on_the_path_alone_is_not_installed():
    assert doctor.version("bench.doctor") is None and doctor.version("torch") is not None
