"""A real SLURM on this machine: munged, slurmctld and one slurmd per virtual node, without systemd, cgroups or root.

Nodes are named by loopback addresses, so that their names resolve without a line in /etc/hosts. Two partitions: `main`,
and `urgent`, whose jobs preempt those of `main`. GPUs are pretended: jobs may ask for them, and there are none.
"""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
_SBIN = "/usr/sbin:/sbin"

_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits as long as credentials live.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
# More processors than the machine has.
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{preempt_signal}
KillWait=10
MinJobAge=86400
ReturnToService=2
GresTypes=gpu
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} CPUs=32 RealMemory=65536 Gres=gpu:{gpus}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def missing_commands() -> list[str]:
    """What has to be installed before a `LocalSlurm` can run (Debian: slurmctld slurmd slurm-client munge)."""
    return [command for command in COMMANDS if shutil.which(command, path=_path()) is None]


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:{_SBIN}"


class LocalSlurm:
    """The daemons, and questions about jobs. `start()` waits until nodes take jobs, `stop()` leaves nothing behind.

    Args:
        folder: for state, logs and sockets; its path must be short (a socket's name has at most 107 characters).
        n_nodes: virtual nodes on this machine.
        gpus: pretended per node.
    """

    def __init__(self, folder: Path, n_nodes: int = 1, gpus: int = 2) -> None:
        self.folder, self.n_nodes, self.gpus = folder, n_nodes, gpus
        self.node_names = [f"127.0.0.{2 + i}" for i in range(n_nodes)]
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        for name in [name for name in self.environment if name.startswith("SLURM_") and name != "SLURM_CONF"]:
            del self.environment[name]

    def start(self) -> None:
        """Start the daemons."""
        self._configure()
        munge = [f"--{key}={self.folder}/{file}" for key, file in _MUNGE_FILES.items()]
        self._run("munged", "--force", *munge)
        self._run("slurmctld")
        for name in self.node_names:
            self._run("slurmd", "-N", name)
        self.wait(self._is_ready, 60)

    def stop(self) -> None:
        """Cancel all jobs and end the daemons."""
        self._run("scancel", "--me", check=False)
        pid_files = [*self.folder.glob("slurmd-*.pid"), self.folder / "slurmctld.pid", self.folder / "munged.pid"]
        try:
            self.wait(lambda: not self._run("squeue", "-h", check=False), 30)
        finally:
            for file in pid_files:
                if file.exists():
                    _end(int(file.read_text()))

    def submit(self, *command: str) -> str:
        """Number of a job that `sbatch` queues with these arguments."""
        return self._run("sbatch", "--parsable", "--output=/dev/null", *command)

    def state(self, job: str) -> str:
        """SLURM's word for the state of a job: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT, ..."""
        return self._run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")

    def restarts(self, job: str) -> int:
        """How often SLURM has started the job again."""
        shown = self._run("scontrol", "show", "job", job)
        return int(shown.split("Restarts=")[1].split()[0])

    def control(self, *command: str) -> str:
        """Run a client command, such as `scancel 7`."""
        return self._run(*command)

    def wait(self, condition: Callable[[], object], seconds: float) -> None:
        """Wait until a condition holds.

        Raises:
            TimeoutError: it doesn't in time; with the end of the daemons' logs.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = [f"{log.name}:\n{log.read_text()[-2000:]}" for log in sorted(self.folder.glob("*.log"))]
                raise TimeoutError(f"still waiting after {seconds} s\n" + "\n".join(logs))
            time.sleep(0.2)

    def _configure(self) -> None:
        (self.folder / "state").mkdir(parents=True, exist_ok=True)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        for i in range(self.gpus):  # the GPU plugin counts device files
            (self.folder / f"gpu{i}").symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{self.gpus - 1}]\n")
        version = self._run("slurmctld", "-V").split()[1]
        send_signal = "SlurmctldParameters=preempt_send_user_signal"
        if int(version.split(".")[0]) >= 23:
            send_signal = "PreemptParameters=send_user_signal"
        first = _free_ports(1 + self.n_nodes)
        config = _CONFIG.format(
            host=socket.gethostname().split(".")[0],
            user=getpass.getuser(),
            folder=self.folder,
            port=first,
            nodes=f"127.0.0.[2-{1 + self.n_nodes}]" if self.n_nodes > 1 else "127.0.0.2",
            ports=f"[{first + 1}-{first + self.n_nodes}]" if self.n_nodes > 1 else str(first + 1),
            gpus=self.gpus,
            preempt_signal=send_signal,
        )
        (self.folder / "slurm.conf").write_text(config)

    def _is_ready(self) -> bool:
        shown = self._run("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N", check=False)
        return len(shown.split()) == self.n_nodes

    def _run(self, *command: str, check: bool = True) -> str:
        program = shutil.which(command[0], path=self.environment["PATH"]) or command[0]
        done = subprocess.run([program, *command[1:]], env=self.environment, capture_output=True, text=True)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")
        return done.stdout.strip()


_MUNGE_FILES = {
    "key-file": "munge.key",
    "socket": "munge.sock",
    "pid-file": "munged.pid",
    "log-file": "munged.log",
    "seed-file": "munged.seed",
}


def _free_ports(n: int) -> int:
    """The first of `n` free ports in a row."""
    while True:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            first = sock.getsockname()[1]
        try:
            for port in range(first, first + n):
                with socket.socket() as sock:
                    sock.bind(("127.0.0.1", port))
        except OSError:
            continue
        return int(first)


def _end(pid: int) -> None:
    """End a daemon of ours, with force after five seconds."""
    for signum in (15, 9):
        try:
            os.kill(pid, signum)
            for _ in range(50):
                os.kill(pid, 0)
                time.sleep(0.1)
        except ProcessLookupError:
            return
