"""Weights from the hub: the real client against a small server on loopback that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from inprocess import at_hub, command
from loopback import Loopback

REPOSITORY, COMMIT = "someone/tiny-vae", "a" * 40


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A random AutoencoderTiny of factor 2, as the hub would hold it, with a file that must not be fetched."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return {**{path.name: path.read_bytes() for path in folder.iterdir()}, "pickle.bin": b"never fetched"}


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """The server's address, and the paths that were asked of it."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            asked.append(self.path)
            name = self.path.partition("?")[0].rpartition("/")[2]
            if self.path.startswith(f"/api/models/{REPOSITORY}"):
                listing = [
                    {"rfilename": file, "path": file, "type": "file", "oid": file, "size": len(data)}
                    for file, data in files.items()
                ]
                document = {"id": REPOSITORY, "sha": COMMIT, "siblings": listing}
                data = json.dumps(listing if "/tree/" in self.path else document).encode()
            elif self.path.startswith(f"/{REPOSITORY}/resolve/") and name in files:
                data = files[name]
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with Loopback(Hub) as server:
        yield server.url, asked


@pytest.fixture
def encode(images: Path, tmp_path: Path) -> Callable[..., CompletedProcess[str]]:
    """``encode(out, endpoint, weights)``, the command, with the hub at `endpoint` and a cache of the test's own."""

    def run(out: Path, endpoint: str, weights: str) -> CompletedProcess[str]:
        with at_hub(endpoint, tmp_path / "cache"):
            return command(
                "latentprep", "encode", images, "--codec", "taesd", "--weights", weights, "--size", 32, "--out", out
            )

    return run


def test_weights_are_fetched_once_and_only_what_is_needed(
    hub: tuple[str, list[str]], encode: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    endpoint, asked = hub
    done = encode(tmp_path / "a", endpoint, REPOSITORY)
    assert done.returncode == 0, done.stderr
    fetched = {path.rpartition("/")[2] for path in asked if "/resolve/" in path}
    assert fetched == {"config.json", "diffusion_pytorch_model.safetensors"}
    asked.clear()
    assert encode(tmp_path / "b", endpoint, REPOSITORY).returncode == 0
    assert not [path for path in asked if path.endswith(".safetensors")]
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


def test_no_network_and_no_such_model_say_the_way_out(
    hub: tuple[str, list[str]], encode: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    for endpoint, weights in (("http://127.0.0.1:9", REPOSITORY), (hub[0], "someone/absent")):
        done = encode(tmp_path / "out", endpoint, weights)
        assert done.returncode == 5, done.stderr
        assert f"cannot get the weights {weights}" in done.stderr
        assert "--weights" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()
