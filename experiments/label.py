"""A page on this machine, where people prefer one of two responses: python -m experiments.label --config=configs/label.py

It shows neither which response is which nor any score. Each label is on the disk, in labels.jsonl, before the next pair is shown:
a run that is killed goes on with the next pair. Several annotators are several runs in one workdir, or their labels.jsonl one
behind the other. Leaves, anew with each label, what experiments.reward reads: comparisons.jsonl, the pairs of which one response is
preferred, and votes.jsonl, those with as many votes for each besides; and summary.json.

The server is for this machine alone: bound to loopback, it answers to that name only (against DNS rebinding), and, but for the
empty page, to who has the token of the address that was printed.
"""

import base64
import hashlib
import json
import re
import secrets
import statistics
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from experiments import common, compare, launch
from jaxalign.data import text
from jaxalign.evaluation import records
from jaxalign.feedback import labels
from jaxalign.models import files
from jaxalign.prompts import template
from jaxalign.train import log

HOST = "127.0.0.1"
PAGE = Path(__file__).with_name("label.html").read_bytes()
SCRIPT = base64.b64encode(hashlib.sha256(re.search(rb"<script>(.*?)</script>", PAGE, re.DOTALL)[1]).digest()).decode()
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": f"default-src 'none'; script-src 'sha256-{SCRIPT}'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
LONGEST = 4096  # bytes of what a page may say


def pairs(*, source: str, count: int, prompt: str, first: str, second: str) -> dict[str, dict]:
    """{id: {"prompt", "first", "second"}}; of the rows of experiments.compare with the ids that the model wrote, as "first_ids".

    A pair that came before, or whose responses read the same, is left out. ValueError where none is left.
    Args: source, count: of common.read_rows, or a folder that experiments.compare left; the rest: filled by each row's columns.
    """

    def make(row):
        pair = {name: text.fill(x, row) for name, x in (("prompt", prompt), ("first", first), ("second", second))}
        ids = {row["chosen"]: row["chosen_ids"], row["rejected"]: row["rejected_ids"]} if "chosen_ids" in row else {}
        if pair["prompt"] == row.get("prompt") and {pair["first"], pair["second"]} == ids.keys():
            pair |= {"prompt_ids": row["prompt_ids"], "first_ids": ids[pair["first"]], "second_ids": ids[pair["second"]]}
        return pair

    rows = template.each(make, common.read_rows(compare.rows_in(source), count, seed=0), f"{source}, row")
    unequal = [pair for pair in rows if pair["first"].strip() != pair["second"].strip()]
    found = {records.fingerprint(*(pair[name] for name in ("prompt", "first", "second"))): pair for pair in unequal}
    if not found:
        raise ValueError(f"{source}: the two responses of all {len(rows)} rows read the same; there is nothing to prefer")
    log.say(f"{source}: {len(found)} pairs; {len(rows) - len(unequal)} rows of equal responses, {len(unequal) - len(found)} twice")
    return found


def state(found: dict, said: list[dict], *, seed: int, annotator: str) -> dict:
    """What the page shows: how far this annotator is, and the next pair, None behind the last one. Args: said: labels.standing."""
    own = {label["id"]: label for label in said if label["annotator"] == annotator and label["id"] in found}
    next_one = next((name for name in found if name not in own), None)
    told = {"done": len(own), "left": len(found) - len(own), "last": next(reversed(own), None)}
    told["seconds"] = statistics.median([label["seconds"] for label in own.values()]) if own else None
    if next_one is None:
        return told | {"pair": None}
    pair = found[next_one]
    order = ("second", "first") if labels.swapped(seed, annotator, next_one) else ("first", "second")
    shown = {"id": next_one, "prompt": pair["prompt"].strip(), "responses": [pair[side].strip() for side in order]}
    return told | {"pair": shown}


def leave(workdir: Path, found: dict):
    """Write comparisons.jsonl, votes.jsonl and summary.json anew from the labels."""
    said = labels.standing(log.read_lines(workdir / "labels.jsonl"))
    rows = labels.votes(found, said)
    for name, these in (("votes", rows), ("comparisons", [row for row in rows if row["won"] > row["lost"]])):
        launch.write_rows(workdir / f"{name}.jsonl", these)
    told = labels.summary(found, said, rows) | {"sha256": files.sha256(workdir / "comparisons.jsonl")}
    log.write_json(workdir / "summary.json", told)


def serve(config, workdir: Path) -> tuple[ThreadingHTTPServer, str]:
    """The server, which does nothing before its serve_forever(), and the address of its page, with the token."""
    found, path, lock, token = pairs(**config.pairs), workdir / "labels.jsonl", threading.Lock(), secrets.token_urlsafe(24)
    who = {"seed": config.seed, "annotator": config.annotator}

    def reply(asked: str, headers, body: bytes):
        """-> (status, PAGE or what is said as JSON). Args: asked: such as "GET /"."""
        host, origin, known = (headers.get(name, "") for name in ("Host", "Origin", "X-Token"))
        if host.rpartition(":")[0] not in (HOST, "localhost") or origin not in ("", f"http://{host}"):
            return 403, {"error": f"this is http://{HOST} and no other place"}
        if asked == "GET /":
            return 200, PAGE
        if not secrets.compare_digest(known.encode(), token.encode()):
            return 403, {"error": "This page is not of the server that runs now: open the address that it printed."}
        with lock:
            if asked == "POST /label":
                labels.append(path, labels.label(found, json.loads(body), **who))
                leave(workdir, found)
            elif asked != "GET /pair":
                return 404, {"error": "there is no such page"}
            return 200, state(found, labels.standing(log.read_lines(path)), **who) | {"folder": str(workdir)}

    leave(workdir, found)
    log.write_json(workdir / "config.json", log.plain(config))
    server = ThreadingHTTPServer((HOST, config.port), partial(Handler, reply))
    return server, f"http://{HOST}:{server.server_port}/#{token}"


class Handler(BaseHTTPRequestHandler):
    """HTTP around reply(asked, headers, body) -> (status, bytes of a page, or JSON)."""

    timeout = 60  # seconds until a connection that says nothing is closed

    def __init__(self, reply, *connection):
        self.reply = reply
        super().__init__(*connection)

    def do_GET(self):
        length = self.headers.get("Content-Length", "0")
        body = self.rfile.read(min(int(length), LONGEST)) if length.isdecimal() else b""
        try:
            status, said = self.reply(f"{self.command} {self.path}", self.headers, body)
        except (ValueError, TypeError, AttributeError) as error:  # no JSON, or none of a label
            status, said = 400, {"error": f"this is no label: {error}"}
        except OSError as error:
            status, said = 500, {"error": f"The label could not be written: {error}"}
        kind, sent = ("text/html; charset=utf-8", said) if said is PAGE else ("application/json", json.dumps(said).encode())
        self.send_response(status)
        for name, x in (HEADERS | {"Content-Type": kind, "Content-Length": str(len(sent))}).items():
            self.send_header(name, x)
        self.end_headers()
        self.wfile.write(sent)

    do_POST = do_GET

    def log_message(self, *_):
        """Nothing: the page says what went wrong."""


def run(config, workdir: Path):
    """Serve the page until Ctrl-C."""
    server, address = serve(config, workdir)
    log.say(f"{config.annotator} labels at {address}\nCtrl-C ends; each label is written at once")
    try:
        server.serve_forever()
    finally:
        server.server_close()
        log.say("\n" + json.dumps(log.read_json(workdir / "summary.json"), indent=2))


if __name__ == "__main__":
    launch.main(run, "label")
