"""The shipped launch scripts, as a new user starts them from a clean shell. Nodes are process trees on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.test_launcher import wait_until
from tests.lib import world
from tests.lib.namespaces import needs_ip, two_hosts
from tests.lib.sft_runs import EXAMPLE, arguments, expect_same, steps_done, undisturbed
from tulu_mega.train import checkpoint

ROOT = EXAMPLE.parents[1]
SCRIPTS = ROOT / "examples/launch"
PATIENCE = 120
# ssh hands the words after the host to a shell there; srun starts a task a node; both run here.
SSH = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$STUB_LOG"
while [[ $1 == -* ]]; do [ "$1" = -o ] && shift; shift; done
host=$1; shift
export GLOO_SOCKET_IFNAME=lo STUB_HOST=$host
: "${LOCAL_ADDR:=127.0.0.1}"; export LOCAL_ADDR
exec bash -c "$*"
"""
SRUN = """#!/usr/bin/env bash
printf 'srun %s\\n' "$*" >> "$STUB_LOG"
for word in "$@"; do case $word in --ntasks=*) tasks=${word#*=};; --nodelist=*) IFS=, read -ra list <<< "${word#*=}";; esac; done
while [[ $1 == --* ]]; do shift; done
pids=()
for ((task = 0; task < tasks; task++)); do
  SLURM_PROCID=$task SLURMD_NODENAME=${list[task]} GLOO_SOCKET_IFNAME=lo LOCAL_ADDR=127.0.0.1 "$@" & pids+=($!)
done
trap 'kill -USR1 "${pids[@]}"' USR1
trap 'kill -TERM "${pids[@]}"' TERM
worst=0
for pid in "${pids[@]}"; do
  while true; do
    wait "$pid"; status=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  [ "$status" -gt "$worst" ] && worst=$status
done
exit "$worst"
"""
SCONTROL = """#!/usr/bin/env bash
printf 'scontrol %s\\n' "$*" >> "$STUB_LOG"
[ "$1" = show ] && printf '%s\\n' node1 node2 node3 | head -n "${STUB_NODES:-2}"
exit 0
"""


@pytest.fixture
def shell(tmp_path):
    """A clean shell's environment with stand-ins for what a cluster has."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, text in {"ssh": SSH, "srun": SRUN, "scontrol": SCONTROL}.items():
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    with_python = {"PYTHON": sys.executable, "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)), "OMP_NUM_THREADS": "1"}
    return with_python | {
        "PATH": f"{bin_}:/usr/bin:/bin", "HOME": str(tmp_path), "STUB_LOG": str(tmp_path / "stub.log"), "GPUS_PER_NODE": "1",
        "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip


def start(command: list[str], env: dict[str, str], log: Path, cwd: Path = ROOT) -> subprocess.Popen:
    with log.open("w") as file:
        return subprocess.Popen(command, env=env, cwd=cwd, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def end(process: subprocess.Popen, log: Path) -> int:
    try:
        return process.wait(PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            print(log.read_text())


@pytest.mark.acceptance
def test_two_nodes_by_ssh_saved_on_request_and_resumed(material, tmp_path, shell):
    """Two machines of a host file train; Ctrl-C's like makes them save; the same command by torchrun.sh on each goes on."""
    undisturbed(material, tmp_path / "reference", 6, every=100)
    run_dir, log = tmp_path / "run", tmp_path / "ssh.log"
    again = ["sft", *arguments(material, run_dir, 6, every=100)]
    (tmp_path / "hosts").write_text("# two of them\nme@node1\nnode2  # the second\n")
    port = str(world.free_port())
    env = shell | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TULU_MEGA_ROLLOUT_KEY": "a-secret", "MAX_RESTARTS": "0"}
    run = start([str(SCRIPTS / "ssh.sh"), str(tmp_path / "hosts"), *again], env, log)
    try:
        wait_until(lambda: run.poll() is not None or steps_done(run_dir) >= 2, PATIENCE)
        run.send_signal(signal.SIGTERM)
    finally:
        status = end(run, log)
    assert status == 143, log.read_text()
    assert "[me@node1] " in log.read_text() and "asked to end: stopped after step " in log.read_text()
    (saved,) = checkpoint.find(run_dir / "checkpoints")
    assert 2 <= saved.step < 6 and not (run_dir / "hf").exists()
    assert "a-secret" not in (tmp_path / "stub.log").read_text()  # nobody reads the key from a command line

    nodes = []
    for rank in range(2):
        own = tmp_path / f"node{rank}"
        own.mkdir()
        env = shell | {"NNODES": "2", "NODE_RANK": str(rank), "MASTER_PORT": port, "LOCAL_ADDR": "127.0.0.1", "HOME": str(own)}
        nodes.append(start([str(SCRIPTS / "torchrun.sh"), *again], env, tmp_path / f"node{rank}.log", own))
    logs = [tmp_path / f"node{rank}.log" for rank in range(2)]
    assert [end(node, log) for node, log in zip(nodes, logs, strict=True)] == [0, 0], "\n".join(log.read_text() for log in logs)
    expect_same(run_dir, tmp_path / "reference")


@pytest.mark.acceptance
@pytest.mark.parametrize("asked", [signal.SIGUSR1, signal.SIGTERM], ids=["its time is over", "cancelled or pre-empted"])
def test_a_slurm_job_is_queued_again_when_its_time_is_over(material, tmp_path, shell, asked):
    run_dir, log = tmp_path / "run", tmp_path / "slurm.log"
    env = shell | {
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(world.free_port()),
    }  # fmt: skip
    job = start([str(SCRIPTS / "slurm.sbatch"), "sft", *arguments(material, run_dir, 400, every=1000)], env, log)
    try:
        wait_until(lambda: job.poll() is not None or steps_done(run_dir) >= 1, PATIENCE)
        job.send_signal(asked)
    finally:
        status = end(job, log)
    over = asked == signal.SIGUSR1
    assert status == (0 if over else 143), log.read_text()
    assert len(checkpoint.find(run_dir / "checkpoints")) == 1 and steps_done(run_dir) < 400
    stubs = (tmp_path / "stub.log").read_text()
    assert stubs.count("--nodelist=node1,node2") == 2 and "check --cluster sft" in stubs
    assert stubs.endswith("scontrol requeue 7\n") == over and stubs.count("requeue") == over
    assert "nothing wrong found on 2 nodes" in log.read_text()


def test_a_slurm_job_with_rollout_nodes_hands_over_addresses_and_a_key(tmp_path, shell):
    """What is started where; python is a stand-in, which says what it was called with."""
    fake = tmp_path / "bin/fakepython"
    fake.write_text(
        '#!/usr/bin/env bash\n[ "$1" = -c ] && { echo the-key; exit; }\n'
        'echo "$SLURMD_NODENAME rank $NODE_RANK of $NNODES key $TULU_MEGA_ROLLOUT_KEY: $*" >> "$STUB_LOG"\n'
        'case "$*" in *serve*) exec sleep 600;;\n'  # they end with the trainers
        '*--rollout.urls*) until grep -q "tulu_mega serve" "$STUB_LOG"; do sleep 0.1; done;; esac\n'
    )
    fake.chmod(0o755)
    env = shell | {
        "PYTHON": str(fake), "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "n", "SLURM_JOB_ID": "7", "STUB_NODES": "3",
        "SLURM_CPUS_ON_NODE": "96",
        "ROLLOUT_NODES": "1", "SERVE": "--model DIR --rollout.servers 2", "SERVERS_PER_NODE": "2",
    }  # fmt: skip
    log = tmp_path / "slurm.log"
    assert end(start([str(SCRIPTS / "slurm.sbatch"), "grpo", "c.toml"], env, log), log) == 0, log.read_text()
    lines = (tmp_path / "stub.log").read_text().splitlines()
    (serve,) = [line for line in lines if "tulu_mega serve" in line and not line.startswith("srun")]
    assert serve.startswith("node3 rank 0 of 2 key the-key: ")
    assert serve.endswith("-m tulu_mega serve --port 8000 --model DIR --rollout.servers 2 --host node3")
    urls = '--rollout.urls ["http://node3:8000","http://node3:8001"]'
    trained = [line for line in lines if line.startswith("node") and urls in line]
    assert sorted(line.split(":")[0] for line in trained) == [f"node{n + 1} rank {n} of 2 key the-key" for n in range(2)]
    steps = [line for line in lines if line.startswith("srun")]
    assert not any("the-key" in line for line in steps)
    assert all("--cpus-per-task=96 --cpu-bind=none" in line for line in steps)
    assert "requeue" not in "".join(lines)


def test_ssh_hands_over_variables_and_keeps_secrets_off_command_lines(tmp_path, shell):
    fake = tmp_path / "bin/fakepython"
    fake.write_text(
        '#!/usr/bin/env bash\necho "$STUB_HOST rank $NODE_RANK at $MASTER_ADDR run $RUN_ID: '
        'key $TULU_MEGA_ROLLOUT_KEY, token $HF_TOKEN, $WANDB_API_KEY, $NCCL_DEBUG" >> "$STUB_LOG"\n'
        'env -u LOCAL_ADDR >> "$STUB_LOG.$STUB_HOST"; echo "address $LOCAL_ADDR of $*" >> "$STUB_LOG.$STUB_HOST"\n'
    )
    fake.chmod(0o755)
    (tmp_path / "hosts").write_text("me@node1\nnode2 10.0.0.2  # as the others know it\n")
    handed = {
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:64", "NVTE_FLASH_ATTN": "0", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "32", "VLLM_LOGGING_LEVEL": "DEBUG", "UCX_TLS": "rc", "FI_PROVIDER": "efa",
        "LOG_DIR": str(tmp_path / "logs of ranks"), "TULU_MEGA_NUMA": "off", "OMP_NUM_THREADS": "3",
    }  # fmt: skip
    env = shell | handed | {
        "PYTHON": str(fake), "RUN_ID": "r7", "NCCL_DEBUG": "INFO", "TULU_MEGA_ROLLOUT_KEY": "secret-a", "HF_TOKEN": "secret b",
        "WANDB_API_KEY": "secret-c",
    }  # fmt: skip
    log = tmp_path / "ssh.log"
    assert end(start([str(SCRIPTS / "ssh.sh"), str(tmp_path / "hosts"), "sft", "c.toml"], env, log), log) == 0, log.read_text()
    lines = (tmp_path / "stub.log").read_text().splitlines()
    told = sorted(line for line in lines if " rank " in line and "key " in line)
    known = "at node1 run r7: key secret-a, token secret b, secret-c, INFO"
    assert told == [f"me@node1 rank 0 {known}", f"node2 rank 1 {known}"]
    assert not any("secret" in line for line in lines if line not in told)
    for host, address in (("me@node1", "127.0.0.1"), ("node2", "10.0.0.2")):  # the stand-in for ssh gives the first its own
        seen = (tmp_path / f"stub.log.{host}").read_text().splitlines()
        assert {f"{name}={value}" for name, value in handed.items()} <= set(seen)
        assert any(line.startswith(f"address {address} of ") and f"--log-dir {handed['LOG_DIR']}" in line for line in seen)


def test_ssh_ends_the_others_with_whichever_fails_first(tmp_path, shell):
    """The second machine of the file fails while the others would go on for ten minutes."""
    fake = tmp_path / "bin/fakepython"  # the stand-in for ssh hands on that its parent ignores SIGTERM, which Python may change
    fake.write_text(
        f"#!{sys.executable} -S\nimport os, signal, sys, time\n"
        "def asked(*_):\n    open(os.environ['STUB_LOG'], 'a').write('one was asked\\n')\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, asked)\n"
        "others = [os.environ['STUB_LOG'] + '.' + host for host in ('node1', 'node3')]\n"
        "if os.environ['STUB_HOST'] == 'node2':\n"
        "    while not all(map(os.path.exists, others)):\n        time.sleep(0.05)\n"
        "    sys.exit(7)\n"
        "open(os.environ['STUB_LOG'] + '.' + os.environ['STUB_HOST'], 'w').close()\ntime.sleep(600)\n"
    )
    fake.chmod(0o755)
    (tmp_path / "hosts").write_text("node1\nnode2\nnode3\n")
    log = tmp_path / "ssh.log"
    run = start([str(SCRIPTS / "ssh.sh"), str(tmp_path / "hosts"), "sft", "c.toml"], shell | {"PYTHON": str(fake)}, log)
    assert end(run, log) == 7, log.read_text()
    assert (tmp_path / "stub.log").read_text().count("one was asked") == 2


@pytest.mark.parametrize(
    ("script", "variables", "told"),
    [
        ("slurm.sbatch", {}, "error: this is a Slurm job: hand it to sbatch"),
        ("ssh.sh", {"LOCAL_ADDR": "10.0.0.1"}, "error: LOCAL_ADDR = 10.0.0.1 is one machine's address"),
        ("torchrun.sh", {"NODE_RANK": "x"}, "error: NODE_RANK = x: expected a whole number"),
        ("torchrun.sh", {"NNODES": "2", "NODE_RANK": "2"}, "error: NODE_RANK = 2 of NNODES = 2: they count from 0"),
        ("torchrun.sh", {"GPUS_PER_NODE": "all"}, "error: GPUS_PER_NODE = all: expected a whole number"),
        ("torchrun.sh", {"GRACE": "5m"}, "error: GRACE = 5m: expected a whole number"),
        ("torchrun.sh", {"PYTHON": "/bin/false", "GPUS_PER_NODE": ""}, "error: PYTHON = /bin/false cannot import torch"),
        ("torchrun.sh", {"PYTHON": "/nowhere/python"}, "error: PYTHON = /nowhere/python: no such program"),
        ("ssh.sh", {"HOSTS": "me@node1\nnode2\nnode1\n"}, "error: the host file names node1 twice"),
    ],
)
def test_what_a_script_cannot_do_is_told(tmp_path, shell, script, variables, told):
    (tmp_path / "hosts").write_text(variables.get("HOSTS", "node1\n"))
    words = [str(tmp_path / "hosts"), "sft"] if script == "ssh.sh" else ["sft", "c.toml"]
    done = subprocess.run([str(SCRIPTS / script), *words], env=shell | variables, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(told)


RANK = """
import os, torch, torch.distributed as dist
from tulu_mega.launch import launcher
launcher._usual_environment()
dist.init_process_group('gloo')
total = torch.ones(1)
dist.all_reduce(total)
seen = [os.environ.get(name) for name in ("MASTER_ADDR", "GLOO_SOCKET_IFNAME", "PYTORCH_ALLOC_CONF")]
open(f"{os.environ['OUT']}/{os.environ['RANK']}", 'w').write(f"{int(total)} {seen}")
dist.destroy_process_group()  # on a busy machine gloo's threads abort a process that ends without
"""


@needs_ip
def test_two_nodes_in_network_namespaces(tmp_path, shell):
    """Each node has a network of its own: only its address is reachable, its loopback is not the other's, and its name is the
    loopback. Nothing but the first one's address is given."""
    (tmp_path / "ranks.py").write_text(RANK)
    env = {name: value for name, value in shell.items() if name != "GLOO_SOCKET_IFNAME"} | {"OUT": str(tmp_path)}
    nodes = []
    with two_hosts("tm", "10.213.7") as hosts:
        try:
            for rank, host in enumerate(hosts):
                agent = [sys.executable, "-m", "tulu_mega.agent", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "x"]
                agent += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].address}:29511"]
                first = ["--rdzv-conf", f"is_host={'false' if rank else 'true'}", str(tmp_path / "ranks.py")]
                log = tmp_path / f"{rank}.log"
                nodes.append((start([*host.within, *agent, *first], env, log), log))
            assert [end(*node) for node in nodes] == [0, 0], "\n".join(log.read_text() for _, log in nodes)
        finally:
            for node, _ in nodes:
                node.kill()
    seen = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    master = next(host.address for host in hosts if host.address in seen[0])
    assert sorted(seen) == sorted(f"2 {[master, host.device, None]}" for host in hosts)  # there is no CUDA here
    assert "cannot be retrieved" not in "".join(log.read_text() for _, log in nodes)


def told_by_two(tmp_path, env: dict[str, str], commands: list[list[str]], port: int) -> list[tuple[int, list[str]]]:
    """Exit status and errors of torchrun.sh in two networks, with a command for each."""
    nodes = []
    with two_hosts("tn", "10.213.8") as hosts:
        try:
            for rank, (host, command) in enumerate(zip(hosts, commands, strict=True)):
                own = env | {"NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(port)}
                log = tmp_path / f"{port}.{rank}.log"
                nodes.append((start([*host.within, str(SCRIPTS / "torchrun.sh"), *command], own, log), log))
            status = [end(*node) for node in nodes]
        finally:
            for node, _ in nodes:
                node.kill()
    return [
        (code, [line for line in log.read_text().splitlines() if "error: " in line])
        for code, (_, log) in zip(status, nodes, strict=True)
    ]


@needs_ip
@pytest.mark.acceptance
def test_a_node_with_other_settings_ends_the_start_on_both(material, tmp_path, shell):
    """In one line each, before anything is read: another value, a setting that is none, a run directory of its own."""
    env = {name: value for name, value in shell.items() if name != "GLOO_SOCKET_IFNAME"} | {"MAX_RESTARTS": "0"}
    same = ["sft", *arguments(material, tmp_path / "run", 2, every=100)]
    cases = [
        ([*same, "--optim.lr", "3e-4"], "(rank 1): setting optim.lr is 0.0003, elsewhere "),
        ([*same, "--optim.rl", "3e-4"], "(rank 1): unknown setting"),
        ([*same, "--run_dir", str(tmp_path / "another")], "(rank 1): setting run_dir is "),
    ]
    for number, (other, expected) in enumerate(cases):
        (first, told), (second, told_too) = told_by_two(tmp_path, env, [same, other], 29520 + number)
        assert (first, second) == (2, 2), (told, told_too)
        # which machine rank 0 lies on is torchrun's to say; both tell the same
        assert len(told) == len(told_too) == 1, (told, told_too)
        assert told[0].partition("error: ")[2] == told_too[0].partition("error: ")[2]
        assert expected.partition("): ")[2] in told[0] or "elsewhere 0.0003" in told[0] or "setting run_dir" in told[0]
    assert not (tmp_path / "run").exists() and not (tmp_path / "another").exists()
