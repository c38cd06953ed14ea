"""What SECURITY.md promises: no stranger's code is run, no file is believed, nothing secret is written."""

import ast
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_checkpoints import made, same, write_gguf, write_vocabulary
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxalign import rewards
from jaxalign.models import checkpoints, files

ROOT = Path(__file__).parents[1]
SOURCES = {
    str(path.relative_to(ROOT)): path for room in ("jaxalign", "experiments", "configs") for path in (ROOT / room).rglob("*.py")
}

# ---------------------------------------------------------------------------------------- what the code may call

UNPICKLE = ("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "torch")
STARTS = ("code", "codeop", "ctypes", "importlib", "imp", "multiprocessing", "pty", "runpy", "subprocess")
DATA = ("importlib.metadata", "importlib.resources")  # start nothing
ALLOWED = {
    ("jaxalign/models/checkpoints.py", "subprocess"): "pip, for the requirements of PACKAGES",
    ("jaxalign/data/templates.py", "subprocess"): "the worker, which is this file",
    ("experiments/benchmark.py", "subprocess"): "itself, a process for each task, whose peak of memory is then its own",
    ("experiments/launch.py", "runpy"): "the config file, which is the user's own code",
    ("jaxalign/train/watch.py", "ctypes"): "malloc_trim, of the C library that the process has",
    ("experiments/__init__.py", "os.execv"): "the command itself once more, as it was typed",
}
CALLS = ("eval", "exec", "compile", "__import__", "execfile", "breakpoint")
OF = {  # a module: its functions that run or unpickle what they are given
    "os": ("system", "popen", "execv", "execve", "execvp", "spawnl", "spawnv", "startfile", "posix_spawn", "fork"),
    "np": ("load", "fromregex"),
    "numpy": ("load", "fromregex"),
    "jnp": ("load",),
    "yaml": ("load", "unsafe_load", "full_load"),
    "pd": ("read_pickle", "eval"),
}
ANYWHERE = ("apply_chat_template", "AutoTokenizer", "AutoModel", "AutoConfig", "get_class_from_dynamic_module", "find_class")
SWITCHES = ("shell", "trust_remote_code", "allow_pickle")


def dangers(place, source) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else [node.module]
            names = [name for name in names if name.split(".")[0] in UNPICKLE + STARTS and name not in DATA]
            found += [f"imports {name}" for name in names if (place, name) not in ALLOWED]
            found += [f"imports {name.name}" for name in node.names if name.name in ANYWHERE]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            found.append(f"calls {node.func.id}")
        elif isinstance(node, ast.Attribute):
            if node.attr in ANYWHERE or isinstance(node.value, ast.Name) and node.attr in OF.get(node.value.id, ()):
                found += [f"uses {ast.unparse(node)}"] * ((place, ast.unparse(node)) not in ALLOWED)
        elif isinstance(node, ast.keyword) and node.arg in SWITCHES and ast.unparse(node.value) != "False":
            found.append(f"{node.arg}={ast.unparse(node.value)}")
    return found


@pytest.mark.parametrize("place", sorted(SOURCES))
def test_no_code_of_others_is_run_and_nothing_is_unpickled(place):
    assert not dangers(place, SOURCES[place].read_text())


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import load",
        "from importlib import import_module",
        "import subprocess",
        "x = eval('1')",
        "exec(text)",
        "compile(text, '', 'exec')",
        "__import__(name)",
        "os.system(x)",
        "np.load(path)",
        "yaml.load(f)",
        "subprocess.run(x, shell=True)",
        "f(x, trust_remote_code=flag)",
        "g(path, allow_pickle=True)",
        "tokenizer.apply_chat_template(x)",
        "from transformers import AutoTokenizer",
    ],
)
def test_what_would_run_code_is_seen(source):
    assert dangers("jaxalign/data/sources.py", source)


def test_what_is_allowed_is_still_there():
    for place, what in ALLOWED:
        assert (f"{what}(" if "." in what else f"import {what}") in SOURCES[place].read_text()


# -------------------------------------------------------------------------------------------- folders of strangers


def words():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({"<e>": 0, **{x: i + 1 for i, x in enumerate(letters)}, "He": 257}, [("H", "e")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<e>", pad_token="<e>")
    out.chat_template = "{{ messages[0].content }}"
    return out


def stranger(folder):
    """A small model with a tokenizer and without a seal. -> (folder, config, params)"""
    _, config, params = made()
    checkpoints.export(folder, config, params, tokenizer=words())
    (folder / files.SEAL).unlink()
    return folder, config, params


def one_line(error):
    return "\n" not in str(error) and len(str(error)) < 2000


def test_code_that_comes_with_a_tokenizer_is_not_run_nor_its_classes_looked_up(tmp_path, monkeypatch):
    folder, config, params = stranger(tmp_path / "m")
    marker = tmp_path / "marker"
    for name in ("tokenizer.py", "tokenization_evil.py", "modeling_evil.py", "configuration_evil.py", "__init__.py"):
        (folder / name).write_text(f"open({str(marker)!r}, 'w').write('ran')\nclass Evil: pass\n")
    code = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    code["AutoTokenizer"] = ["tokenization_evil.Evil", "tokenization_evil.Evil"]
    for name, extra in (
        ("config.json", {"auto_map": code}),
        (
            "tokenizer_config.json",
            {
                "auto_map": code,
                "tokenizer_class": "BertJapaneseTokenizer",
                "tokenizer_file": "/etc/passwd",
                "tokenizer_object": "x",
                "gguf_file": "/etc/passwd",
                "vocab_file": "/etc/passwd",
                "fast_tokenizer_files": ["../tokenizer.4.0.0.json"],
                "init_inputs": ["/etc/passwd"],
            },
        ),
    ):
        raw = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(raw | extra))
    (folder / "generation_config.json").write_text("{broken")
    (folder / "model.bin").write_bytes(b"\x80\x04.")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks whether to trust
    assert same(checkpoints.load(folder)[1], params)
    tokenizer = checkpoints.tokenizer(folder)
    assert type(tokenizer) is PreTrainedTokenizerFast and tokenizer("Hey").input_ids == words()("Hey").input_ids
    assert not marker.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_link_out_of_the_folder_is_refused_and_one_into_the_hubs_cache_is_followed(tmp_path, name):
    folder, _, params = stranger(tmp_path / "models--a--b" / "snapshots" / "1234")
    read = checkpoints.tokenizer if name.startswith("tokenizer") else checkpoints.load
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (folder / name).rename(blobs / "5678")
    (folder / name).symlink_to("../../blobs/5678")
    read(folder)
    (tmp_path / "here").symlink_to(folder)
    read(tmp_path / "here")  # the folder itself may be a link
    (blobs / "5678").rename(tmp_path / "secret")
    for target in ("../../../secret", str(tmp_path / "secret")):
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        with pytest.raises(ValueError, match=f"{name} is a link to .*secret, out of its folder"):
            read(folder)
    (blobs / "5678").symlink_to("../../secret")
    (folder / name).unlink()
    (folder / name).symlink_to("../../blobs/5678")
    with pytest.raises(ValueError, match="out of its folder"):
        read(folder)


def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path):
    folder = stranger(tmp_path / "m")[0]
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(OSError, match="there is no .*config.json"):
        checkpoints.load(folder)


BIG = 10**12
ABSURD = {
    "vocab_size": [BIG, -1, 0, "13", None, True, 1.5, [], {}, float("nan"), float("inf"), 10**400, 2**31 - 1],
    "hidden_size": [BIG, -12, 2**31 - 1],
    "num_hidden_layers": [BIG, -3, "3", 2**31 - 1],
    "num_attention_heads": [BIG, 0, 7],
    "num_key_value_heads": [BIG, -1, 2**31 - 1],
    "head_dim": [BIG, 5, 2**31 - 1],
    "intermediate_size": [BIG, 2**31 - 1],
    "max_position_embeddings": [BIG, "x"],
    "rms_norm_eps": [float("nan"), float("inf"), -1e-6, "1e-6", 10**400],
    "rope_theta": [float("nan"), -1.0, []],
    "hidden_act": [["silu"], {}, 3, "evil" * 10**5],
    "model_type": [["llama"], {}, None, "a\nb", "x" * 10**6],
    "layer_types": [5, "full_attention", [["full_attention"]]],
    "rope_parameters": [5, "x", [1], {"rope_type": ["x"]}],
    "tie_word_embeddings": ["yes", 1],
    "num_local_experts": [[1] * 10**5],
}


@pytest.mark.parametrize("key", ABSURD)
def test_an_absurd_config_is_one_line_and_no_allocation(tmp_path, key):
    folder = stranger(tmp_path / "m")[0]
    raw = json.loads((folder / "config.json").read_text())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for value in ABSURD[key]:
        changed = raw | ({"rope_parameters": None} if key == "rope_theta" else {}) | {key: value}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError) as caught:
            checkpoints.load(folder)
        assert str(folder) in str(caught.value) and one_line(caught.value)
        if value is None or isinstance(value, str | list | float) or value == BIG:
            assert f"config.json: {key}" in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


@pytest.mark.parametrize(
    "text, says",
    [
        (b'{"a":' * 10**5, "recursion"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
        (b'{"a": "\xff"}', "utf-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b"[1]", "holds a list, not an object"),
        (b"", "not JSON"),
        (b" " * (files.MOST_BYTES + 1), "bytes; more than"),
    ],
    ids=["deep", "twice", "bytes", "digits", "list", "empty", "long"],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer_config.json"])
def test_json_that_is_none_or_too_much_is_named(tmp_path, name, text, says):
    folder = stranger(tmp_path / "m")[0]
    if "index" in name:
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(text)
    with pytest.raises(ValueError, match=f"{name}.*{says}") as caught:
        (checkpoints.tokenizer if name.startswith("tokenizer") else checkpoints.load)(folder)
    assert one_line(caught.value)


# ------------------------------------------------------------------------------------ bytes that were changed

MASKS = [b"\0", b"\xff", b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f", b"9" * 9, b"-1", b"[[", b'"', b"}", b"\n"]
CHANGES = st.tuples(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(MASKS) | st.binary(min_size=1, max_size=4)), max_size=4),
    st.sampled_from([1.0, 1.0, 1.0, 0.9, 0.3, 0.0]),
)
FUZZ = settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def changed(data: bytes, changes, head: int) -> bytes:
    """`data` with bytes written over those of its first `head`, and cut off."""
    data, (writes, kept) = bytearray(data), changes
    for place, new in writes:
        at = int(place * head)
        data[at : at + len(new)] = new
    return bytes(data[: int(kept * len(data))])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder, a GGUF file, and what reads them."""
    root = tmp_path_factory.mktemp("whole")
    folder, config, params = stranger(root / "m")
    write_gguf(root / "m.gguf", config, params, extra=[write_vocabulary])
    return root


def survives(read, source):
    """The reader gives a result, or an error of one line that names the file, and takes little memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read(source)
    except (ValueError, OSError) as error:
        assert one_line(error) and str(source) in str(error), str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


@pytest.mark.parametrize(
    "name, head", [("model.safetensors", 3000), ("config.json", 900), ("tokenizer.json", 9000), ("tokenizer_config.json", 400)]
)
def test_a_folder_with_changed_bytes_is_refused_or_read(whole, name, head):
    folder = whole / "m"
    data, read = (folder / name).read_bytes(), checkpoints.tokenizer if name.startswith("tokenizer") else checkpoints.load

    @FUZZ
    @given(CHANGES)
    def run(changes):
        (folder / name).write_bytes(changed(data, changes, min(head, len(data))))
        survives(read, folder)

    try:
        run()
    finally:
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("read", [checkpoints.load, checkpoints.tokenizer], ids=["model", "tokenizer"])
def test_a_gguf_file_with_changed_bytes_is_refused_or_read(whole, read):
    data = (whole / "m.gguf").read_bytes()

    @FUZZ
    @given(CHANGES, st.sampled_from([60, 600, 9000]))
    def run(changes, head):
        (whole / "changed.gguf").write_bytes(changed(data, changes, head))
        survives(read, whole / "changed.gguf")

    run()


@pytest.mark.parametrize("at", range(0, 300, 4))
def test_a_gguf_header_of_absurd_counts_is_refused_at_once(whole, tmp_path, at):
    data = bytearray((whole / "m.gguf").read_bytes())
    data[at : at + 8] = b"\xff" * 7 + b"\x0f"
    (tmp_path / "m.gguf").write_bytes(data)
    survives(checkpoints.load, tmp_path / "m.gguf")


# ----------------------------------------------------------------------------------- what a model writes, and secrets


@pytest.mark.parametrize("text", ["a", "'", "n't ", "not ", "!", "a'", "\n", "é", "a\0"])
def test_a_long_answer_is_scored_in_linear_time(text):
    assert rewards.sentiment(text * 10**6, {"a": 1.0}) in (0.0, 1.0)  # squared, it would take hours


@pytest.mark.slow
def test_no_secret_of_the_environment_is_written_or_said(tmp_path):
    canary = "canary-4f1c2e"
    secrets = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PIP_INDEX_URL")
    command = [sys.executable, "-m", "experiments.sft", "--config=configs/sft.py:tiny", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        command, capture_output=True, cwd=ROOT, env=os.environ | dict.fromkeys(secrets, canary) | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"config.json", "metrics.jsonl", "summary.json", "report.html"} <= {path.name for path in written}
    assert canary.encode() not in done.stdout + done.stderr
    assert not [path for path in written if canary.encode() in path.read_bytes()]
