"""Launch files: they run as they stand, here under stand-ins for the schedulers, and name what there is."""

import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.two_ranks import ROOT, losses
from train import run

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
FILES = sorted(path for path in LAUNCH.iterdir() if path.name != "README.md")
SAVED_AND_STOPPED = os.EX_TEMPFAIL

SRUN = """
import json, os, subprocess, sys

words = sys.argv[1:]
options = [words.pop(0) for _ in list(words) if words[0].startswith("--")]
place = lambda rank: {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
tasks = [subprocess.Popen(words, env=os.environ | place(rank)) for rank in range(int(os.environ["SLURM_NTASKS"]))]
with open("STAND_INS/pids", "w") as file:
    file.write(json.dumps([task.pid for task in tasks]))
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
SCONTROL = """
import sys

if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1")
else:
    with open("STAND_INS/told", "a") as file:
        print(*sys.argv[1:], file=file)
"""


def stand_ins(folder: Path, **programs: str) -> dict[str, str]:
    """An environment (of the system and of Python) whose programs are these, written in Python, and then ours."""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    for name, text in programs.items():
        program = folder / "bin" / name
        program.write_text(f"#!{sys.executable}\n{text.replace('STAND_INS', str(folder))}")
        program.chmod(0o755)
    ours = str(Path(sys.executable).parent)
    return os.environ | {"VENV": str(folder), "PATH": f"{ours}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def launch(script: str, *words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [LAUNCH / script, *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def slurm(folder: Path, *words: str, srun: str = SRUN) -> subprocess.Popen[str]:
    """The batch script as SLURM starts it: a copy of it, in the folder it was submitted from."""
    environment = stand_ins(folder, srun=srun, scontrol=SCONTROL)
    job = {"SLURM_JOB_ID": str(free_port() - 20000), "SLURM_JOB_NODELIST": "worker-[0-1]", "SLURM_NTASKS": "2"}
    return subprocess.Popen(
        ["bash", "launch/slurm.sbatch", *words],
        cwd=ROOT,
        env=environment | job | {"SLURM_CPUS_PER_TASK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def requeued(folder: Path) -> list[str]:
    """What scontrol was told, beside questions for host names."""
    told = folder / "told"
    return told.read_text().splitlines() if told.exists() else []


def free_port() -> int:
    """One of those that the batch script makes of job numbers."""
    for port in range(20000 + os.getpid() % 5000, 30000):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    try:
        output, _ = process.communicate(timeout=600)
    finally:
        process.kill()  # what has ended already does not mind
    assert process.returncode == code, output[-4000:]
    return output


def commands() -> list[list[str]]:
    """The words of train.run in the YAML files and, as an example, in the head of each script."""
    pods = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    found = [job["spec"]["trainer"]["args"] for job in pods if job["kind"] == "TrainJob"]
    texts = [path.read_text() for path in SCRIPTS] + [yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["run"]]
    for text in texts:
        found += [shlex.split(words) for words in re.findall(r"launch/\S+\.(?:sh|sbatch) (.+)", text)]
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_sound_and_can_be_started(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch"


@pytest.mark.parametrize("words", commands(), ids=lambda words: words[0])
def test_a_command_names_a_run_and_its_options(words):
    run.parse(words)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_to_be_set_is_marked_and_the_modules_are_there(path):
    text = path.read_text()
    assert "# SET" in text
    for module in re.findall(r"(?:-m|--module),? \"?(?:\$\{MODULE:-)?([\w.]+)", text):
        assert importlib.util.find_spec(module), module


def test_the_readme_has_a_command_for_every_file_and_no_other():
    told = set(re.findall(r"launch/([\w.]+)", (LAUNCH / "README.md").read_text()))
    assert told == {path.name for path in FILES}


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The losses of the tiny run on this machine's two processes."""
    folder = tmp_path_factory.mktemp("single")
    environment = stand_ins(folder / "stand-ins") | {"PROCESSES": "2"}
    output = finished(launch("single_node.sh", "metaquery.tiny", "--out", str(folder / "out"), **environment))
    assert "2 rank(s)" in output
    return losses(folder / "out")


def test_single_node_trains(single):
    assert len(single) == 6


def test_two_nodes_train_as_one_does(single, tmp_path):
    """Here both on one machine."""
    environment = stand_ins(tmp_path / "stand-ins") | {
        "PROCESSES": "1", "NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "INTERFACE": "lo"
    }  # fmt: skip
    words = ["metaquery.tiny", "--out", str(tmp_path / "out")]
    nodes = [launch("multi_node.sh", *words, **environment | {"NODE_RANK": rank}) for rank in "01"]
    outputs = [finished(node) for node in nodes]
    assert "2 rank(s)" in outputs[0]
    assert losses(tmp_path / "out") == single


@pytest.mark.parametrize("missing", ["NNODES", "NODE_RANK", "MASTER_ADDR"])
def test_multi_node_says_what_is_missing(missing, tmp_path):
    given = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    del given[missing]
    output = finished(launch("multi_node.sh", "metaquery.tiny", **stand_ins(tmp_path) | given), code=1)
    assert f"{missing}: is " in output


def test_torchrun_passes_a_schedulers_warning_on_and_waits(tmp_path):
    torchrun = "import os, sys\nprint(*sys.argv[1:], os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT'])"
    environment = stand_ins(tmp_path, torchrun=torchrun) | {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a"}
    for script in ("single_node.sh", "multi_node.sh"):
        output = finished(launch(script, "metaquery.tiny", **environment))
        assert "--signals-to-handle SIGTERM,SIGINT,SIGUSR1 -m train.run metaquery.tiny 300" in output


@pytest.mark.parametrize(("code", "requests"), [(0, 0), (SAVED_AND_STOPPED, 1), (1, 0), (2, 0), (6, 0), (69, 0), (137, 0)])
def test_slurm_queues_again_what_was_saved_and_nothing_else(code, requests, tmp_path):
    process = slurm(tmp_path, "metaquery.tiny", srun=f"import sys\nprint(sys.argv[1:])\nsys.exit({code})")
    output = finished(process, code)
    assert "'metaquery.tiny']" in output
    assert len(requeued(tmp_path)) == requests
    assert all(line.startswith("requeue ") for line in requeued(tmp_path))


def test_slurm_warns_the_ranks_save_and_the_job_ends_when_it_is_run_again(tmp_path):
    """The real training on two ranks; what SLURM does is sent by hand."""
    folder, out = tmp_path / "stand-ins", tmp_path / "out"
    words = ["metaquery.tiny", "--out", str(out), "--schedule.steps", "120", "--schedule.save-every", "5"]
    process = slurm(folder, *words)
    deadline = time.monotonic() + 300
    while not list(out.glob("checkpoints/step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in json.loads((folder / "pids").read_text()):
        os.kill(pid, signal.SIGUSR1)
    assert "stopped, signal SIGUSR1" in finished(process, SAVED_AND_STOPPED)
    assert len(requeued(folder)) == 1
    saved = max(path.name for path in out.glob("checkpoints/step-*"))
    assert saved < "step-00000120"

    output = finished(slurm(folder, *words))
    assert f"from step {int(saved.removeprefix('step-'))} to 120" in " ".join(output.split())
    assert len(requeued(folder)) == 1
    assert len(losses(out)) == 120
    assert (out / "release").is_dir()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "--master_port 29500"),
        ({"MASTER_PORT": "29501", "MASTER_ADDR": "10.0.0.1"}, "--master_port 29501 --master_addr 10.0.0.1"),
        (
            {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"},
            "--master_port 29500 --master_addr 10.0.0.1 --no_ssh --node_rank 1",
        ),
    ],
)
def test_deepspeed_is_told_the_machines_and_how_to_reach_them(given, expected, tmp_path):
    environment = stand_ins(tmp_path, deepspeed="import shlex, sys\nprint(shlex.join(sys.argv[1:]))") | given
    output = finished(launch("deepspeed.sh", "metaquery.tiny", "--out", "a b", **environment))
    assert output == f"--hostfile launch/hostfile {expected} --module train.run metaquery.tiny --out 'a b'\n"


@pytest.mark.parametrize(
    ("given", "told"), [({"HOSTFILE": "/nowhere"}, "/nowhere is missing"), ({"NODE_RANK": "1"}, "MASTER_ADDR: is ")]
)
def test_deepspeed_is_not_started_on_half_a_description(given, told, tmp_path):
    """It would train on this machine alone, or ask itself for an address."""
    process = launch("deepspeed.sh", "metaquery.tiny", **stand_ins(tmp_path, deepspeed="print('started')") | given)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert told in output
    assert "started" not in output


def test_the_hostfile_is_one_that_deepspeed_reads():
    lines = [line for line in (LAUNCH / "hostfile").read_text().splitlines() if line and not line.startswith("#")]
    assert len({line.split()[0] for line in lines}) == len(lines) == 2
    assert all(re.match(r"^(\S+)\s+slots=(\d+)", line) for line in lines)  # the pattern of its launcher


def test_kubernetes_objects_have_what_their_schema_requires():
    """trainer.kubeflow.org/v1alpha1, of Kubeflow Trainer 2.2."""
    runtime, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    assert {each["apiVersion"] for each in (runtime, job)} == {"trainer.kubeflow.org/v1alpha1"}
    assert (runtime["kind"], job["kind"]) == ("TrainingRuntime", "TrainJob")

    assert job["spec"]["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": runtime["metadata"]["name"]
    }  # fmt: skip
    assert job["spec"]["trainer"].keys() <= {
        "image",
        "command",
        "args",
        "env",
        "numNodes",
        "resourcesPerNode",
        "numProcPerNode",
    }
    assert job["spec"]["trainer"]["command"] == [
        "torchrun", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1", "-m", "train.run"
    ]  # fmt: skip
    resources = job["spec"]["trainer"]["resourcesPerNode"]
    assert resources["limits"] == resources["requests"]

    assert runtime["spec"].keys() <= {"mlPolicy", "podGroupPolicy", "template"}
    assert runtime["spec"]["mlPolicy"]["torch"] == {}
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    pod = replicated["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert replicated["name"] == container["name"] == "node"  # the names by which the trainer finds them
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    told = {each["name"]: each["value"] for each in job["spec"]["trainer"]["env"]}
    assert told.keys() == {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "HF_HOME"}
    assert pod["terminationGracePeriodSeconds"] > int(told["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert told["HF_HOME"].startswith(tuple(mount["mountPath"] for mount in container["volumeMounts"]))


def test_skypilot_task_has_fields_and_variables_that_skypilot_knows():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task.keys() <= {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run"}
    assert set(re.findall(r"SKYPILOT_\w+", task["run"])) == {
        "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS", "SKYPILOT_NUM_GPUS_PER_NODE"
    }  # fmt: skip
    subprocess.run(["bash", "-n"], input=task["run"] + task["setup"], text=True, check=True)
    assert task["num_nodes"] == 1  # all ranks write into one checkpoint at once, which no bucket lets several machines do
    places = tuple(task["file_mounts"])
    assert all(word.startswith(places) for word in shlex.split(task["run"].splitlines()[-1]) if word.startswith("/"))


def test_skypilot_gives_each_machine_its_part(tmp_path):
    environment = stand_ins(tmp_path, torchrun="import sys\nprint(*sys.argv[1:])") | {
        "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    }  # fmt: skip
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["run"]
    done = subprocess.run(["bash", "-c", task], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    for expected in (
        "--nnodes 2",
        "--node-rank 1",
        "--master-addr 10.0.0.1",
        "--nproc-per-node 8",
        "/checkpoints/xlarge_sana",
    ):
        assert expected in done.stdout
