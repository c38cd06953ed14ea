"""Chat templates: what the worker writes is what transformers writes, and no template can hang, fill or see this process."""

import os
import signal
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from jaxalign.data import templates
from jaxalign.data.text import chat

TALK = [
    {"role": "system", "content": "Be <kind> & brief."},
    {"role": "user", "content": "Hé, 漢 😀\n"},
    {"role": "assistant", "content": " yes \n", "name": None},
]
CUTS = [(3, False), (2, True), (1, False)]
BLOCKS = """
{%- set ns = namespace(count=0, last='') -%}
{% for m in messages %}
    {% if m.role == 'system' %}
        {%- continue %}
    {% endif %}
    {% set ns.count = ns.count + 1 %}
    {% generation %}{% set inner = 1 %}{{ m.content | trim }}{{ eos_token }}{% endgeneration %}
    {{ inner is defined }} {{ m.name is defined }} {{ tools is none }} {{ loop.index0 }}
{% endfor %}
{{ ns.count }}{{ 'ask' if add_generation_prompt else 'done' }}
"""
WRITE = [
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<e>{% endfor %}{{ '<|assistant|>' if add_generation_prompt }}",
    BLOCKS,
    "{{ messages | tojson }} {{ messages | tojson(indent=2) }} {{ dict(a=1) }} {{ strftime_now('%Y') }} {{ bos_token }}",
    "{{ messages[-1:] | map(attribute='role') | join(',') }}{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages | length) }}",
]


@pytest.fixture
def words(shared):
    return PreTrainedTokenizerFast(
        tokenizer_file=str(shared / "data" / "models" / "stories260k" / "tokenizer.json"), bos_token="<s>", eos_token="<e>"
    )


@pytest.mark.parametrize("template", WRITE, ids=["plain", "blocks", "functions", "macro"])
def test_a_template_writes_what_it_writes_in_transformers(words, template):
    words.chat_template = template
    expected = [words.apply_chat_template(TALK[:count], tokenize=False, add_generation_prompt=prompt) for count, prompt in CUTS]
    assert templates.render(words, TALK, CUTS) == expected


def test_of_several_templates_the_default_is_rendered(words):
    words.chat_template = {"default": "{{ messages | length }}", "other": "no"}
    assert templates.render(words, TALK, CUTS) == ["3", "2", "1"]
    words.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        templates.render(words, TALK, CUTS)


HOSTILE = {
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 1 s of processor time"),
    "one long operation": ("{{ ('a' * 10**5 + 'b') | replace('a', 'a' * 10**5) | length }}", "512 MB of memory|processor time"),
    "memory": ("{{ 'a' * 10**9 }}", "more than 512 MB of memory"),
    "doubling": ("{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}", "512 MB of memory"),
    "a long answer": ("{{ 'a' * 3 * 10**7 }}", "writes more than 64 MB"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: RecursionError"),
    "internals": ("{{ ''.__class__.__mro__ }}", "fails: SecurityError: .*__class__"),
    "globals": ("{{ lipsum.__globals__['os'].environ }}", "fails: SecurityError: .*__globals__"),
    "a namespace's internals": ("{% set n = namespace(__init__=1) %}", "fails: SecurityError"),
    "the messages": ("{{ messages.append(1) }}", "fails: SecurityError: .*append"),
    "a file": ("{% include '/etc/passwd' %}", "fails: TypeError: no loader"),
    "no Jinja": ("{% for", "fails: TemplateSyntaxError"),
    "division": ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
    "lines": ("{{ raise_exception('one\n\ntwo' + 'x' * 9999) }}", r"refuses the roles \['system', 'user', 'assistant'\]: one two"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_template_is_one_line_of_error_and_the_next_one_is_rendered(words, monkeypatch, case):
    template, says = HOSTILE[case]
    monkeypatch.setattr(templates, "CPU_SECONDS", 1)
    words.chat_template = template
    with pytest.raises(ValueError, match=f"the chat template .*({says})") as caught:
        chat(words, TALK)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    words.chat_template = "{{ messages | length }}"
    assert templates.render(words, TALK, CUTS) == ["3", "2", "1"]


def worker(words):
    words.chat_template = "x"
    templates.render(words, TALK, CUTS)
    return templates._workers[os.getpid()][0]


def test_one_worker_serves_and_a_dead_one_is_replaced(words):
    first = worker(words)
    assert worker(words) is first
    first.kill()
    first.wait()
    with pytest.raises(ValueError, match="broke the process that renders it"):
        worker(words)
    assert worker(words).pid != first.pid


def test_a_worker_that_answers_nothing_is_given_up(words, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    stuck = worker(words)
    os.kill(stuck.pid, signal.SIGSTOP)  # it uses no processor
    with pytest.raises(ValueError, match="did not end within 0.2 s"):
        worker(words)
    assert stuck.poll() is not None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_worker_has_no_secret_no_file_and_little_memory(words, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary")
    templates._stop()
    place = Path("/proc") / str(worker(words).pid)
    assert set((place / "environ").read_bytes().split(b"\0")) <= {
        b"",
        f"LD_LIBRARY_PATH={os.environ.get('LD_LIBRARY_PATH')}".encode(),
    }
    limits = {line[:25].strip(): line[25:].split()[1] for line in (place / "limits").read_text().splitlines()[1:]}
    wanted = {"Max open files": 3, "Max file size": 0, "Max address space": templates.MEMORY, "Max core file size": 0}
    assert {name: int(limits[name]) for name in wanted} == wanted
    assert len(list((place / "fd").iterdir())) == 3
