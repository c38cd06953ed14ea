"""What all tests stand on: 8 virtual devices, a JAX that forbids what hides faults, the shared data, and one tiny model."""

import contextlib
import fcntl
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import shard
from jaxalign.models import decoder
from jaxalign.types import Model

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
if jax.config.jax_compilation_cache_dir is None:
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    jax.config.update("jax_compilation_cache_dir", str(home / "jaxalign-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser):
    parser.addoption("--golden", default=str(ROOT / "tests" / "golden"), help="folder of the golden numbers (*.json)")
    parser.addoption("--kills", type=int, default=8, help="how often test_resume kills each run")
    parser.addoption("--kill-seed", type=int, default=0, help="of the moments at which it does")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the repository: real data and models. Where it stands, it must be whole."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder 'shared' beside the repository")
    needed = ("data/README.md", "data/models/stories260k/model.safetensors", "golden/README.md")
    lost = [name for name in needed if not (folder / name).exists()]
    if lost:
        pytest.fail(f"the folder 'shared' beside the repository has no {', '.join(lost)}")
    return folder


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name): a folder that all workers of a test run share. Yields (folder, whether somebody has filled it); one at a time."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    @contextlib.contextmanager
    def locked(name):
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield root / name, (root / f"{name}.made").exists()
            (root / f"{name}.made").touch()

    return locked


class Tiny(NamedTuple):
    config: decoder.DecoderConfig
    model: Model
    params: dict


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """A Llama of 14 tokens, width 8, 2 layers and a value head; its parameters are large, so that logits differ by nats."""
    config = decoder.DecoderConfig(vocab=14, width=8, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=12, context=64, scalar=0.02)
    model = decoder.build(config)
    draw = np.random.default_rng(0)
    shapes = shard.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    return Tiny(config, model, jax.tree.map(lambda leaf: jnp.asarray(draw.normal(0, 0.6, leaf.shape), leaf.dtype), shapes))
