"""Hosts on one machine, for the tests: namespaces of network, processes, mounts and name, on one
network bridge.

A host sees the machine's files read-only, and has its own /mnt and /dev/shm to write to: no two
share a disk. Every process ends with the test, even when that is killed, and the kernel removes the
namespaces.
"""

import os
import shutil
import subprocess
from pathlib import Path

import psutil

from bridge.processes import REPO, program_files

SUBNET = "10.77.0"  # of no network but the bridge's: every test has its own
IP = "/usr/sbin/ip"
SETUP = """
set -e
hostname {name}
mount --make-rprivate /
while read -r _ dir type _; do
  case $type in proc | sysfs | cgroup* | devpts) ;; *) mount -o remount,bind,ro "$dir" 2>/dev/null || true ;; esac
done </proc/self/mounts
mount -t tmpfs tmpfs /mnt
mount -t tmpfs tmpfs /dev/shm
mkdir /mnt/tmp /mnt/home
printf '{hosts}' >/mnt/hosts
mount --bind /mnt/hosts /etc/hosts
{ip} link set lo up
echo ready
exec cat
"""


def copy_program(to: Path) -> None:
    """Copy the program; its environment is linked, since that is read-only and may be shared."""
    for file in [*program_files(), REPO / "launch.sh", REPO / "pyproject.toml"]:
        (to / file.relative_to(REPO)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, to / file.relative_to(REPO))
    (to / ".venv").mkdir()
    for entry in (REPO / ".venv").iterdir():
        if entry.name != "installed":
            (to / ".venv" / entry.name).symlink_to(entry)
    stamp = subprocess.run(
        "cksum <pyproject.toml", shell=True, cwd=REPO, capture_output=True, text=True, check=True
    )
    (to / ".venv" / "installed").write_text(f"cpu {stamp.stdout}")  # as launch.sh writes it


class Host:
    """A holder process, in whose namespaces `run` and `popen` start what they are given."""

    def __init__(self, name: str, script: str):
        command = [
            "unshare",
            "--net",
            "--mount",
            "--pid",
            "--uts",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "bash",
        ]
        self.name = name
        # Its first process reads a pipe that nobody writes to and that closes with this process,
        # however it ends.
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.holder = subprocess.Popen([*command, "-c", script], **pipes, text=True)
        assert self.holder.stdout.readline() == "ready\n"
        (self.init,) = psutil.Process(self.holder.pid).children()
        self.enter = ["nsenter", "--all", f"--target={self.init.pid}"]
        self.disk = Path(f"/proc/{self.init.pid}/root/mnt")

    def run(self, command: list[str], **kwargs) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*self.enter, *command], text=True, capture_output=True, timeout=60, **kwargs
        )

    def processes(self) -> list[psutil.Process]:
        """All that run on this host, but for its own first one, which reaps no zombies."""
        mine = os.stat(f"/proc/{self.init.pid}/ns/pid").st_ino
        found = []
        for process in psutil.process_iter():
            try:
                here = (
                    os.stat(f"/proc/{process.pid}/ns/pid").st_ino == mine
                    and process.pid != self.init.pid
                )
                if here and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (OSError, psutil.NoSuchProcess):
                pass  # gone meanwhile
        return found

    def end(self) -> None:
        self.holder.communicate()  # with the first process of a host all others end


class Hosts:
    """host0, host1, ... and a shell command `ssh` that runs what it is given on one of them, as the
    real one does: with an environment of that host, and without an end of its own when the caller
    is killed."""

    def __init__(self, count: int, directory: Path):
        ip_of = {f"host{i}": f"{SUBNET}.{i + 1}" for i in range(count)}
        lines = "127.0.0.1 localhost\\n" + "".join(f"{ip} {name}\\n" for name, ip in ip_of.items())
        switch = (
            f"{IP} link add name bridge type bridge && {IP} link set bridge up && echo ready; "
            "exec cat"
        )
        self.all = [Host("switch", switch)]
        for i, (name, ip) in enumerate(ip_of.items()):
            host = Host(name, SETUP.format(name=name, hosts=lines, ip=IP))
            self.all.append(host)
            copy_program(host.disk / "cispo")
            netns = ["nsenter", f"--net=/proc/{self.all[0].init.pid}/ns/net", IP]
            for words in (
                f"link add name port{i} type veth peer name eth0 netns {host.init.pid}",
                f"link set port{i} master bridge up",
            ):
                subprocess.run([*netns, *words.split()], check=True)
            for words in (f"addr add {ip}/24 dev eth0", "link set eth0 up"):
                host.run([IP, *words.split()], check=True)
        self.hosts = self.all[1:]
        self.ssh = directory / "ssh"
        cases = "".join(f"{h.name}) to={h.init.pid} ;;\n" for h in self.hosts)
        environment = f"HOME=/mnt/home TMPDIR=/mnt/tmp PATH={os.environ['PATH']}"
        self.ssh.write_text(
            f'#!/bin/bash\ncase $1 in\n{cases}*) echo "ssh: $1: no route to host" >&2; exit 255 ;;\n'
            f'esac\nshift\nexec nsenter --all --target=$to env -i {environment} "$@"\n'
        )
        self.ssh.chmod(0o755)

    def __enter__(self):
        return self.hosts

    def __exit__(self, *error):
        for host in self.all:
            host.end()
