"""A stand-in for the Hugging Face hub on the loopback interface.

It answers what `huggingface_hub`, `transformers` and `datasets` ask when they load a repository:
what a revision is, which files it has, and the files themselves (HEAD, GET, byte ranges, large
files by way of a redirect, as the hub does with those it keeps in its large-file storage).
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".parquet", "tokenizer.json")
DATE = "2024-01-01T00:00:00.000Z"


@dataclass
class Repo:
    """revisions: name ('main', 'refs/convert/parquet') -> path -> content."""

    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False

    def sha(self, revision: str) -> str:
        digest = hashlib.sha1(revision.encode())
        for path, content in sorted(self.revisions[revision].items()):
            digest.update(path.encode() + content)
        return digest.hexdigest()

    def find(self, revision: str) -> str | None:
        """The revision's name, from its name or its commit."""
        for name in self.revisions:
            if revision in (name, self.sha(name)):
                return name
        return None


class Hub:
    """`with Hub(port) as hub:` serves the repositories given to `add`.

    hub.asked lists all requests.
    """

    def __init__(self, port: int):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.asked: list[str] = []
        self.missing = 401  # the status for a repository that is not there
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.storage = f"http://localhost:{port}"  # large files come from another host

    def add(
        self,
        kind: str,
        name: str,
        files: dict[str, bytes],
        revision: str = "main",
        gated: bool = False,
    ) -> None:
        """kind: models or datasets; files: path -> content."""
        repo = self.repos.setdefault((kind, name), Repo())
        repo.revisions[revision] = files
        repo.gated = gated

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening: from now on a connection is refused."""
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def _route(self, body: bytes = b"") -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(
            r"/storage/(models|datasets)/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path
        ):
            kind, name, commit, file = match.groups()
            repo = self.hub.repos[kind, name]
            self._file(repo.revisions[repo.find(commit)][file])
        elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(/.*)?", path):
            self._api(*match.groups(), body)
        elif match := re.fullmatch(
            r"/(datasets/)?([^/]+/[^/]+)/resolve/(refs/[^/]+/[^/]+|[^/]+)/(.+)", path
        ):
            self._resolve(*match.groups())
        else:
            self._error(404, "", "Not Found")

    def _repo(self, kind: str, name: str, content: bool) -> Repo | None:
        """The repository, unless it is missing or, for its content, gated."""
        repo = self.hub.repos.get((kind, name))
        if repo is None:
            # Without a token the hub does not tell the missing from the private.
            self._error(self.hub.missing, "RepoNotFound", "Repository not found")
        elif repo.gated and content:
            page = f"https://huggingface.co/{'datasets/' if kind == 'datasets' else ''}{name}"
            self._error(
                403,
                "GatedRepo",
                f"Access to {name} is restricted and you are not in the "
                f"authorized list. Visit {page} to ask for access.",
            )
        else:
            return repo
        return None

    def _api(self, kind: str, name: str, rest: str | None, body: bytes) -> None:
        rest = rest or ""
        match = re.fullmatch(
            r"/(revision|tree|paths-info)/(refs/[^/]+/[^/]+|[^/]+)(?:/(.*))?", rest
        )
        if rest and not match:
            self._error(404, "", "Not Found")
            return
        what, revision, folder = match.groups() if match else ("revision", "main", None)
        repo = self._repo(kind, name, content=what != "revision")
        if repo is None:
            return
        found = repo.find(revision)
        if found is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        files = repo.revisions[found]
        if what == "revision":
            self._json(
                {
                    "_id": "0" * 24,
                    "id": name,
                    "modelId": name,
                    "author": name.split("/")[0],
                    "sha": repo.sha(found),
                    "lastModified": DATE,
                    "createdAt": DATE,
                    "private": False,
                    "gated": "manual" if repo.gated else False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "siblings": [{"rfilename": path} for path in sorted(files)],
                }
            )
        elif what == "tree":
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0]
            listing = _tree(files, folder or "", recursive.lower() in ("true", "1"))
            if listing is None:
                self._error(404, "EntryNotFound", f"{folder} does not exist on {revision}")
            else:
                self._json(listing)
        else:
            wanted = (
                json.loads(body)["paths"]
                if body.startswith(b"{")
                else parse_qs(body.decode())["paths"]
            )
            known = {entry["path"]: entry for entry in _tree(files, "", True)}
            self._json([known[path] for path in wanted if path in known])

    def _resolve(self, datasets: str | None, name: str, revision: str, file: str) -> None:
        kind = "datasets" if datasets else "models"
        repo = self._repo(kind, name, content=True)
        if repo is None:
            return
        found = repo.find(revision)
        if found is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        commit = repo.sha(found)
        content = repo.revisions[found].get(file)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            self._error(404, "EntryNotFound", "Entry not found", headers)
        elif file.endswith(LARGE):
            self._send(
                302,
                b"",
                headers
                | {
                    "X-Linked-Size": str(len(content)),
                    "X-Linked-Etag": f'"{_sha256(content)}"',
                    "Location": f"{self.hub.storage}/storage/{kind}/{name}/{commit}/{file}",
                },
            )
        else:
            self._file(content, headers | {"ETag": f'"{_blob(content)}"'})

    def _file(self, content: bytes, headers: dict | None = None) -> None:
        headers = {"ETag": f'"{_sha256(content)}"', "Accept-Ranges": "bytes"} | (headers or {})
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            self._send(200, content, headers)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(206, content[first : last + 1], headers)

    def _json(self, answer) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str, headers: dict | None = None) -> None:
        more = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
        self._send(
            status,
            json.dumps({"error": message}).encode(),
            {"Content-Type": "application/json"} | more | (headers or {}),
        )

    def _send(self, status: int, content: bytes, headers: dict) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict] | None:
    """The entries of a folder ('' for the top), or None if it does not exist."""
    start = f"{folder}/" if folder else ""
    entries: dict[str, dict] = {}
    for path, content in sorted(files.items()):
        if not path.startswith(start):
            continue
        parts = path[len(start) :].split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            directory = start + "/".join(parts[:depth])
            entries[directory] = {
                "type": "directory",
                "oid": _blob(directory.encode()),
                "size": 0,
                "path": directory,
            }
        if recursive or len(parts) == 1:
            entries[path] = {
                "type": "file",
                "oid": _blob(content),
                "size": len(content),
                "path": path,
            }
            if path.endswith(LARGE):
                entries[path]["lfs"] = {
                    "oid": _sha256(content),
                    "size": len(content),
                    "pointerSize": 134,
                }
    return list(entries.values()) if entries else None
