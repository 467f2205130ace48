"""What of the Hub's interface writes: repositories, files, commits, collections, for the users of its tokens."""

import base64
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import yaml

if TYPE_CHECKING:
    from fake_hub import Hub

REPO = r"/api/(models|datasets)/([^/]+/[^/]+)"
ROUTES = {
    "whoami": re.compile(r"/api/whoami-v2$"),
    "create": re.compile(r"/api/repos/create$"),
    "validate": re.compile(r"/api/validate-yaml$"),
    "preupload": re.compile(REPO + r"/preupload/main$"),
    "batch": re.compile(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch$"),
    "put": re.compile(r"/put/([0-9a-f]{64})$"),
    "commit": re.compile(REPO + r"/commit/main$"),
    "collections": re.compile(r"/api/collections$"),
    "collection": re.compile(r"/api/collections/([^/]+/[^/]+)$"),
    "collect": re.compile(r"/api/collections/([^/]+/[^/]+)/items$"),
}
LISTED = 4  # items of a collection that a list of them shows


class Writes:
    """Of a request's handler."""

    hub: "Hub"
    command: str
    path: str
    headers: Any

    def json(self, value: object, status: int = 200) -> None: ...

    def error(self, status: int, code: str = "", headers: dict[str, str] | None = None, text: str = "") -> None: ...

    def write(self, path: str, body: bytes) -> bool:
        """False for what is none of these."""
        for name, pattern in ROUTES.items():
            if found := pattern.fullmatch(path):
                self.body, self.user = body, self.hub.users.get(self.headers.get("Authorization", "")[7:], "")
                if name == "put" or self.user:
                    getattr(self, f"on_{name}")(*found.groups())
                else:
                    self.error(401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
                return True
        return False

    def may_write(self, owner: str) -> bool:
        good = owner in (self.user, *self.hub.orgs) and self.hub.role == "write"
        if not good:
            self.error(403, text="You don't have the rights to do this")
        return good

    def on_whoami(self) -> None:
        orgs = [{"name": name} for name in self.hub.orgs]
        self.json({"name": self.user, "type": "user", "orgs": orgs, "auth": {"accessToken": {"role": self.hub.role}}})

    def on_create(self) -> None:
        asked = json.loads(self.body)
        owner, kind = asked.get("organization") or self.user, f"{asked.get('type', 'model')}s"
        repo = f"{kind}/{owner}/{asked['name']}"
        if not self.may_write(owner):
            return
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{owner}/{asked['name']}"
        with self.hub.lock:
            there = repo in self.hub.repos
            if not there:
                self.hub.commit(repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
                self.hub.created.append(repo)
                self.hub.private |= {repo} if asked.get("visibility") == "private" else set()
        said = {"error": "You already created this repo"} if there else {}
        self.json({**said, "url": url}, 409 if there else 200)

    def on_validate(self) -> None:
        text = json.loads(self.body)["content"]
        try:
            yaml.safe_load(text.split("---\n")[1])
            self.json({"errors": [], "warnings": []})
        except (yaml.YAMLError, IndexError) as e:
            self.json({"errors": [{"message": str(e)}], "warnings": []}, 400)

    def on_preupload(self, kind: str, name: str) -> None:
        if not self.may_write(name.partition("/")[0]):
            return
        now = self.hub.files_now(f"{kind}/{name}")
        files = []
        for one in json.loads(self.body)["files"]:
            large = self.hub.is_large(one["path"], one["size"])
            oid = hashlib.sha256(now[one["path"]]).hexdigest() if large and one["path"] in now else None
            files.append({"path": one["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
            files[-1]["oid"] = oid
        self.json({"files": files})

    def on_batch(self, dataset: str | None, name: str) -> None:
        objects = []
        for one in json.loads(self.body)["objects"]:
            put = {"upload": {"href": f"{self.hub.url.replace('127.0.0.1', 'localhost')}/put/{one['oid']}"}}
            objects.append(one if one["oid"] in self.hub.objects else {**one, "actions": put})
        self.json({"transfer": "basic", "objects": objects})

    def on_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.error(400)
            return
        self.hub.objects[oid] = self.body
        self.hub.stored_bytes += len(self.body)
        self.json({})

    def on_commit(self, kind: str, name: str) -> None:
        repo = f"{kind}/{name}"
        if not self.may_write(name.partition("/")[0]):
            return
        with self.hub.lock:
            lines = [json.loads(line) for line in self.body.splitlines()]
            header = next(line["value"] for line in lines if line["key"] == "header")
            if header.get("parentCommit") not in (None, self.hub.heads[repo]):
                self.error(412, text="A commit has happened since. Please refresh and try again.")
                return
            files = dict(self.hub.files_now(repo))
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
            if self.hub.spoils in files:
                files[self.hub.spoils] += b"!"
            sha = self.hub.commit(repo, files)
            self.hub.committed.append((repo, [line["value"]["path"] for line in lines if line["key"] != "header"]))
        self.json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def on_collections(self) -> None:
        if self.command == "GET":
            owner = parse_qs(urlsplit(self.path).query)["owner"][0]
            mine = [one for slug, one in self.hub.collections.items() if slug.startswith(f"{owner}/")]
            listed = [{**one, "items": one["items"][:LISTED]} for one in mine]
            self.json([{key: value for key, value in one.items() if key != "position"} for one in listed])
            return
        asked = json.loads(self.body)
        if not self.may_write(asked["namespace"]):
            return
        number = self.hub.next_collection = self.hub.next_collection + 1
        slug = f"{asked['namespace']}/{asked['title'][:40]}-{number:024x}"
        found = {
            "slug": slug,
            "title": asked["title"],
            "owner": {"name": asked["namespace"]},
            "items": [],
            "position": 0,
        }
        found |= {"private": asked["private"], "theme": "blue", "upvotes": 0, "lastUpdated": "2026-01-01T00:00:00.000Z"}
        self.hub.collections[slug] = found
        self.json(found)

    def on_collection(self, slug: str) -> None:
        if slug not in self.hub.collections:
            self.error(404)
        elif self.command != "DELETE":
            self.json(self.hub.collections[slug])
        elif self.may_write(slug.partition("/")[0]):
            self.json(self.hub.collections.pop(slug))

    def on_collect(self, slug: str) -> None:
        item, items = json.loads(self.body)["item"], self.hub.collections[slug]["items"]
        if not self.may_write(slug.partition("/")[0]):
            return
        if f"{item['type']}s/{item['id']}" not in self.hub.repos:
            self.error(404)
        elif any((one["id"], one["type"]) == (item["id"], item["type"]) for one in items):
            self.json({"error": "Item already in collection"}, 409)
        else:
            items.append({"_id": f"{len(items):024x}", "id": item["id"], "type": item["type"], "position": len(items)})
            self.json(self.hub.collections[slug])
