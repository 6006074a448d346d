"""A hub on loopback with the routes that huggingface_hub's upload calls, for tests."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace


@contextmanager
def fake_hub(*, cards=None, existing=(), refuse=None, fail_commits=0):
    """Serve a hub, and yield what it has got.

    Args:
        cards: Hub id of a model → metadata of its card.
        existing: Public repositories.
        refuse: Status of every answer about uploads.
        fail_commits: Number of commits that are refused with HTTP 500.
    """
    hub = SimpleNamespace(
        files={}, objects={}, repos=dict.fromkeys(existing, False), tokens=set(), puts=0, left=fail_commits
    )
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def body(self):
            if self.headers.get("transfer-encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("content-length", 0)))
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content

        def reply(self, content, status=200):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def handle_one(self):
            content, path = self.body(), self.path.partition("?")[0]
            with lock:
                hub.tokens.add(self.headers.get("authorization"))
                return self.answer(content, path)

        do_GET = do_POST = do_PUT = lambda self: self.handle_one()

        def answer(self, content, path):
            if self.command == "GET":
                return self.model(path.removeprefix("/api/models/"))
            if self.command == "PUT":
                hub.puts += 1
                hub.objects[hashlib.sha256(content).hexdigest()] = content
                return self.reply({})
            if refuse is not None:
                return self.reply({"error": "not for you"}, refuse)
            if path == "/api/repos/create":
                asked = json.loads(content)
                name = f"{asked['organization']}/{asked['name']}"
                status = 409 if name in hub.repos else 200
                hub.repos.setdefault(name, asked.get("visibility") == "private")
                return self.reply({"url": f"{hub.url}/{name}"}, status)
            if path == "/api/validate-yaml":
                return self.reply({"warnings": [], "errors": []})
            if "/preupload/" in path:
                asked = json.loads(content)["files"]
                return self.reply({"files": [self.mode(file["path"]) for file in asked]})
            if path.endswith("/info/lfs/objects/batch"):
                return self.reply({"objects": [self.action(entry) for entry in json.loads(content)["objects"]]})
            if "/commit/" in path:
                return self.commit(content, path.removeprefix("/api/models/").partition("/commit/")[0])
            return self.reply({"error": "no such route"}, 404)

        def model(self, name):
            if name in hub.repos:
                return self.reply({"id": name, "private": hub.repos[name]})
            if name in (cards or {}):
                return self.reply({"id": name, "private": False, "cardData": cards[name]})
            return self.reply({"error": "Repository not found"}, 404)

        def mode(self, path):
            mode = "lfs" if re.search(r"\.(safetensors|gguf)$", path) else "regular"
            return {"path": path, "uploadMode": mode, "shouldIgnore": False}

        def action(self, entry):
            upload = {"upload": {"href": f"{hub.url}/lfs/{entry['oid']}"}}
            return {**entry, **({} if entry["oid"] in hub.objects else {"actions": upload})}

        def commit(self, content, name):
            if hub.left:
                hub.left -= 1
                return self.reply({"error": "later"}, 500)
            for line in content.decode().splitlines():
                operation = json.loads(line)
                value = operation["value"]
                if operation["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
            return self.reply({"commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1" * 40, "success": True})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
