"""--push: one commit to a repository of the hub, here a server of the few addresses it needs."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import pytest

from phi3v.errors import ConfigError
from phi3v.export.push import Repository
from phi3v.export.target import ORIGIN, origin_of
from phi3v.files import write_json

NAME = "somebody/animals"


class Hub(ThreadingHTTPServer):
    """Repositories as files by name; `is_private` of those that were created."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files: dict[str, bytes] = {}
        self.exists = False
        self.is_private: bool | None = None
        self.commits: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.startswith("/api/whoami"):
            is_known = self.headers["Authorization"] == "Bearer right"
            self.answer({"name": "somebody", "type": "user"} if is_known else None, 401)
        elif "/tree/" in self.path:
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in self.server.files.items()
            ]
            self.answer(rows if self.server.exists else None, 404)
        elif self.path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in self.server.files]
            facts = {"id": NAME, "sha": "1" * 40, "siblings": siblings, "private": False}
            self.answer(facts if self.server.exists else None, 404)
        elif (name := Path(self.path).name) in self.server.files:
            self.file(self.server.files[name])
        else:
            self.answer(None, 404)  # what the client asks the hub about itself

    def do_HEAD(self) -> None:
        self.file(self.server.files[Path(self.path).name], with_body=False)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.server.exists = True
            self.server.is_private = json.loads(body).get("visibility") == "private"
            self.answer({"url": f"{self.server.address}/{NAME}", "name": NAME})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            self.commit([json.loads(line) for line in body.splitlines()])
            url = f"{self.server.address}/{NAME}/commit/{'2' * 40}"
            self.answer({"commitUrl": url, "commitOid": "2" * 40, "success": True})
        else:
            self.answer({})

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.server.files[value["path"]]
            else:
                self.server.commits.append(value["summary"])

    def answer(self, value: Any, otherwise: int = 200) -> None:
        data = json.dumps(value if value is not None else {"error": "no"}).encode()
        self.send_response(200 if value is not None else otherwise)
        if value is None and otherwise == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def file(self, data: bytes, with_body: bool = True) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", '"etag"')
        self.send_header("X-Repo-Commit", "1" * 40)
        self.end_headers()
        if with_body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "right")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder that looks like an export of the run `tmp_path / animals`."""
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    write_json(folder / ORIGIN, origin_of(tmp_path / "animals", "step-00000003"))
    return folder


@pytest.mark.parametrize("is_private", [True, False])
def test_a_folder_becomes_one_commit_of_a_repository(
    hub: Hub, out: Path, tmp_path: Path, is_private: bool
) -> None:
    repository = Repository(NAME, is_private)
    repository.check(tmp_path / "animals")
    assert repository.push(out) == f"{hub.address}/{NAME}"
    assert hub.files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert hub.is_private is is_private and len(hub.commits) == 1


def test_an_export_of_the_same_run_is_replaced_as_a_whole(
    hub: Hub, out: Path, tmp_path: Path
) -> None:
    repository = Repository(NAME, False)
    repository.push(out)
    hub.files |= {"model-00001-of-00002.safetensors": b"old", ".gitattributes": b""}
    repository.check(tmp_path / "animals")
    repository.push(out)
    assert hub.files.keys() - {".gitattributes"} == {path.name for path in out.iterdir()}


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"thesis.pdf": b"words"}, "holds other files, thesis.pdf among them"),
        ({ORIGIN: json.dumps(origin_of(Path("/dogs"), "")).encode()}, "holds an export of another"),
    ],
)
def test_a_repository_with_something_else_is_refused(
    hub: Hub, tmp_path: Path, files: dict[str, bytes], what: str
) -> None:
    hub.exists, hub.files = True, files
    with pytest.raises(ConfigError, match=f"--push {NAME} {what}.*; name another repository"):
        Repository(NAME, False).check(tmp_path / "animals")


def refusal(tmp_path: Path, name: str = NAME) -> str:
    with pytest.raises(ConfigError) as caught:
        Repository(name, False).check(tmp_path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_a_login_nothing_is_begun(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert refusal(tmp_path) == (
        f"--push {NAME} needs a login at the hub; run `hf auth login`, or set HF_TOKEN"
    )
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert refusal(tmp_path).startswith(f"--push {NAME} failed: ")


@pytest.mark.parametrize("name", ["bad name", "animals", "a/b/c", "some body/x", "a/b.git", "a/"])
def test_a_name_is_looked_at_before_anybody_logs_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("phi3v.export.push.HfApi", None)
    assert refusal(tmp_path, name).startswith(f"--push must be OWNER/NAME, got {name!r}; the hub ")


def test_what_keeps_from_the_hub_is_told_in_one_line(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert refusal(tmp_path).endswith("the login's rights and the network, then push again")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "needs the hub, and HF_HUB_OFFLINE is set; unset it" in refusal(tmp_path)
