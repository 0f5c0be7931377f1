"""push_to_hub with the real client, against a hub of a few lines on this machine.

The fake has what one commit asks for: making a repository, saying how files are to be sent (all of
them in the commit itself), and the commit. What the real one checks besides is not tried here.
"""

import base64
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import mtprune

pytest.importorskip("huggingface_hub")


class FakeHub(BaseHTTPRequestHandler):
    def do_POST(self):
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        hub = self.server
        hub.asked.append((self.path, self.headers.get("authorization")))
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            hub.made.append(wanted)
            name = f"{wanted['organization']}/{wanted['name']}"
            self._say({"url": f"{hub.address}/{name}", "id": name, "name": name})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            told = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for f in files
            ]
            self._say({"files": told})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                part = json.loads(line)
                if part["key"] == "file":
                    value = part["value"]
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                else:
                    hub.said.append(part["value"]["summary"])
            where = f"{hub.address}{self.path.replace('/api/models', '')}/1234"
            self._say({"success": True, "commitOid": "1234", "commitUrl": where})
        elif self.path == "/api/validate-yaml":
            self._say({"errors": [], "warnings": []})
        else:
            self.send_error(404)

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("authorization")))
        self._say({"id": "me/net", "sha": "1234", "siblings": []})

    def _say(self, value):
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.asked, server.made, server.files, server.said = [], [], {}, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_folder_goes_up_in_one_commit(hub, tmp_path):
    saved = {
        "plan.json": b"{}",
        "model.safetensors": b"\x00\x01",
        "README.md": b"---\ntags: []\n---\n",
        "heads/a[1].safetensors": b"\x02",
        "vocab.txt": b"a\n",
    }
    others = {"optimizer.pt": b"no", ".plan.json.x.part": b"no", "runs/model.safetensors": b"no"}
    for name, content in {**saved, **others}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    url = mtprune.push_to_hub(
        tmp_path, "me/net", private=True, token="hf_mine", endpoint=hub.address
    )
    assert hub.files == saved
    assert url == f"{hub.address}/me/net/commit/main/1234"
    assert [(made["name"], made["organization"]) for made in hub.made] == [("net", "me")]
    assert hub.made[0].get("visibility") == "private" or hub.made[0]["private"] is True
    assert hub.said == ["Upload a model that was pruned with mtprune"]
    assert {told for _, told in hub.asked} == {"Bearer hf_mine"}


def test_what_is_no_saved_model_stays_here(hub, tmp_path):
    (tmp_path / "notes.txt").write_text("private")
    with pytest.raises(FileNotFoundError, match=r"holds neither of .*Give a folder that mtprune\."):
        mtprune.push_to_hub(tmp_path, "me/net", endpoint=hub.address)
    assert not hub.asked


def test_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "plan.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'mtprune\[hub\]'"):
        mtprune.push_to_hub(tmp_path, "me/net")
