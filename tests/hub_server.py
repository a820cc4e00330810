"""A small hub on this machine: the endpoints that huggingface-hub uses to make a model, commit
files to it and fetch them (also of a data set), over HTTP."""
import base64
import contextlib
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_alice"  # of the only user


@dataclass
class Model:
    """A repository: the files {name: bytes} of each commit, oldest first."""
    private: bool = False
    commits: dict = field(default_factory=dict)

    @property
    def newest(self):
        return list(self.commits)[-1]

    def commit(self, files):
        """Returns the name of the commit."""
        said = repr((len(self.commits), sorted(files.items())))
        sha = hashlib.sha1(said.encode()).hexdigest()
        self.commits[sha] = dict(files)
        return sha


def model_of(files):
    """A public model of one commit."""
    model = Model()
    model.commit(files)
    return model


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        headers.setdefault("Content_Length", len(body))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code="", message=""):
        self.answer(status, X_Error_Code=code, X_Error_Message=message)

    def do(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path).removeprefix("/datasets")
        self.asked = self.headers.get("Range")
        self.server.log.append((self.command, path, self.asked))
        if self.server.busy:
            return self.refuse(503, message="too many visitors")
        parts = path.strip("/").split("/")
        if parts == ["api", "validate-yaml"]:
            return self.answer(200, {"errors": [], "warnings": []})
        if parts[0] == "lfs":
            self.server.large[parts[1]] = self.body
            return self.answer(200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and self.command == "POST":
            return self.refuse(401, message="no right to write")
        if parts == ["api", "repos", "create"]:
            return self.create()
        if parts[-1] == "batch":
            return self.batch()
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        model = self.server.models.get(name)
        if model is None:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        rest = parts[4:] if api else parts[2:]
        if not rest:
            rest = ["revision", "main"]
        action, revision, *file = rest
        sha = self.found(model, revision)
        if sha is None and model.commits:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        actions = {"revision": self.about, "preupload": self.preupload, "commit": self.commit,
                   "resolve": self.resolve}
        actions[action](name, model, sha, "/".join(file))

    do_GET = do
    do_HEAD = do
    do_POST = do
    do_PUT = do

    @staticmethod
    def found(model, revision):
        if revision == "main" and model.commits:
            return model.newest
        return revision if revision in model.commits else None

    # What it says of models and their files

    def about(self, name, model, sha, _):
        files = [{"rfilename": file} for file in model.commits.get(sha, {})]
        self.answer(200, {"id": name, "sha": sha, "private": model.private, "siblings": files})

    def resolve(self, name, model, sha, file):
        if file not in model.commits[sha]:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        faults = self.server.faults.get(file)
        fault = faults.pop(0) if self.command == "GET" and faults else None
        if fault == "busy":
            return self.refuse(503)
        content = model.commits[sha][file]
        size = len(content)
        begin = int(self.asked[6:-1]) if self.asked else 0
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        if fault == "flip":  # right length, wrong content
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "cut":
            content = content[:size // 2]
            self.close_connection = True
        self.answer(206 if self.asked else 200, content[begin:], ETag=etag, X_Linked_Etag=etag,
                    X_Linked_Size=size, X_Repo_Commit=sha, Content_Length=size - begin,
                    Content_Range=f"bytes {begin}-{size - 1}/{size}")

    # What it takes

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        status = 409 if name in self.server.models else 200
        if status == 200:
            private = asked.get("private") or asked.get("visibility") == "private"
            self.server.models[name] = Model(private=bool(private))
        self.answer(status, {"url": f"{self.server.url}/{name}"})

    def preupload(self, name, model, sha, _):
        files = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        self.answer(200, {"files": files})

    def batch(self):
        objects = json.loads(self.body)["objects"]
        for found in objects:
            href = f"{self.server.url}/lfs/{found['oid']}"
            found["actions"] = {"upload": {"href": href}}
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, name, model, sha, _):
        files = dict(model.commits.get(sha, {}))
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = model.commit(files)
        self.answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha,
                          "hookOutput": ""})


@contextlib.contextmanager
def running():
    """A hub without models. Its log has (method, path, range) of each request."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.models = {}
    server.large = {}  # {sha256: bytes}: contents of large files
    server.log = []
    server.busy = False
    server.faults = {}  # {file: what goes wrong, answer by answer}: "busy", "flip", "cut"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
