"""Weights load whole or not at all, nothing in a file is executed, no network is asked unasked."""

import errno
import logging
import pickle
import shutil
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from http.client import IncompleteRead
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compressor import download
from compressor.artifacts import sha256_of
from compressor.errors import RecipeError, ResourceError
from compressor.models import weights as module
from compressor.models.weights import fetch_weights, imagenet_path, load_into, load_weights, read_tensors


class Small(nn.Module):
    """Stands for an architecture in the table: the head is `fc` there too."""

    def __init__(self, classes: int = 3, channels: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, classes)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every address asked for; asking fails as it does without a network."""
    asked: list[str] = []

    def refuse(request: urllib.request.Request, timeout: float) -> None:
        asked.append(request.full_url)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return asked


def tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def written(path: Path, content: dict[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def load(network: nn.Module, weights: str | Path, **options: Any) -> module.WeightsReport:
    return load_weights(network, name="xception", weights=str(weights), head="fc", **options)


def equal(first: nn.Module, second: nn.Module, prefix: str = "") -> bool:
    other = second.state_dict()
    return all(torch.equal(v, other[k]) for k, v in first.state_dict().items() if k.startswith(prefix))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt"])
def test_a_file_of_the_same_network_loads_whole(tmp_path: Path, name: str) -> None:
    trained, fresh = Small(), Small()
    trained.bn.num_batches_tracked.fill_(7)
    path = written(tmp_path / name, tensors(trained))
    report = load(fresh, path)
    assert equal(trained, fresh)
    assert report == module.WeightsReport(str(path), sha256_of(path), 9, (), (), (), head_loaded=True)


def test_a_checkpoint_that_wraps_its_state_dict_is_unwrapped(tmp_path: Path) -> None:
    trained, fresh = Small(), Small()
    torch.save({"state_dict": OrderedDict(tensors(trained)), "epoch": 3}, tmp_path / "w.pth")
    assert load(fresh, tmp_path / "w.pth").head_loaded
    assert equal(trained, fresh)


def test_half_precision_is_widened(tmp_path: Path) -> None:
    trained, fresh = Small(), Small()
    path = written(
        tmp_path / "w.safetensors", {k: v.half() if v.is_floating_point() else v for k, v in tensors(trained).items()}
    )
    load(fresh, path)
    assert {v.dtype for k, v in fresh.state_dict().items() if "tracked" not in k} == {torch.float32}
    torch.testing.assert_close(fresh.conv.weight, trained.conv.weight, rtol=1e-3, atol=1e-4)


def test_another_class_count_leaves_the_head_fresh_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained, fresh = Small(classes=5), Small(classes=3)
    before = Small(classes=3)
    before.load_state_dict(fresh.state_dict())
    with caplog.at_level(logging.INFO, "compressor"):
        report = load(fresh, written(tmp_path / "w.safetensors", tensors(trained)))
    assert (report.reinitialised, report.head_loaded, report.missing) == (("fc.weight", "fc.bias"), False, ())
    assert "2 re-initialised: fc.weight, fc.bias" in caplog.text
    assert equal(before, fresh, "fc")
    assert equal(trained, fresh, "conv")
    assert equal(trained, fresh, "bn")


def test_a_file_without_a_head_leaves_it_fresh_and_lists_it(tmp_path: Path) -> None:
    trained = {k: v for k, v in tensors(Small()).items() if not k.startswith("fc")}
    report = load(Small(), written(tmp_path / "w.safetensors", trained))
    assert (report.missing, report.head_loaded, report.loaded) == (("fc.weight", "fc.bias"), False, 7)


def test_half_a_head_is_not_a_head() -> None:
    content = tensors(Small())
    del content["fc.bias"]
    report = load_into(Small(), content, head="fc", source="w", sha256=None)
    assert (report.missing, report.head_loaded) == (("fc.bias",), False)


def test_counters_of_batches_may_be_absent_and_extra_tensors_are_listed() -> None:
    content = tensors(Small())
    del content["bn.num_batches_tracked"]
    content["aux.weight"] = torch.zeros(1)
    report = load_into(Small(), content, head="fc", source="w", sha256=None)
    assert (report.missing, report.unexpected, report.head_loaded) == ((), ("aux.weight",), True)


def test_weights_of_another_architecture_are_refused_and_change_nothing() -> None:
    fresh = Small()
    before = tensors(fresh)
    other = {"head" + name if name.startswith("conv") else name: v for name, v in tensors(Small()).items()}
    with pytest.raises(
        RecipeError, match=r"w does not fit .*2 tensors .*\(conv\.weight, conv\.bias\); 2 tensors .*unkn"
    ):
        load_into(fresh, other, head="fc", source="w", sha256=None)
    with pytest.raises(RecipeError, match=r"6 tensors missing or of another shape \(.*, \.\.\.\)"):
        load_into(fresh, tensors(Small(channels=8)), head="fc", source="w", sha256=None)
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())


class Bomb:
    """What a pickle can hold: a call made while it is read."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("style", ["zip", "legacy", "bare"])
def test_code_in_a_pickle_is_refused_and_not_executed(tmp_path: Path, style: str) -> None:
    path, proof = tmp_path / "w.pth", tmp_path / "executed"
    if style == "bare":
        path.write_bytes(pickle.dumps({"conv.weight": Bomb(proof)}, protocol=2))
    else:
        torch.save({"conv.weight": Bomb(proof)}, path, _use_new_zipfile_serialization=style == "zip")
    with pytest.raises(ResourceError, match=r"w\.pth: not a readable weights file"):
        read_tensors(path)
    assert not proof.exists()


def test_a_pickle_of_something_else_is_refused(tmp_path: Path) -> None:
    for content, text in (([1, 2], "list"), ({"a": 1}, "dict"), (torch.zeros(2), "Tensor")):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(ResourceError, match=f"found {text}.*, expected a state dict of tensors"):
            read_tensors(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("damage", ["empty", "cut", "short", "text", "header"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = written(tmp_path / name, tensors(Small()))
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut": whole[:-40],
            "short": whole[:5],
            "text": b"<html>not found</html>" * 20,
            "header": b"\xff" * 8 + whole[8:],
        }[damage]
    )
    with pytest.raises(ResourceError, match=rf"{name}: not a readable weights file \(.+\)$"):
        read_tensors(path)


@pytest.mark.parametrize("style", ["safetensors", "zip", "legacy"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flipped_bytes_are_refused_or_read_but_never_crash(tmp_path: Path, style: str) -> None:
    if style == "safetensors":
        path = written(tmp_path / "w.safetensors", tensors(Small()))
    else:
        path = tmp_path / "w.pth"
        torch.save(tensors(Small()), path, _use_new_zipfile_serialization=style == "zip")
    whole, random, refused = path.read_bytes(), Random(0), 0
    for _ in range(80):
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[random.randrange(min(len(whole), 900))] = random.randrange(256)
        path.write_bytes(damaged)
        try:
            read_tensors(path)
        except ResourceError:
            refused += 1
    assert refused > 20


def test_other_formats_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.h5").write_bytes(b"x")
    with pytest.raises(ResourceError, match=r"w\.h5: '\.h5' is not supported; allowed: \.safetensors, \.pth, \.pt"):
        read_tensors(tmp_path / "w.h5")
    with pytest.raises(ResourceError, match="no such weights file"):
        read_tensors(tmp_path)


def test_a_near_file_name_is_suggested(tmp_path: Path) -> None:
    written(tmp_path / "xception.safetensors", tensors(Small()))
    with pytest.raises(ResourceError, match=r"no such weights file; did you mean 'xception\.safetensors'\?"):
        load(Small(), tmp_path / "xcepton.safetensors")
    with pytest.raises(ResourceError, match=r"no such weights file$"):
        load(Small(), tmp_path / "absent" / "xcepton.safetensors")


def test_none_is_random_as_asked(no_network: list[str]) -> None:
    network = Small()
    before = tensors(network)
    report = load(network, "none")
    assert (report.source, report.loaded, report.head_loaded) == ("none", 0, False)
    assert report.notes == ("random initialisation, as asked",)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_imagenet_comes_from_the_cache_alone(cache: Path, no_network: list[str]) -> None:
    trained, fresh = Small(classes=1000), Small()
    path = written(cache / "weights" / "xception_imagenet.safetensors", tensors(trained))
    assert imagenet_path("xception") == path
    report = load(fresh, "imagenet", download=True)
    assert (report.source, report.reinitialised) == (str(path), ("fc.weight", "fc.bias"))
    assert equal(trained, fresh, "conv")
    assert not no_network


def test_absent_imagenet_weights_name_the_ways_on(no_network: list[str], cache: Path) -> None:
    with pytest.raises(ResourceError) as caught:
        load(Small(), "imagenet")
    for way in ("weights fetch xception", "weights_download: true", "model.weights: PATH", "weights_fallback: none"):
        assert way in str(caught.value)
    assert str(cache / "weights") in str(caught.value)
    assert not no_network


def test_random_weights_in_place_of_imagenet_are_announced(
    no_network: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "compressor"):
        report = load(Small(), "imagenet", fallback="none")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "TRAINING FROM RANDOM INITIALISATION" in caplog.text
    assert (report.source, report.loaded) == ("none", 0)
    assert "weights_fallback: none" in report.notes[0]
    assert not no_network


def test_a_result_never_depends_on_whether_the_hub_answered(no_network: list[str]) -> None:
    for number, fallback in enumerate((None, "none"), start=1):
        with pytest.raises(ResourceError, match=r"could not be read \(no route to host\)"):
            load(Small(), "imagenet", download=True, fallback=fallback)
        assert len(no_network) == number


def test_fetching_without_a_network_fails_at_once_and_leaves_nothing(no_network: list[str], cache: Path) -> None:
    started = time.perf_counter()
    with pytest.raises(ResourceError, match=r"weights fetch xception: https://\S+ could not be read \(.*by hand to"):
        fetch_weights("xception")
    assert time.perf_counter() - started < 10
    assert no_network == ["https://huggingface.co/timm/legacy_xception.tf_in1k/resolve/main/model.safetensors"]
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_network_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert download.CONNECT_S < 10
    monkeypatch.setattr(download, "CONNECT_S", 0.1)
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: time.sleep(1))
    with pytest.raises(ResourceError, match="no answer within"):
        fetch_weights("xception")


def test_only_https_is_asked(no_network: list[str]) -> None:
    with pytest.raises(OSError, match="only https"):
        download.open_url("http://example.org/w")
    assert not no_network


def test_a_cache_that_cannot_be_written_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: Response(b"abc"))
    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(ResourceError, match=r"xception_imagenet\.safetensors: cannot be written \(No space left"):
        fetch_weights("xception")


class Response(BytesIO):
    """An answer that stops, or never stops, after some bytes."""

    def __init__(self, content: bytes, error: Exception | None = None):
        super().__init__(content)
        self.error = error

    def read(self, size: int | None = -1) -> bytes:
        block = super().read(size)
        if not block and self.error is not None:
            raise self.error
        return block


@pytest.mark.parametrize(
    "response",
    [
        pytest.param(Response(b"abc", TimeoutError("timed out")), id="stalls"),
        pytest.param(Response(b"abc", ConnectionResetError("reset")), id="breaks"),
        pytest.param(Response(b"abc", IncompleteRead(b"")), id="ends early"),
        pytest.param(Response(b"<html>sign in</html>"), id="captive portal"),
    ],
)
def test_a_broken_download_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch, response: Response) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: response)
    with pytest.raises(ResourceError, match=r"weights fetch xception: https://"):
        fetch_weights("xception")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_download_arrives_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Small(classes=1000)
    content = written(tmp_path / "w.safetensors", tensors(trained)).read_bytes()
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: Response(content))
    assert fetch_weights("xception") == imagenet_path("xception")
    fresh = Small()
    load(fresh, "imagenet")
    assert equal(trained, fresh, "conv")


def test_an_unknown_name_is_not_asked_for(no_network: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"'xceptoin' is not known; allowed: xception, .*; did you mean 'xception'\?"):
        fetch_weights("xceptoin")
    assert not no_network
