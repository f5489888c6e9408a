"""Two hosts on this machine: each a network namespace with an address and a name of its own, and a cable between them.

Nothing stays behind, however this process ends: a namespace lasts as long as `cat` in it, which reads a pipe of ours.
As `-m tests.hosts RUN.json ...` it is what each rank runs: the runs one after another, in one process.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from sample import cli
from train import run
from train.ranks import start

ON_ITS_OWN = """
hostname "$0"
mount --bind "$1" /etc/hosts
shift
exec "$@"
"""


@dataclass
class Host:
    """One machine. Its name leads to 127.0.1.1, as on Debian."""

    name: str
    address: str
    holder: subprocess.Popen[str]
    names: Path
    """Its /etc/hosts."""
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
        """Start a command there; all that comes of it dies with it, and with this process."""
        apart = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        words = self._inside(*apart, "sh", "-ec", ON_ITS_OWN, self.name, self.names, *command)
        pipe, both = subprocess.PIPE, subprocess.STDOUT
        self.processes.append(subprocess.Popen(words, stdout=pipe, stderr=both, text=True, cwd=cwd, env=env))

    def ended(self, timeout_seconds: float) -> tuple[int, str]:
        """The exit code of the command started last and what it said. Raises subprocess.TimeoutExpired."""
        output, _ = self.processes[-1].communicate(timeout=timeout_seconds)
        return self.processes[-1].returncode, output

    def plug(self, up: bool) -> None:
        """Put the cable in, or pull it."""
        self.tell("ip", "link", "set", "eth0", "up" if up else "down")

    def kill(self) -> None:
        """SIGKILL to every process there."""
        for process in self.processes:
            process.kill()
            process.wait()

    def tell(self, *command: str) -> None:
        """Run one of the commands that set it up. Raises OSError with what it said when it fails."""
        done = subprocess.run(self._inside(*command), capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")

    def _inside(self, *command: str | Path) -> list[str]:
        network = f"--net=/proc/{self.holder.pid}/ns/net"
        return ["setpriv", "--pdeathsig", "KILL", "nsenter", network, *map(str, command)]


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Hosts that reach each other. Raises OSError, with the system's own words, where it does not let us make them."""
    names = folder / "hosts"
    names.write_text("127.0.0.1 localhost\n127.0.1.1 host-0 host-1\n")
    hosts = [Host(f"host-{rank}", f"10.77.0.{rank + 1}", _namespace(), names) for rank in range(2)]
    try:
        for host in hosts:
            assert host.holder.stdout
            if (said := host.holder.stdout.readline()) != "made\n":
                raise OSError(said.strip())
        first, second = hosts
        first.tell("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(second.holder.pid))
        for host in hosts:
            host.tell("ip", "addr", "add", f"{host.address}/24", "dev", "eth0")
            host.tell("ip", "link", "set", "lo", "up")
            host.plug(True)
            host.start("true")
            code, said = host.ended(60)
            if code:
                raise OSError(said.strip())
        yield first, second
    finally:
        for host in hosts:
            host.kill()
            host.holder.kill()
            host.holder.communicate()


def _namespace() -> subprocess.Popen[str]:
    """What holds a new network namespace and, once it does, says so."""
    words = ["unshare", "--net", "sh", "-c", "echo made; exec cat"]
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    return subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=both, text=True)


def main(argv: list[str] | None = None) -> None:
    """What one rank does."""
    words = sys.argv[1:] if argv is None else argv
    *before, last = [word for word in words if word.endswith(".json")]  # DeepSpeed's launcher adds --local_rank
    for word in before:
        asked = run.parse([word])
        assert run.train(asked, start(asked.engine.timeout_seconds)) == 0
    run.main([last])
    assert not dist.is_initialized()  # Gloo's threads could abort a process that ends in a group


if __name__ == "__main__":
    sys.exit(cli.run(main))
