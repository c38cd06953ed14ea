"""Chat templates, rendered in a process of its own: this file is also that process.

A template comes with a tokenizer, from anybody, and is a program in Jinja. Jinja's sandbox keeps it from Python's objects, but lets
it loop for ever and fill the memory. So a worker renders for this process: its environment is empty, it can open no file or socket,
and its time and memory are limited. Where a template breaks a limit the worker ends, and the next conversation gets a new one.
What a template is given, and what it can say, is as transformers' `apply_chat_template` has it.
"""

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

CPU_SECONDS, SECONDS = 5, 60  # for one conversation: of the processor; on the clock, should the worker be stuck otherwise
MEMORY = 512 * 2**20  # bytes of the worker's address space
LENGTH = 64 * 2**20  # bytes of an answer
NO_JINJA = 3  # the worker's exit code
_workers, _lock = {}, threading.Lock()  # a process that is forked starts its own


def render(tokenizer, messages: list[dict], cuts: list[tuple[int, bool]]) -> list[str]:
    """The tokenizer's chat template over messages[:count], with a prompt for the assistant's turn or not, for each (count, prompt).

    Raises ValueError, one line, where there is no template, where it refuses the messages, fails, hangs, or takes too much memory.
    """
    if not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template")
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    about = {"template": tokenizer.get_chat_template(), "tokens": tokenizer.special_tokens_map, "seconds": CPU_SECONDS}
    request = json.dumps({**about, "messages": messages, "cuts": cuts}, default=lambda value: f"<{type(value).__name__}>")
    with _lock:
        answer = _ask(request.encode() + b"\n")
    if "refused" in answer:
        roles = [message["role"] for message in messages[: answer["count"]]]
        raise ValueError(f"the chat template refuses the roles {roles}: {answer['refused']}")
    if "failed" in answer:
        raise ValueError(f"the chat template {answer['failed']}")
    return answer["texts"]


def _ask(request: bytes) -> dict:
    process, pipe = _workers.get(os.getpid()) or _start()
    answer, deadline = bytearray(), time.monotonic() + SECONDS
    try:
        pipe.settimeout(SECONDS)
        pipe.sendall(request)
        while not answer.endswith(b"\n"):
            pipe.settimeout(max(1e-3, deadline - time.monotonic()))
            part = pipe.recv(1 << 20)
            if not part or len(answer) > LENGTH + 1:
                raise ConnectionError
            answer += part
        return json.loads(answer)
    except TimeoutError:
        failed = f"did not end within {SECONDS} s"
    except (ConnectionError, ValueError):
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)
        failed = _fate(process.returncode)
    except BaseException:  # Ctrl-C: this answer is not to be taken for the next one
        _stop()
        raise
    _stop()
    return {"failed": failed}


def _fate(code) -> str:
    if code == -signal.SIGXCPU:
        return f"took more than {CPU_SECONDS} s of processor time: does it end?"
    if code == NO_JINJA:
        return f"cannot be rendered: {sys.executable} cannot import jinja2"
    return f"broke the process that renders it, which ended with code {code}"


def _start():
    ours, theirs = socket.socketpair()
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}  # which some Pythons need to start
    path = [place for place in sys.path if place]
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, *path],
        **{"stdin": theirs, "stdout": theirs, "stderr": subprocess.DEVNULL, "env": kept, "cwd": "/"},
        start_new_session=True,  # Ctrl-C is for this process
    )
    theirs.close()
    _workers[os.getpid()] = process, ours
    return process, ours


@atexit.register
def _stop():
    if found := _workers.pop(os.getpid(), None):
        process, pipe = found
        pipe.close()
        process.kill()
        process.wait()


# ------------------------------------------------------------------------------- from here on: the worker


def _environment():
    """The environment in which transformers 5 renders chat templates."""
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}, around what an assistant says, is rendered as if it were not there."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("_say"), [], [], body).set_lineno(line)

        def _say(self, caller):
            return caller()

    class Names(Namespace):
        """Takes no name that Python's internals go by."""

        def __init__(*args, **kwargs):
            self, *rest = args
            Namespace.__init__(self)
            for name, value in dict(*rest, **kwargs).items():
                self[name] = value

        def __setitem__(self, name, value):
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace takes no name such as {name!r}")
            Namespace.__setitem__(self, name, value)

    class Dict:
        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args):
            return dict.fromkeys(*args)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    out = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    out.filters["tojson"] = tojson
    out.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": Dict(),
        "namespace": Names,
    }
    return out


def _answer(request: dict, template) -> dict:
    from jinja2 import TemplateError

    texts, count = [], 0
    try:
        for count, prompt in request["cuts"]:
            about = {"messages": request["messages"][:count], "tools": None, "documents": None, "add_generation_prompt": prompt}
            texts.append(template(request["template"]).render(**about | request["tokens"]))
        return {"texts": texts}
    except MemoryError:
        return {"failed": f"took more than {MEMORY >> 20} MB of memory"}
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        if type(error) is TemplateError:  # its own word, by raise_exception
            return {"refused": reason, "count": count}
        return {"failed": f"fails: {type(error).__name__}: {reason}"}


def _serve():
    """Answer the requests of stdin on stdout, one a line, within the limits."""
    import resource

    sys.path[:] = sys.argv[1:]
    try:
        environment = _environment()
    except ImportError:
        sys.exit(NO_JINJA)
    template = functools.lru_cache(16)(environment.from_string)
    for text in ("{{ strftime_now('%Y') }}", "{{ 1 / 0 }}", "{{ raise_exception('') }}"):  # what is imported late is imported now
        _answer({"cuts": [[0, True]], "template": text, "messages": [], "tokens": {}}, template)
    limits = {"RLIMIT_AS": MEMORY, "RLIMIT_NOFILE": 3, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0}
    for name, most in limits.items():
        with suppress(ValueError, OSError):  # macOS knows no RLIMIT_AS
            resource.setrlimit(getattr(resource, name), (most, most))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + request["seconds"], resource.RLIM_INFINITY))
        try:
            answer = json.dumps(_answer(request, template)).encode()
        except MemoryError:
            answer = b""
        if not 0 < len(answer) < LENGTH:
            answer = json.dumps({"failed": f"writes more than {LENGTH >> 20} MB"}).encode()
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
