"""A small Hugging Face Hub on 127.0.0.1, in memory, for the real `huggingface_hub` client to talk to.

It serves the endpoints behind pushing, loading, branches, tags and card validation, for models. Repositories have
commits, branches and tags; private ones answer as the Hub does to the wrong token; `fail` makes a stage of an upload
break. Everything that a request changes is put together first and stored in one step, as a git push does.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import sys
import threading
from base64 import b64decode
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


Stage = Literal["preupload", "lfs", "commit"]

TOKENS = {"hf_alice": "alice", "hf_bob": "bob"}
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gz", ".msgpack", ".onnx")
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
YAML_BLOCK = re.compile(r"^\s*---\r?\n([\S\s]*?)\r?\n---[ \t]*(\r?\n|$)")
LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "gpl-3.0", "llama2", "other"}
RELATIONS = {"adapter", "finetune", "merge", "quantized"}


@dataclass(frozen=True)
class File:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """What the client compares with: sha256 of an LFS file, the git blob's sha1 of a regular one."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    files: dict[str, File]
    parent: Commit | None = None


@dataclass
class Repo:
    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(sha)

    def commit(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        parent = self.commits.get(self.branches.get(branch, ""))
        content = [self.id, branch, title, parent and parent.sha, sorted((path, f.oid) for path, f in files.items())]
        commit = Commit(hashlib.sha1(json.dumps(content).encode()).hexdigest(), title, files, parent)
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit


def only_local() -> None:
    """Any traffic to another host than 127.0.0.1 is an error."""

    def check(event: str, args: tuple[Any, ...]) -> None:
        if event == "socket.connect":
            assert args[1][0] == "127.0.0.1", f"traffic to {args[1]}"
        elif event == "socket.getaddrinfo":
            assert args[0] in ("127.0.0.1", "localhost", None), f"look-up of {args[0]}"

    sys.addaudithook(check)


class HubError(Exception):
    """An answer other than success; `code` is what the client tells errors apart by."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


class HubServer:
    """The server: `with HubServer() as hub: ... hub.url`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self._failures: dict[str, list[int]] = {}
        # Large files lie on another origin, as on the Hub: there the client sends no token, and follows no redirect
        # when it only asks for a file's metadata.
        handler = type("Handler", (_Handler,), {"hub": self})
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self._threads = [threading.Thread(target=s.serve_forever, args=(0.05,), daemon=True) for s in self._servers]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()

    # what tests look at and set

    def fail(self, stage: Stage, times: int = 1_000_000, status: int = 507) -> None:
        """Answers the next `times` requests of that stage with `status` (the client retries on 500, not on 507).

        `"lfs"` fails in the middle of an upload, when the weights have been sent and are about to be stored.
        """
        self._failures[stage] = [status] * times

    def heal(self) -> None:
        self._failures.clear()

    def take_failure(self, stage: Stage) -> int | None:
        with self.lock:
            left = self._failures.get(stage)
            return left.pop() if left else None

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        commit = self.repos[repo_id].find(revision)
        assert commit is not None, f"{repo_id} has no revision {revision}"
        return commit.files[path].data

    def state(self, repo_id: str) -> dict[str, Any]:
        """Everything that a client can see of a repository, to be compared before and after."""
        repo = self.repos[repo_id]
        trees = {sha: {path: f.oid for path, f in commit.files.items()} for sha, commit in repo.commits.items()}
        return {"private": repo.private, "branches": dict(repo.branches), "tags": dict(repo.tags), "commits": trees}


def card_errors(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of the metadata in a README.md: the rules of the Hub that concern models."""
    block = YAML_BLOCK.search(content)
    if block is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(block.group(1)) or {}
    except yaml.YAMLError as error:
        return [f"invalid yaml: {error}"], []
    if not isinstance(data, dict):
        return ["metadata must be a mapping"], []
    errors = []
    for key in ("base_model", "datasets"):
        values = data.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str) or not REPO_ID.fullmatch(value):
                errors.append(f'"{key}" with value "{value}" is not valid. Use an id from https://hf.co.')
    if data.get("license", "mit") not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    if data.get("base_model_relation", "adapter") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {sorted(RELATIONS)}')
    for key in ("tags", "metrics"):
        if not all(isinstance(item, str) for item in data.get(key, [])):
            errors.append(f'"{key}" must be an array of strings')
    for key in ("library_name", "pipeline_tag"):
        if not isinstance(data.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    for entry in data.get("model-index", []):
        if not isinstance(entry.get("name"), str) or not isinstance(entry.get("results"), list):
            errors.append('"model-index" needs a name and results')
            continue
        for result in entry["results"]:
            needed = [result.get("task", {}).get("type")]
            needed += [result.get("dataset", {}).get(key) for key in ("type", "name")]
            needed += [metric.get("type") for metric in result.get("metrics", [{}])]
            if not all(isinstance(item, str) and item for item in needed):
                errors.append('"model-index[0].results" needs task.type, dataset.type, dataset.name and metric.type')
    return errors, []


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    ROUTES: ClassVar = [
        ("POST", r"/api/repos/create", "create_repo"),
        ("DELETE", r"/api/repos/delete", "delete_repo"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/models/(?P<id>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", r"/api/models/(?P<id>[^/]+/[^/]+)/refs", "refs"),
        ("GET", r"/api/models/(?P<id>[^/]+/[^/]+)/commits/(?P<revision>[^/]+)", "history"),
        ("GET", r"/api/models/(?P<id>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
        ("POST", r"/api/models/(?P<id>[^/]+/[^/]+)/branch/(?P<name>[^/]+)", "create_branch"),
        ("DELETE", r"/api/models/(?P<id>[^/]+/[^/]+)/branch/(?P<name>[^/]+)", "delete_branch"),
        ("POST", r"/api/models/(?P<id>[^/]+/[^/]+)/tag/(?P<revision>[^/]+)", "create_tag"),
        ("DELETE", r"/api/models/(?P<id>[^/]+/[^/]+)/tag/(?P<name>[^/]+)", "delete_tag"),
        ("POST", r"/api/models/(?P<id>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<id>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("POST", r"/storage/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
        ("GET|HEAD", r"/storage/(?P<oid>[0-9a-f]{64})", "lfs_get"),
        ("GET|HEAD", r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _handle(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append((self.command, url.path))
        self.unread = int(self.headers.get("Content-Length", 0))
        try:
            for methods, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in methods.split("|"):
                    groups = {key: value and unquote(value) for key, value in match.groupdict().items()}
                    getattr(self, name)(**groups)
                    break
            else:
                raise HubError(404, f"no such endpoint: {self.command} {url.path}")
        except HubError as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            self.answer({"error": error.message, **error.body}, error.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def body(self, size: int | None = None) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while length := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(length))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        data = self.rfile.read(self.unread if size is None else size)
        self.unread -= len(data)
        return data

    def json(self) -> Any:
        return json.loads(self.body() or b"{}")

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        if self.unread:  # a body that nobody read would be taken for the next request
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # who asks, and for what

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise HubError(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def repo(self, id: str, write: bool = False) -> Repo:
        user = self.user()
        repo = self.hub.repos.get(id)
        owns = user is not None and user == id.split("/")[0]
        if repo is None or (repo.private and not owns):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and not owns:
            raise HubError(403 if user else 401, "You don't have the rights to write to this repository")
        return repo

    def at(self, repo: Repo, revision: str | None) -> Commit:
        commit = repo.find(revision or "main")
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # repositories

    def _named(self) -> tuple[str, dict[str, Any]]:
        body, user = self.json(), self.user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if (body.get("organization") or user) != user:
            raise HubError(403, f"You don't have the rights to create a model under {body['organization']}")
        return f"{user}/{body['name']}", body

    def create_repo(self) -> None:
        id, body = self._named()
        url = f"{self.hub.url}/{id}"
        with self.hub.lock:
            if id in self.hub.repos:
                raise HubError(409, "You already created this model repo", url=url)
            repo = Repo(id, private=bool(body.get("private") or body.get("visibility") == "private"))
            repo.commit("main", "initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", lfs=False)})
            self.hub.repos[id] = repo
        self.answer({"url": url, "name": id})

    def delete_repo(self) -> None:
        id, _ = self._named()
        self.repo(id, write=True)
        del self.hub.repos[id]
        self.answer({})

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"accessToken": {"displayName": "test", "role": "write"}}
        self.answer({"type": "user", "name": user, "fullname": user, "orgs": [], "auth": token})

    def validate_yaml(self) -> None:
        errors, warnings = card_errors(self.json()["content"])
        content = {key: [{"message": m} for m in ms] for key, ms in (("errors", errors), ("warnings", warnings))}
        self.answer(content, 400 if errors else 200)

    def info(self, id: str, revision: str | None) -> None:
        repo = self.repo(id)
        commit = self.at(repo, revision)
        readme = commit.files.get("README.md")
        block = YAML_BLOCK.search(readme.data.decode()) if readme else None
        card = (yaml.safe_load(block.group(1)) if block else None) or {}
        tags = list(card.get("tags") or []) + ([f"license:{card['license']}"] if "license" in card else [])
        siblings = [{"rfilename": path, "size": len(f.data), "blobId": f.oid} for path, f in commit.files.items()]
        info = {"id": id, "sha": commit.sha, "private": repo.private, "tags": tags, "siblings": siblings}
        self.answer({**info, "cardData": card, "author": id.split("/")[0]})

    def refs(self, id: str) -> None:
        repo = self.repo(id)
        branches, tags = (
            [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in refs.items()]
            for kind, refs in (("heads", repo.branches), ("tags", repo.tags))
        )
        self.answer({"branches": branches, "tags": tags, "converts": []})

    def history(self, id: str, revision: str) -> None:
        commit: Commit | None = self.at(self.repo(id), revision)
        items, date = [], datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        while commit is not None:
            items.append({"id": commit.sha, "authors": [], "date": date, "title": commit.title, "message": ""})
            commit = commit.parent
        self.answer(items)

    def tree(self, id: str, revision: str, path: str | None) -> None:
        """Files only, all of them or those below `path`: the client drops folders from a recursive listing."""
        files = self.at(self.repo(id), revision).files
        entries = []
        for name, file in files.items():
            if path is None or name.startswith(path + "/"):
                entry = {"type": "file", "path": name, "size": len(file.data), "oid": file.oid}
                lfs = {"lfs": {"oid": file.oid, "size": len(file.data), "pointerSize": 134}} if file.lfs else {}
                entries.append(entry | lfs)
        self.answer(entries)

    # branches and tags

    def _create_ref(self, repo: Repo, kind: Literal["branches", "tags"], name: str, start: str | None) -> None:
        with self.hub.lock:
            refs = getattr(repo, kind)
            if name in refs:
                raise HubError(409, f"Reference {name} exists already")
            refs[name] = self.at(repo, start).sha
        self.answer({})

    def create_branch(self, id: str, name: str) -> None:
        repo = self.repo(id, write=True)
        self._create_ref(repo, "branches", name, self.json().get("startingPoint"))

    def create_tag(self, id: str, revision: str) -> None:
        repo = self.repo(id, write=True)
        self._create_ref(repo, "tags", self.json()["tag"], revision)

    def delete_branch(self, id: str, name: str) -> None:
        if self.repo(id, write=True).branches.pop(name, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        self.answer({})

    def delete_tag(self, id: str, name: str) -> None:
        if self.repo(id, write=True).tags.pop(name, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        self.answer({})

    # uploads

    def _maybe_fail(self, stage: Stage) -> None:
        if status := self.hub.take_failure(stage):
            raise HubError(status, f"the test asked for a failure in {stage}")

    def preupload(self, id: str, revision: str) -> None:
        repo, body = self.repo(id, write=True), self.json()
        self._maybe_fail("preupload")
        present = self.at(repo, revision).files
        files = []
        for item in body["files"]:
            path = item["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = present[path].oid if path in present else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": files})

    def lfs_batch(self, id: str) -> None:
        self.repo(id, write=True)
        objects = []
        for item in self.json()["objects"]:
            path = f"/storage/{item['oid']}"
            verify = {"href": f"{self.hub.url}{path}/verify"}
            actions = {"upload": {"href": self.hub.storage_url + path}, "verify": verify}
            objects.append(item if item["oid"] in self.hub.lfs else item | {"actions": actions})
        self.answer({"transfer": "basic", "objects": objects})

    def _check_no_token(self) -> None:
        if "Authorization" in self.headers:
            raise HubError(400, "a token was sent to the storage, which is not the Hub")

    def lfs_put(self, oid: str) -> None:
        self._check_no_token()
        data = self.body()
        self._maybe_fail("lfs")
        if hashlib.sha256(data).hexdigest() != oid:
            raise HubError(400, "the content does not have the promised sha256")
        self.hub.lfs[oid] = data
        self.answer(b"")

    def lfs_verify(self, oid: str) -> None:
        if self.json() != {"oid": oid, "size": len(self.hub.lfs.get(oid, b""))}:
            raise HubError(404, "no such object, or of another size")
        self.answer({})

    def commit(self, id: str, revision: str) -> None:
        repo = self.repo(id, write=True)
        lines = [json.loads(line) for line in self.body().splitlines()]
        self._maybe_fail("commit")
        if "create_pr" in self.query:
            raise HubError(400, "pull requests are not part of this server")
        if revision not in repo.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        with self.hub.lock:
            head = self.at(repo, revision)
            files, title = dict(head.files), ""
            for line in lines:
                key, value = line["key"], line["value"]
                path = value.get("path", "")
                if key == "header":
                    title = value["summary"]
                    if value.get("parentCommit", head.sha) != head.sha:
                        raise HubError(412, "A commit has happened since. Please refresh and try again.")
                elif key == "file":
                    files[path] = File(b64decode(value["content"]), lfs=False)
                elif key == "lfsFile":
                    if value["oid"] not in self.hub.lfs:
                        raise HubError(400, f"{path}: the LFS object was never uploaded")
                    files[path] = File(self.hub.lfs[value["oid"]], lfs=True)
                elif key == "deletedFile":
                    if files.pop(path, None) is None:
                        raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                elif key == "deletedFolder":
                    files = {name: f for name, f in files.items() if not name.startswith(path.rstrip("/") + "/")}
            if "README.md" in files and (errors := card_errors(files["README.md"].data.decode())[0]):
                raise HubError(400, "; ".join(errors))
            commit = repo.commit(revision, title, files)
        self.answer({"commitOid": commit.sha, "commitUrl": f"{self.hub.url}/{id}/commit/{commit.sha}"})

    # downloads

    def resolve(self, id: str, revision: str, path: str) -> None:
        commit = self.at(self.repo(id), revision)
        file = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.sha}
        if file is None:
            code = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self.answer({"error": "Entry not found"}, 404, headers | code)
        elif file.lfs:
            linked = {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data))}
            location = {"Location": f"{self.hub.storage_url}/storage/{file.oid}"}
            self.answer(b"", http.client.FOUND, headers | linked | location)
        else:
            self.answer(file.data, 200, headers | {"ETag": f'"{file.oid}"'})

    def lfs_get(self, oid: str) -> None:
        self._check_no_token()
        if oid not in self.hub.lfs:
            raise HubError(404, "no such object")
        self.answer(self.hub.lfs[oid], 200, {"ETag": f'"{oid}"'})
