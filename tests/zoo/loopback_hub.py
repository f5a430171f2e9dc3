"""A Hub on 127.0.0.1, as far as huggingface_hub 1.x and 2.x speak to it, and with faults on demand.

    with LoopbackHub() as hub:
        hub.fail("POST", "/commit/", status=429, headers={"Retry-After": "7"})      the next such request is answered so
        hub.cut("PUT", "/objects/", after=1000)          the line breaks after so many bytes of the body
        hub.lose_answer("POST", "/commit/")              done, but the answer never arrives
        hub.hold("PUT", "/objects/")                     not answered until `hub.released` is set
        hub.log                                          (method, path) of every request

Repositories, commits and large objects are dictionaries: `hub.repos["alice/x"].head.files` is {path: bytes}. `alice` and `carol` may
write to their own account with tokens hf_alice and hf_carol, hf_reader is bob's and may only read.
"""

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal

TOKENS = {"hf_alice": ("alice", "write"), "hf_carol": ("carol", "write"), "hf_reader": ("bob", "read")}
LARGE = (".safetensors", ".png")


@dataclass(frozen=True)
class Commit:
    sha: str
    message: str
    files: Mapping[str, bytes]


@dataclass
class Repo:
    private: bool
    commits: list[Commit] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        sha = self.tags.get(revision, self.head.sha if revision == "main" else revision)
        return next((commit for commit in self.commits if commit.sha == sha), None)

    def add(self, message: str, files: Mapping[str, bytes]) -> Commit:
        sha = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits.append(Commit(sha, message, dict(files)))
        return self.head


@dataclass
class Fault:
    method: str
    pattern: str
    kind: Literal["fail", "cut", "lose", "hold"]
    times: int
    skip: int = 0
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    after: int = 0


class BrokenLineError(Exception):
    """The line is to be cut."""


class LoopbackHub:
    """The server; usable as a context."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.held = threading.Event()
        self.released = threading.Event()
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def fail(
        self, method: str, pattern: str, *, status: int, times: int = 1, headers: Mapping[str, str] | None = None
    ) -> None:
        self.faults.append(Fault(method, pattern, "fail", times, status=status, headers=headers or {}))

    def cut(self, method: str, pattern: str, *, after: int = 0, times: int = 1, skip: int = 0) -> None:
        """PUT: so many bytes of the body are read; GET: so many are sent."""
        self.faults.append(Fault(method, pattern, "cut", times, after=after, skip=skip))

    def lose_answer(self, method: str, pattern: str) -> None:
        self.faults.append(Fault(method, pattern, "lose", 1))

    def hold(self, method: str, pattern: str) -> None:
        self.faults.append(Fault(method, pattern, "hold", 1))

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and re.search(fault.pattern, path) and fault.times > 0:
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def count(self, method: str, pattern: str) -> int:
        """Requests so far."""
        return sum(m == method and re.search(pattern, path) is not None for m, path in self.log)


class Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    """Headers and body are two packets: without this each answer waits 40 ms for the first one's acknowledgement."""

    def log_message(self, *_: Any) -> None:
        """Silence."""

    def do_GET(self) -> None:
        self.serve()

    def do_HEAD(self) -> None:
        self.serve()

    def do_POST(self) -> None:
        self.serve()

    def do_PUT(self) -> None:
        self.serve()

    def serve(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        self.query = dict(urllib.parse.parse_qsl(url.query))
        with self.hub.lock:
            self.hub.log.append((self.command, path))
        fault = self.fault = self.hub.fault_for(self.command, path)
        try:
            body = self.read_body(fault)
            if fault is not None and fault.kind == "hold":
                self.hub.held.set()
                self.hub.released.wait(60)
            if fault is not None and fault.kind == "fail":
                self.answer(fault.status, {"error": f"made to answer {fault.status}"}, fault.headers)
                return
            with self.hub.lock:
                self.route(path, body)
        except (BrokenLineError, BrokenPipeError, ConnectionResetError):
            self.close_connection = True
            self.connection.close()

    def read_body(self, fault: Fault | None) -> bytes:
        size = int(self.headers.get("Content-Length", 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while length := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(length))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        if fault is not None and fault.kind == "cut" and self.command == "PUT":
            self.rfile.read(min(fault.after, size))
            raise BrokenLineError
        return self.rfile.read(size)

    def answer(self, status: int, value: Any = None, headers: Mapping[str, str] | None = None) -> None:
        if self.fault is not None and self.fault.kind == "lose":
            raise BrokenLineError
        content = b"" if value is None else value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault.kind == "cut":
            self.wfile.write(content[: self.fault.after])
            self.wfile.flush()
            raise BrokenLineError
        self.wfile.write(content)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    @property
    def user(self) -> tuple[str, str] | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def route(self, path: str, body: bytes) -> None:
        bad_token = self.headers.get("Authorization") and self.user is None
        if bad_token or (path == "/api/whoami-v2" and self.user is None):
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            assert self.user is not None
            return self.answer(
                200, {"type": "user", "name": self.user[0], "auth": {"accessToken": {"role": self.user[1]}}}
            )
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/models":
            return self.list_models()
        if found := re.fullmatch(r"/objects/(\w+)", path):
            return self.put_object(found[1], body)
        for pattern, act in (
            (r"/api/models/([^/]+/[^/]+)", self.info),
            (r"/api/models/([^/]+/[^/]+)/revision/(.+)", self.info),
            (r"/api/models/([^/]+/[^/]+)/refs", self.refs),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self.tree),
            (r"/api/models/([^/]+/[^/]+)/tag/(.+)", self.tag),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self.preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self.commit),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            (r"/([^/]+/[^/]+)\.git/info/lfs/verify", self.verify),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        ):
            if found := re.fullmatch(pattern, path):
                repo = self.visible(found[1])
                if repo is not None:
                    act(found[1], repo, body, *found.groups()[1:])
                return None
        return self.refuse(404, "", f"no route {self.command} {path}")

    def visible(self, name: str) -> Repo | None:
        """The repository, or None after the Hub's answer to who may not see it."""
        repo, owner = self.hub.repos.get(name), name.partition("/")[0]
        mine = self.user is not None and self.user[0] == owner
        if repo is None or (repo.private and not mine):
            self.refuse(404 if self.user else 401, "RepoNotFound", "Repository not found")
            return None
        if repo.gated and not mine:
            self.refuse(403, "GatedRepo", "Access to this model is restricted")
            return None
        if self.command in ("POST", "PUT") and not (mine and self.user == (owner, "write")):
            self.refuse(403, "", "You don't have the rights to write here")
            return None
        return repo

    def create(self, asked: dict[str, Any]) -> None:
        assert self.user is not None
        owner = asked.get("organization") or self.user[0]
        name = f"{owner}/{asked['name']}"
        if self.user != (owner, "write"):
            return self.refuse(403, "", f"You don't have the rights to create a model under the namespace {owner!r}")
        if name in self.hub.repos:
            return self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        repo = self.hub.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.add("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def list_models(self) -> None:
        found = []
        for name, repo in self.hub.repos.items():
            owner = name.partition("/")[0]
            tags = re.findall(rb"^- (\S+)$", repo.head.files.get("README.md", b""), flags=re.M)
            hidden = repo.private and (self.user is None or self.user[0] != owner)
            if (
                owner == self.query.get("author", owner)
                and self.query.get("filter", "").encode() in tags
                and not hidden
            ):
                found.append({"id": name, "private": repo.private, "tags": [tag.decode() for tag in tags]})
        self.answer(200, found)

    def info(self, name: str, repo: Repo, body: bytes, revision: str = "main") -> None:
        commit = repo.at(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = [{"rfilename": path, "size": len(content)} for path, content in commit.files.items()]
        return self.answer(
            200, {"id": name, "sha": commit.sha, "private": repo.private, "siblings": siblings, "tags": []}
        )

    def refs(self, name: str, repo: Repo, body: bytes) -> None:
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": sha} for tag, sha in repo.tags.items()]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.head.sha}
        self.answer(200, {"branches": [main], "converts": [], "tags": tags})

    def tree(self, name: str, repo: Repo, body: bytes, revision: str) -> None:
        commit = repo.at(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        rows = [
            {"type": "file", "path": path, "size": len(content), "oid": oid(path, content)}
            for path, content in sorted(commit.files.items())
        ]
        return self.answer(200, rows)

    def tag(self, name: str, repo: Repo, body: bytes, revision: str) -> None:
        commit, tag = repo.at(revision), json.loads(body)["tag"]
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if tag in repo.tags:
            return self.refuse(409, "", f"Tag reference exists already: {tag}")
        repo.tags[tag] = commit.sha
        return self.answer(200, {})

    def preupload(self, name: str, repo: Repo, body: bytes, revision: str) -> None:
        files = []
        for file in json.loads(body)["files"]:
            content = repo.head.files.get(file["path"])
            large = file["path"].endswith(LARGE)
            known = {"oid": oid(file["path"], content)} if content is not None else {}
            files.append(
                {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **known}
            )
        self.answer(200, {"files": files})

    def batch(self, name: str, repo: Repo, body: bytes) -> None:
        rows = []
        for item in json.loads(body)["objects"]:
            row = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                row["actions"] = {
                    "upload": {"href": f"{self.hub.url}/objects/{item['oid']}", "header": {}},
                    "verify": {"href": f"{self.hub.url}/{name}.git/info/lfs/verify", "header": {}},
                }
            rows.append(row)
        self.answer(200, {"transfer": "basic", "objects": rows})

    def put_object(self, sha256: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != sha256:
            return self.refuse(400, "", "the bytes are not what their name says")
        self.hub.objects[sha256] = body
        return self.answer(200)

    def verify(self, name: str, repo: Repo, body: bytes) -> None:
        asked = json.loads(body)
        known = self.hub.objects.get(asked["oid"])
        self.answer(200 if known is not None and len(known) == asked["size"] else 404, {})

    def commit(self, name: str, repo: Repo, body: bytes, revision: str) -> None:
        rows = [json.loads(line) for line in body.splitlines()]
        files, header = dict(repo.head.files), rows[0]["value"]
        if header.get("parentCommit") not in (None, repo.head.sha):
            return self.refuse(412, "", "A commit has happened since. Please refresh and try again.")
        for row in rows[1:]:
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.refuse(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                assert row["key"] == "deletedFile", row
                del files[value["path"]]
        commit = repo.add(header["summary"], files)
        return self.answer(
            200, {"success": True, "commitOid": commit.sha, "commitUrl": f"{self.hub.url}/{name}/commit/{commit.sha}"}
        )

    def resolve(self, name: str, repo: Repo, body: bytes, revision: str, file: str) -> None:
        commit = repo.at(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if file not in commit.files:
            return self.refuse(404, "EntryNotFound", f"{file} does not exist at {revision}")
        content = commit.files[file]
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{oid(file, content)}"', "Accept-Ranges": "bytes"}
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(found[1])
            return self.answer(
                206, content[start:], {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            )
        return self.answer(200, content, {**headers, "Content-Length": str(len(content))})


def oid(path: str, content: bytes) -> str:
    """What the Hub calls the content of a file: sha256 of a large one, git's sha1 of another."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
