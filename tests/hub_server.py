"""A small hub on this machine: the endpoints that huggingface-hub uses to look at a model and fetch
its files (also of a data set), over HTTP."""
import contextlib
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


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


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        headers.setdefault("Content_Length", len(body))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code="", message=""):
        self.answer(status, X_Error_Code=code, X_Error_Message=message)

    def do(self):
        path = unquote(urlsplit(self.path).path).removeprefix("/datasets")
        self.server.log.append((self.command, path))
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        if api:
            parts = parts[2:]
        model = self.server.models.get("/".join(parts[:2]))
        if model is None:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        _, revision, *file = parts[2:] or ["revision", "main"]
        sha = self.found(model, revision)
        if sha is None and model.commits:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if api:
            self.about(model, sha)
        else:
            self.resolve(model, sha, "/".join(file))

    do_GET = do
    do_HEAD = do

    @staticmethod
    def found(model, revision):
        if revision == "main" and model.commits:
            return model.newest
        return revision if revision in model.commits else None

    def about(self, model, sha):
        files = [{"rfilename": file} for file in model.commits.get(sha, {})]
        about = {"id": "", "sha": sha, "private": model.private, "siblings": files}
        self.answer(200, json.dumps(about).encode())

    def resolve(self, model, sha, file):
        if file not in model.commits[sha]:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        content = model.commits[sha][file]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        if self.command == "GET" and self.server.damaged.get(file, 0):  # of the right length
            self.server.damaged[file] -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.answer(200, content, ETag=etag, X_Linked_Etag=etag, X_Linked_Size=len(content),
                    X_Repo_Commit=sha)


@contextlib.contextmanager
def running():
    """A hub without models. Its log has (method, path) of each request."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.models = {}
    server.log = []
    server.damaged = {}  # {file: how many answers still go wrong}
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
