"""Run a command and record every network address it asks for and every file it changes outside the folders allowed.

Invariant: Python children are watched like the command itself, because the hook travels in their environment. Native
code raises no audit events; what it leaves behind shows in folders the caller watches (an own HOME and TMPDIR).
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Python imports `sitecustomize` before anything else. PEP 578 audit events: a hook cannot be removed again.
_HOOK = """\
import json, os, sys

def _install():
    log = os.open(os.environ["WATCHED_LOG"], os.O_WRONLY | os.O_APPEND)
    os.set_inheritable(log, False)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    asking = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"}

    def absolute(path, folder=-1):
        base = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd()
        return os.path.normpath(os.path.join(base, os.fsdecode(path)))

    def hook(event, args):
        changed = None
        if event == "open":
            path, mode, flags = args
            if not isinstance(path, int) and (set(mode or "") & set("wax+") or flags & writing):
                changed = absolute(path)
        elif event in ("os.remove", "os.rmdir"):
            changed = absolute(args[0], args[1])
        elif event == "os.mkdir":
            changed = absolute(args[0], args[2])
        elif event in ("os.rename", "os.link"):
            changed = absolute(args[1], args[3])
        elif event == "os.symlink":
            changed = absolute(args[1], args[2])
        elif event == "sqlite3.connect" and args[0] != ":memory:":
            changed = absolute(args[0])
        elif event in asking:
            address = args[0] if isinstance(args[0], (str, bytes)) or len(args) < 2 else args[1]
            if getattr(args[0], "family", None) != 1:  # AF_UNIX stays on this machine
                os.write(log, (json.dumps(["socket", f"{event} {address!r}"]) + "\\n").encode())
        if changed is not None:
            os.write(log, (json.dumps(["write", changed]) + "\\n").encode())

    sys.addaudithook(hook)

_install()
"""
_REPOSITORY = str(Path(__file__).resolve().parent.parent)  # for `import compressor` from any folder
# Folders that a desktop, or `prepare_process` in an earlier test, has named: the command is to find its own.
_PLACES = ("XDG_", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR")
_NOWHERE = (Path("/dev/null"), Path("/dev/tty"))


@dataclass(frozen=True)
class Watched:
    """What a command did: `sockets` are addresses asked for, `writes` files changed outside the folders allowed."""

    returncode: int
    stdout: str
    stderr: str
    sockets: tuple[str, ...]
    writes: tuple[str, ...]


def run_watched(
    argv: Sequence[str],
    allowed: Sequence[Path],
    env: Mapping[str, str],
    *,
    cwd: Path | None = None,
    timeout: float = 900,
) -> Watched:
    """Run `python ARGV...` with `env` laid over this process's environment.

    Args:
        argv: Arguments of the interpreter, e.g. `["-m", "compressor.cli", "validate", "a.yaml"]`.
        allowed: Folders in which files may be changed; temporary folders are not among them unless named.
        env: Give HOME, TMPDIR and COMPRESSOR_CACHE folders of the test's own.
        cwd: Working folder, default this process's.
        timeout: Seconds after which the command is killed and the test fails.
    """
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(_PLACES)}
    with tempfile.TemporaryDirectory() as folder:
        hook, log = Path(folder) / "sitecustomize.py", Path(folder) / "log"
        hook.write_text(_HOOK)
        log.touch()
        search = os.pathsep.join(
            filter(None, [folder, _REPOSITORY, env.get("PYTHONPATH", inherited.get("PYTHONPATH"))])
        )
        watching = {"PYTHONPATH": search, "PYTHONDONTWRITEBYTECODE": "1", "WATCHED_LOG": str(log)}
        done = subprocess.run(
            [sys.executable, *argv],
            env={**inherited, **env, **watching},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        events = [json.loads(line) for line in log.read_text().splitlines()]
    roots = [path.resolve() for path in (*allowed, *_NOWHERE)]
    changed = [text for kind, text in events if kind == "write"]
    outside = [text for text in changed if not any(Path(text).resolve().is_relative_to(root) for root in roots)]
    sockets = [text for kind, text in events if kind == "socket"]
    return Watched(
        done.returncode, done.stdout, done.stderr, tuple(dict.fromkeys(sockets)), tuple(dict.fromkeys(outside))
    )
