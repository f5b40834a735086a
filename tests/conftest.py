"""Shared fixtures: an own cache folder for every test session, the stand-in network, real data for `slow` tests."""

import os
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # processes beside each other that wait for their threads stand in the way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from target_stages import fresh_network, time_by_weight, tiny_context
from tiny_networks import DISTILLED, DROP, FINETUNE, QUANTIZE, make_images, stand_in, write_recipe

from compressor import benchmark
from compressor.checkpoint import Network
from compressor.context import Context
from compressor.pipeline import compress

# The same examples every time, so that a commit does not fail for what another one did; HYPOTHESIS_PROFILE=explore
# draws new ones. No deadlines: how long an example takes says more about the machine than about the code.
settings.register_profile("repeat", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep tests away from the user's cache, in this process and in the processes it starts."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("COMPRESSOR_CACHE")
    os.environ["COMPRESSOR_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["COMPRESSOR_CACHE"]
    else:
        os.environ["COMPRESSOR_CACHE"] = before


@pytest.fixture(scope="session", autouse=True)
def impatient() -> Iterator[None]:
    """Tests run beside each other, so that every latency would be measured twice as long, in wait of a quiet moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "PATIENCE", 1)
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "colours")


@pytest.fixture
def tiny_network() -> Iterator[None]:
    with stand_in():
        yield


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that makes mistakes: some of its test images lie in the wrong folder. Leave it as it is."""
    root = tmp_path_factory.mktemp("finished")
    images = make_images(root / "images")
    for i in range(3):
        (images / "test" / "red" / f"{i:03d}.png").rename(images / "test" / "green" / f"moved{i}.png")
    recipe = write_recipe(root / "recipe.yaml", images, FINETUNE, DROP, DISTILLED, QUANTIZE)
    with stand_in(charts=True):
        assert compress(recipe, root / "run").passed
    return root / "run"


@pytest.fixture
def context(tiny_images: Path, tmp_path: Path) -> Context:
    """What stages may read, for tests of single stages; some files have one of their own."""
    return tiny_context(tiny_images, tmp_path)


@pytest.fixture
def network() -> Network:
    return fresh_network()


@pytest.fixture
def counted_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    time_by_weight(monkeypatch)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with `data/` and `weights/`: real images and real ImageNet weights, not part of the repository."""
    folder = Path(os.environ.get("COMPRESSOR_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir() or not (folder / "weights").is_dir():
        pytest.skip(f"no real data: {folder} has no data/ and weights/ (set COMPRESSOR_SHARED)")
    return folder
