"""Set-up of every test: shape annotations are checked, nothing reaches the network or the user's cache.

pytest reads this file before any test module: the import hook is there before `model` or `inspection` loads.
"""

import os
import shutil
import signal
from collections.abc import Iterator

from jaxtyping import install_import_hook

install_import_hook(["model", "inspection"], "beartype.beartype")
os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it once, on import
os.environ["MPLBACKEND"] = "Agg"
os.environ["COLUMNS"] = "120"  # what is printed depends on the terminal's width
# Threads that wait by spinning slow a small model a hundredfold on a machine that is busy with other things.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A program that is started in the background ignores these, and what it starts inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
if os.name == "nt":
    collect_ignore = ["faults"]  # they send POSIX signals
else:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest  # noqa: E402
import torch  # noqa: E402

from data.config import cache_folder  # noqa: E402

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache folder for the session: tests share what they prepare, the user's own stays untouched."""
    cache = tmp_path_factory.mktemp("cache")
    downloaded = cache_folder() / "tinyshakespeare.txt"  # what would need the network is taken over where it is there
    if downloaded.is_file():
        shutil.copy(downloaded, cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLASSGPT_CACHE", str(cache))
        yield
