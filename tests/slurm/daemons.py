"""A Slurm of one machine in a folder of its own: no systemd, nothing in /etc, gone when the tests are over."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.faults.processes import wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
CPUS = 4  # more than there may be: the jobs mostly wait
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class Slurm:
    """Its daemons, and what is asked of it.

    Args:
        folder: For keys, states and logs; its path must be short, for a socket lies in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.conf = folder, folder / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self.conf)}
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        """Up when the node says that it is idle."""
        os.environ["PATH"] += ":/usr/sbin:/sbin"
        if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
            raise RuntimeError(
                f"these programs of Slurm are not here: {missing}; `make slurm-test` installs them."
            )
        self.folder.chmod(0o711)
        for name in ("munge", "state", "spool", "log"):
            (self.folder / name).mkdir(mode=0o711)
        self._munge()
        self.conf.write_text("\n".join(self._settings()) + "\n", encoding="utf-8")
        for daemon in ("slurmctld", "slurmd"):
            self._run(daemon, "-D", "-f", str(self.conf))
        wait_until(lambda: "idle" in self.ask("sinfo", "-h", "-o", "%T"), 30, "the node to be idle")

    def stop(self) -> None:
        """All jobs cancelled, all daemons ended."""
        self.ask("scancel", "--user", "root")
        end = time.monotonic() + 15
        while self.ask("squeue", "-h") and time.monotonic() < end:
            time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def ask(self, *words: str) -> str:
        """What a command of Slurm answers; nothing where it fails."""
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **self.environment},
            timeout=30,
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    def job(self, job: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        pairs = (word.partition("=") for word in self.ask("scontrol", "show", "job", job).split())
        return {key: value for key, has_value, value in pairs if has_value}

    def wait_for_end(self, job: str, seconds: float = 120) -> dict[str, str]:
        """The fields of a job once it is over."""
        wait_until(lambda: self.job(job).get("JobState") in ENDED, seconds, f"job {job} to end")
        return self.job(job)

    def _munge(self) -> None:
        folder = self.folder / "munge"
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        places = {"key-file": key, "socket": folder / "socket", "pid-file": folder / "pid"}
        places |= {"log-file": folder / "log", "seed-file": folder / "seed"}
        self._run("munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in places.items()))
        wait_until((folder / "socket").exists, 10, "munged")

    def _run(self, *words: str) -> None:
        with (self.folder / "log" / f"{words[0]}.out").open("w") as log:
            environment = {**os.environ, **self.environment}
            daemon = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment)
        self._daemons.append(daemon)

    def _settings(self) -> list[str]:
        host, me = socket.gethostname().split(".")[0], "root"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        plugins = {
            "AuthType": "auth/munge", "CredType": "cred/munge", "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none", "JobAcctGatherType": "jobacct_gather/none", "SwitchType": "switch/none",
            "AccountingStorageType": "accounting_storage/none", "MpiDefault": "none",
            "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_CPU",
        }  # fmt: skip
        places = {
            "StateSaveLocation": self.folder / "state", "SlurmdSpoolDir": self.folder / "spool",
            "SlurmctldPidFile": self.folder / "slurmctld.pid", "SlurmdPidFile": self.folder / "slurmd.pid",
            "SlurmctldLogFile": self.folder / "log/slurmctld", "SlurmdLogFile": self.folder / "log/slurmd",
        }  # fmt: skip
        behaviour = {
            # a job that is put back waits until its old credential has run out
            "AuthInfo": f"socket={self.folder / 'munge/socket'},cred_expire=10",
            "SlurmctldPort": free_port(), "SlurmdPort": free_port(), "SlurmUser": me, "SlurmdUser": me,
            "ReturnToService": 2, "KillWait": 5, "MinJobAge": 3600, "JobRequeue": 1,
            "SchedulerParameters": "sched_interval=2,bf_interval=2", "SlurmdParameters": "config_overrides",
        }  # fmt: skip
        return [
            "ClusterName=test",
            f"SlurmctldHost={host}(127.0.0.1)",
            *(f"{key}={value}" for key, value in {**plugins, **places, **behaviour}.items()),
            f"NodeName={host} NodeAddr=127.0.0.1 CPUs={CPUS} RealMemory={memory} State=UNKNOWN",
            f"PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP",
        ]


def free_port() -> int:
    """One that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
