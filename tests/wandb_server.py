"""A stand-in for the W&B server on 127.0.0.1, for the real client: command line and wandb-core.

It answers what wandb 0.31 asks when it makes a sweep, runs an agent, logs runs and syncs folders,
and keeps everything in memory. What it does not know is an HTTP error and lands in `unknown`.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

ENTITY = "loopback"
KEY = "0123456789" * 4  # what a client is given as its API key


@dataclass
class Run:
    """What arrived of one run."""

    id: str
    project: str
    sweep: str | None = None
    name: str | None = None
    config: dict[str, Any] = field(default_factory=dict)  # without W&B's `{"value": ...}`
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)  # name -> content
    exit_code: int | None = None  # None while it runs
    lines: dict[str, list[str]] = field(default_factory=dict)  # of the files that are streamed


@dataclass
class Sweep:
    """What `wandb sweep` sent, and the trials handed out for it."""

    id: str
    project: str
    text: str  # the sweep file as the client wrote it, YAML
    waiting: Iterator[Mapping[str, Any]]  # the trials still to be handed out
    trials: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # run id -> name -> value
    state: str = "RUNNING"

    @property
    def config(self) -> dict[str, Any]:
        return yaml.safe_load(self.text)


@dataclass
class Artifact:
    """A table or a file of a run; `files` holds what it is made of, the manifest included."""

    name: str
    type: str
    run: str
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False


class WandbServer:
    """Context manager around the server; tests read `sweeps`, `runs` and `artifacts` afterwards.

    Args:
        stop: is asked at each heartbeat of an agent about each run that it has; True stops the
            run, as W&B's early termination does.
        at_once: trials that an agent is given in one heartbeat. W&B gives 1; an agent starts all
            that it gets.
        trials: the content of a sweep file -> name -> value of each trial, in order.
    """

    def __init__(
        self,
        stop: Callable[[Run], bool] = lambda run: False,
        at_once: int = 1,
        trials: Callable[[Mapping[str, Any]], Iterable[Mapping[str, Any]]] | None = None,
    ) -> None:
        self.stop, self.at_once, self.trials = stop, at_once, trials or grid_trials
        self.sweeps: dict[str, Sweep] = {}
        self.runs: dict[str, Run] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.agents: dict[str, str] = {}  # id -> sweep
        self.stopped: list[str] = []  # runs that an agent was told to stop, once each
        self.operations: list[str] = []  # GraphQL, in order
        self.unknown: list[str] = []
        self.lock = threading.RLock()
        server = self

        class Handler(_Handler):
            def __init__(self, *arguments: Any) -> None:
                self.wandb = server
                super().__init__(*arguments)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> WandbServer:
        serve = partial(self._http.serve_forever, poll_interval=0.05)
        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(10)

    def answer(self, operation: str, variables: Mapping[str, Any]) -> dict[str, Any] | None:
        """The `data` of a GraphQL answer; None for what cannot be answered here."""
        with self.lock:
            self.operations.append(operation)
            try:
                return getattr(self, f"_on_{operation}")(**variables)
            except Exception as error:  # the client would ask again and again
                self.unknown.append(f"{operation}: {error!r}")
                return None

    def stream(self, run_id: str, body: Mapping[str, Any]) -> None:
        """Take a piece of a run's history, summary and console; see `FileStream` in wandb-core."""
        with self.lock:
            run = self.runs[run_id]
            for name, piece in body.get("files", {}).items():
                lines = run.lines.setdefault(name, [])
                lines[piece["offset"] :] = piece["content"]
            run.history = [json.loads(line) for line in run.lines.get("wandb-history.jsonl", [])]
            for line in run.lines.get("wandb-summary.json", []):
                run.summary = json.loads(line)
            if body.get("complete"):
                run.exit_code = body["exitcode"]

    def store(self, path: str, content: bytes) -> None:
        """Keep an uploaded file; `path` is what `_address` made."""
        kind, owner, name = path.split("/", 2)
        with self.lock:
            self._owner(kind, owner).files[name] = content

    def _owner(self, kind: str, owner: str) -> Run | Artifact:
        return self.runs[owner] if kind == "run" else self.artifacts[owner]

    def _address(self, kind: str, owner: str, name: str) -> str:
        return f"{self.url}/storage/{kind}/{owner}/{name}"

    # Who is there.

    def _on_Viewer(self, **_: Any) -> dict[str, Any]:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        user = {"id": "user", "entity": ENTITY, "username": ENTITY, "email": "", "name": ENTITY}
        return {"viewer": {**user, "flags": "{}", "teams": teams, "admin": False}}

    def _on_ServerFeaturesQuery(self, **_: Any) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    # Sweeps and agents.

    def _on_UpsertSweep(self, projectName: str, config: str, **_: Any) -> dict[str, Any]:
        waiting = iter(self.trials(yaml.safe_load(config)))
        sweep = Sweep(f"sweep{len(self.sweeps) + 1:03d}", projectName, config, waiting)
        self.sweeps[sweep.id] = sweep
        answer = {"name": sweep.id, "project": _project(sweep.project)}
        return {"upsertSweep": {"sweep": answer, "configValidationWarnings": []}}

    def _on_SweepWithRuns(self, sweep: str, **_: Any) -> dict[str, Any]:
        if sweep not in self.sweeps:
            return {"project": {"sweep": None}}
        found = self.sweeps[sweep]
        about = {"id": found.id, "name": found.id, "config": found.text, "state": found.state}
        about |= {"method": found.config["method"], "controller": None, "scheduler": None}
        return {"project": {"sweep": {**about, "runs": {"edges": []}}}}

    def _on_CreateAgent(self, sweep: str, **_: Any) -> dict[str, Any]:
        agent = f"agent{len(self.agents) + 1}"
        self.agents[agent] = sweep
        return {"createAgent": {"agent": {"id": agent}}}

    def _on_Heartbeat(self, id: str, runState: str, **_: Any) -> dict[str, Any]:
        running, sweep = json.loads(runState), self.sweeps[self.agents[id]]
        commands = []
        for run_id in running:
            if run_id in self.runs and (run_id in self.stopped or self.stop(self.runs[run_id])):
                commands.append({"type": "stop", "run_id": run_id})  # until the run is over
                if run_id not in self.stopped:
                    self.stopped.append(run_id)
        if sweep.state == "CANCELED":  # an agent then kills what it runs
            commands = [{"type": "exit"}]
        elif not running:
            commands = self._next_commands(sweep)
        return {"agentHeartbeat": {"agent": {"id": id}, "commands": json.dumps(commands)}}

    def _next_commands(self, sweep: Sweep) -> list[dict[str, Any]]:
        commands = []
        while len(commands) < self.at_once and sweep.state == "RUNNING":
            values = next(sweep.waiting, None)
            if values is None:
                sweep.state = "FINISHED"
                break
            run_id = f"{sweep.id}-{len(sweep.trials) + 1:03d}"
            sweep.trials[run_id] = values
            arguments = {name: {"value": value} for name, value in values.items()}
            program = sweep.config.get("program")
            commands.append(
                {"type": "run", "run_id": run_id, "program": program, "args": arguments}
            )
        return commands or [{"type": "exit"}]

    # Runs.

    def _on_RunResumeStatus(self, name: str, project: str, **_: Any) -> dict[str, Any]:
        if name in self.runs:
            raise NotImplementedError("going on with a run that is known here")
        return {"model": {**_project(project), "bucket": None}}

    def _on_UpsertBucket(self, name: str, project: str, **given: Any) -> dict[str, Any]:
        inserted = name not in self.runs
        run = self.runs.setdefault(name, Run(name, project))
        run.sweep = given.get("sweep") or run.sweep
        run.name = given.get("displayName") or run.name
        if given.get("config"):
            config = json.loads(given["config"])
            run.config |= {key: item["value"] for key, item in config.items()}
        bucket = {"id": run.id, "name": run.id, "displayName": run.name, "config": None}
        bucket |= {"description": None, "sweepName": run.sweep, "project": _project(project)}
        bucket["historyLineCount"] = len(run.history)
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _on_CreateRunFiles(self, run: str, files: list[str], **_: Any) -> dict[str, Any]:
        rows = [{"name": name, "uploadUrl": self._address("run", run, name)} for name in files]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": rows}}

    def _on_OrganizationCoreWeaveOrganizationID(self, **_: Any) -> dict[str, Any]:
        return {"entity": {"organization": None}}

    # Artifacts: tables come as such.

    def _on_ArtifactType(self, **_: Any) -> dict[str, Any]:
        return {"project": {"artifact": None}}  # none has this name yet

    def _on_CreateArtifact(self, input: Mapping[str, Any]) -> dict[str, Any]:
        artifact_id = f"artifact{len(self.artifacts) + 1}"
        self.artifacts[artifact_id] = Artifact(
            input["artifactCollectionName"], input["artifactTypeName"], input["runName"]
        )
        about = {
            "id": artifact_id,
            "state": "PENDING",
            "artifactSequence": {"latestArtifact": None},
        }
        return {"createArtifact": {"artifact": about}}

    def _on_CreateArtifactFiles(self, input: Mapping[str, Any]) -> dict[str, Any]:
        edges = []
        for spec in input["artifactFiles"]:
            owner, name = spec["artifactID"], spec["name"]
            node = {
                "storagePath": name,
                "uploadUrl": self._address("artifact", owner, name),
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": owner},
            }
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _on_CreateArtifactManifest(self, artifactID: str, **_: Any) -> dict[str, Any]:
        address = self._address("artifact", artifactID, "wandb_manifest.json")
        file = {"id": artifactID, "uploadUrl": address, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": artifactID, "file": file}}}

    def _on_CommitArtifact(self, artifactID: str) -> dict[str, Any]:
        self.artifacts[artifactID].committed = True
        return {"commitArtifact": {"artifact": {"id": artifactID, "digest": ""}}}


class _Handler(BaseHTTPRequestHandler):
    """HTTP: GraphQL, the stream of a run's lines, and uploads."""

    protocol_version = "HTTP/1.1"  # wandb-core keeps its connections
    wandb: WandbServer

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client may end with its connection open
            super().handle()

    def do_POST(self) -> None:
        body = self._body()
        path = urlsplit(self.path).path
        if path == "/graphql":
            request = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])[1]
            data = self.wandb.answer(operation, request.get("variables") or {})
            if data is None:
                self._reply(400, {"errors": [{"message": self.wandb.unknown[-1]}]})
            else:
                self._reply(200, {"data": data})
        elif found := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path):
            self.wandb.stream(unquote(found[1]), json.loads(body))
            self._reply(200, {})
        else:
            self._refuse()

    def do_PUT(self) -> None:
        content = self._body()
        if (path := urlsplit(self.path).path).startswith("/storage/"):
            self.wandb.store(unquote(path).removeprefix("/storage/"), content)
            self._reply(200, {})
        else:
            self._refuse()

    def do_GET(self) -> None:
        self._refuse()

    def _refuse(self) -> None:
        self.wandb.unknown.append(f"{self.command} {self.path}")
        self._reply(404, {"errors": [{"message": "not known here"}]})

    def _body(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        return content

    def _reply(self, status: int, content: Mapping[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


def _project(name: str) -> dict[str, Any]:
    return {"id": name, "name": name, "entity": {"id": ENTITY, "name": ENTITY}}


def grid_trials(sweep: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """W&B's grid: names in the order of the alphabet, the last one changes fastest.

    Nested `parameters:` give a mapping as the value, as W&B's server sends them.
    """
    if sweep.get("method", "grid") != "grid":
        raise NotImplementedError(f"the server makes grids only, not {sweep['method']}")
    about = dict(sorted(sweep["parameters"].items()))
    choices = [
        list(grid_trials(item)) if "parameters" in item else item.get("values") or [item["value"]]
        for item in about.values()
    ]
    for values in itertools.product(*choices):
        yield dict(zip(about, values, strict=True))
