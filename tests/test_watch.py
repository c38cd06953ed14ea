"""What watches a run: it ends what is stuck, and nothing else."""

import os
import subprocess
import sys
import textwrap

import pytest


def run(body: str, **environment):
    """A program that watches: `body` is what its loop does. -> (exit code, output)"""
    program = "import os, signal, threading, time, jax, jax.numpy as jnp\nfrom jaxalign.train import watch\n"
    program += "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # whatever nohup the tests run under
    program += textwrap.dedent(body)
    env = os.environ | environment
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=env)
    return done.returncode, done.stdout + done.stderr


def test_a_step_that_does_not_end_ends_the_run_and_shows_where():
    code, said = run("""
        def somewhere_deep():
            time.sleep(60)

        with watch.Watch(stuck_seconds=1.0) as look:
            for i in range(3):
                look.step(i)
            somewhere_deep()
    """)
    assert code == 70
    assert "somewhere_deep" in said and "stuck: step 2 has run for" in said


def test_a_step_much_shorter_than_20_of_the_longest_is_not_stuck():
    code, said = run("""
        watch.PATIENT = 6
        with watch.Watch(stuck_seconds=0.2) as look:
            for i, seconds in enumerate((0.15, 0.6, 1.2, 0.0)):
                look.step(i)
                time.sleep(seconds)
        print("the end")
    """)
    assert code == 0 and "the end" in said


def test_compilation_is_no_step():
    code, said = run("""
        with watch.Watch(stuck_seconds=1.0) as look:
            look.step(0)
            look._count(watch.LOWERED, 0.1)  # as JAX tells it where XLA begins
            time.sleep(2.5)
            look._count(watch.COMPILED, 2.5)
            time.sleep(0.5)
            jax.jit(lambda x: x + 1)(jnp.zeros(3))
            assert len(look.compiled) > 1 and not look.compiling
        print("the end")
    """)
    assert code == 0 and "the end" in said


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_in_a_step_that_does_not_end_is_still_heeded(name, code):
    """The main thread is in one long call, where Python runs no handler."""
    found, said = run(f"""
        watch.GRACE = 1.0
        with watch.Watch(stuck_seconds=100.0) as look:
            look.step(7)
            threading.Timer(0.3, os.kill, (os.getpid(), signal.{name})).start()
            jax.jit(lambda x: jax.lax.while_loop(lambda x: x < 2, jnp.sin, x))(jnp.zeros(())).block_until_ready()
    """)
    assert found == code
    assert f"step 7 did not end within 1 s: stopping without it; the last checkpoint is whole (exit code {code})" in said


def test_a_second_signal_ends_the_run_at_once():
    code, said = run("""
        with watch.Watch(stuck_seconds=100.0) as look:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
    """)
    assert code == 143 and "finishing this step, then saving; once more to stop at once" in said


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc, and /proc")
def test_what_was_freed_before_a_compilation_goes_back_to_the_system():
    code, said = run(
        """
        from pathlib import Path
        import numpy as np

        def mib():
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

        def kept():
            taken = [np.ones(2**20) for _ in range(25)]  # 8 MiB each
            after = np.ones(2**10)  # so that they do not end the heap
            del taken
            before = mib()
            jax.jit(lambda x: x + len(after))(jnp.zeros(3))
            return before - mib()

        jax.jit(lambda x: x)(0)
        print("kept", kept() < 50)
        watch.trim_when_compiled()
        print("went", kept() > 150)
    """,
        GLIBC_TUNABLES="glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776",
    )
    assert code == 0 and "kept True" in said and "went True" in said, said


def test_the_error_of_a_lone_process_is_its_own():
    code, said = run("""
        with watch.peers():
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    """)
    assert code == 1 and "RESOURCE_EXHAUSTED" in said and "process" not in said.split("RESOURCE")[1]
