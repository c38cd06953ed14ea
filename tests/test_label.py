"""The labelling page: a log that loses nothing, comparisons for experiments.reward, and a server for this machine alone."""

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from configs import label as config_of
from experiments import common, label, reward
from experiments.settings import RULES, check
from jaxalign.data import text
from jaxalign.feedback import labels
from jaxalign.train import log

ROOT = Path(__file__).parents[1]
HOSTILE = '<img src=x onerror="window.broken=1"><script>window.broken=1</script> &amp; \'it\' "too"'
PAIRS = {name: {"prompt": f"asked {name}", "first": f"one {name}", "second": f"two {name}"} for name in "abc"}


def said(name, prefers, margin="better", *, annotator="me", swapped=False, seconds=1.0):
    about = {"id": name, "annotator": annotator, "prefers": prefers, "margin": margin}
    return about | {"swapped": swapped, "seconds": seconds}


# ------------------------------------------------------------------------------------------- what comes of labels


def test_the_last_word_of_an_annotator_counts_and_undo_takes_it_back():
    lines = [said("a", "first"), said("a", "second", annotator="you"), said("b", "tie"), said("a", "second"), said("b", "undo")]
    assert labels.standing(lines) == [lines[1], lines[3]]


def test_votes_are_shares_and_margins_are_means_of_what_was_said():
    found = [
        *(said("a", "second", margin, annotator=x) for x, margin in (("x", "significantly better"), ("y", "slightly better"))),
        said("a", "first", "better", annotator="z"),
        *(said("b", prefers, annotator=prefers) for prefers in ("first", "second", "skip")),
        said("gone", "first"),
    ]
    one, other = labels.votes(PAIRS, found)
    assert (one["chosen"], one["rejected"], one["prompt"], one["votes"]) == ("two a", "one a", "asked a", 3)
    assert (one["won"], one["lost"], one["tied"]) == (2 / 3, 1 / 3, 0)
    assert one["margin"] == pytest.approx((1 + 1 / 3 - 2 / 3) / 3) and one["how_much"] == "slightly better"
    assert (other["chosen"], other["won"], other["lost"], other["margin"]) == ("one b", 0.5, 0.5, 0)


def test_agreement_is_that_of_published_examples():
    """Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", examples A (0.095) and C (0.743)."""
    two = ["01", "11", "01", "00", "00", "01", "00", "00", "10", "00"]
    found = labels.agreement(two)
    assert found["share"] == 0.6 and found["alpha"] == pytest.approx(0.095, abs=5e-4)
    four = ["111", "2223", "3333", "3333", "2222", "1234", "4444", "1112", "2222", "555", "11", "3"]
    assert labels.agreement(four)["alpha"] == pytest.approx(0.743, abs=5e-4)
    assert labels.agreement(["a", ""]) == {} and np.isnan(labels.agreement(["aa", "aa"])["alpha"])


def test_the_summary_counts_places_and_not_only_responses():
    """Who always takes place 1 has a rate of 1 there, and about a half of each response."""
    found = [said("a", "first"), said("b", "second", swapped=True, seconds=9), said("c", "skip")]
    told = labels.summary(PAIRS, [*found, said("gone", "first")], labels.votes(PAIRS, found))
    assert told["place_1/rate"] == 1 and told["first/rate"] == 0.5 and told["seconds_a_label"] == 5
    counts = {"pairs": 3, "judged": 2, "comparisons": 2, "labels": 2, "skipped": 1, "annotators": 1}
    assert told.items() >= counts.items() and labels.summary(PAIRS, [], []).keys() == counts.keys()


def test_the_place_is_drawn_by_seed_annotator_and_pair():
    drawn = {(seed, who): [labels.swapped(seed, who, str(n)) for n in range(400)] for seed in (0, 1) for who in ("a", "b")}
    assert all(160 < sum(places) < 240 for places in drawn.values()) and len({tuple(places) for places in drawn.values()}) == 4


@pytest.mark.parametrize("choice, response", [("1", 0), ("2", 1)])
def test_a_choice_is_of_the_response_that_stood_there(choice, response):
    for name in PAIRS:
        shown = label.state({name: PAIRS[name]}, [], seed=3, annotator="me")["pair"]
        line = labels.label(PAIRS, {"id": name, "choice": choice, "margin": "better", "seconds": 2}, seed=3, annotator="me")
        assert PAIRS[name][line["prefers"]] == shown["responses"][response]


def test_a_torn_line_takes_no_label_with_it(tmp_path):
    path = tmp_path / "labels.jsonl"
    labels.append(path, said("a", "first"))
    path.write_bytes(path.read_bytes() + b'{"id": "b", "pref')
    labels.append(path, said("c", "tie"))
    assert [line["id"] for line in log.read_lines(path)] == ["a", "c"]


# ------------------------------------------------------------------------------------------- where pairs come from


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def compared(count):
    """Rows as experiments.compare writes them, by the tokenizer of the generated reviews, and that tokenizer."""
    tokenizer, rows = common.TOKENIZERS["reviews"](), []
    for n in range(count):
        ids = {"prompt": [12 + n, 20], "chosen": [30 + n, 31, 32], "rejected": [33, 30 + n]}
        row = {side: tokenizer.decode(x, skip_special_tokens=True) for side, x in ids.items()}
        rows.append(
            row | {f"{side}_ids": x for side, x in ids.items()} | {"gold_chosen": 1.5, "gold_rejected": 0.5, "ceiling": 0.9}
        )
    return rows, tokenizer


ROWS = {"count": 0, "prompt": "{prompt}", "first": "{chosen}", "second": "{rejected}"}


def test_pairs_are_those_that_differ_and_once(tmp_path):
    rows = [{"prompt": "p", "chosen": a, "rejected": b} for a, b in (("x", "y"), ("x", "y"), ("x", " x"), ("y", "x"))]
    found = label.pairs(source=written(tmp_path / "rows.jsonl", rows), **ROWS)
    assert [(pair["first"], pair["second"]) for pair in found.values()] == [("x", "y"), ("y", "x")]
    with pytest.raises(ValueError, match=r"rows.jsonl, row 0: '{ours}'"):
        label.pairs(source=str(tmp_path / "rows.jsonl"), **ROWS | {"first": "{ours}"})
    with pytest.raises(ValueError, match="nothing to prefer"):
        label.pairs(source=written(tmp_path / "same.jsonl", rows[2:3]), **ROWS)


def test_the_section_of_the_config_is_what_pairs_takes():
    for variant in config_of.VARIANTS:
        config = config_of.get_config(variant)
        check(config)
        assert set(config.pairs) == set(inspect.signature(label.pairs).parameters)
        assert log.flat(config.to_dict()).keys() <= RULES.keys()


# -------------------------------------------------------------------------------------------------------- over HTTP


class Served:
    """A server in a thread, and a page that speaks to it."""

    def __init__(self, workdir, source, **given):
        config = config_of.get_config()
        config.pairs.source = source
        config.update(given)
        workdir.mkdir(exist_ok=True)
        self.workdir, (self.server, self.address) = workdir, label.serve(config, workdir)
        self.url, _, self.token = self.address.partition("#")
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def ask(self, path="pair", sent=None, **headers):
        """-> (status, what was said)"""
        return ask(self.url + path, sent, **{"X-Token": self.token} | headers)

    def label(self, choice, margin="better", name=None):
        name = name or self.ask()[1]["pair"]["id"]
        return self.ask("label", {"id": name, "choice": choice, "margin": margin, "seconds": 1.5})

    def lines(self, name="labels"):
        return log.read_lines(self.workdir / f"{name}.jsonl")

    def end(self):
        self.server.shutdown()
        self.server.server_close()


def ask(url, sent=None, **headers):
    headers = {name.replace("_", "-"): x for name, x in headers.items()}
    data = sent if sent is None or isinstance(sent, bytes) else json.dumps(sent).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=20) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.fixture
def serve(tmp_path):
    made = []

    def start(rows, **given):
        source = written(tmp_path / "rows.jsonl", rows) if isinstance(rows, list) else rows
        made.append(Served(tmp_path / "run", source, **given))
        return made[-1]

    yield start
    for served in made:
        served.end()


def test_the_page_is_told_the_texts_and_nothing_else(serve):
    rows, _ = compared(3)
    status, told = serve(rows).ask()
    assert status == 200 and told.keys() == {"done", "left", "seconds", "last", "pair", "folder"}
    assert told["pair"].keys() == {"id", "prompt", "responses"} and told["pair"]["prompt"] == rows[0]["prompt"]
    assert {*told["pair"]["responses"]} == {rows[0]["chosen"], rows[0]["rejected"]}


def test_labels_go_to_comparisons_that_a_reward_model_reads_by_the_ids_that_were_written(serve):
    rows, tokenizer = compared(6)
    served = serve(rows)
    for choice in ("1", "2", "tie", "skip", "1", "2"):
        served.label(choice, "significantly better")
    assert served.ask()[1]["pair"] is None and served.ask()[1]["seconds"] == 1.5
    data = {"source": str(served.workdir), "count": 0, "held_out": 1, "length": 16, "source_length": 0, "chat": False}
    data |= {"prompt": "{prompt}", "chosen": "{chosen}", "rejected": "{rejected}"}
    source = reward.compare.rows_in(data["source"])
    for margin in ({"margin": "{margin}"}, {"margin": "{how_much}", "margins": "small"}):
        train, held_out = reward.comparisons(tokenizer, len(tokenizer), **data | margin | {"source": source})
        found = [*train, *held_out]
        assert len(found) == 4 and all(row["margin"] == 1 for *_, row in found)
    by_text = {row["prompt"]: row for row in rows}
    for chosen, rejected, row in found:
        made, old = [chosen, rejected], by_text[row["prompt"]]
        ids = [old[f"{'chosen' if row[side] == old['chosen'] else 'rejected'}_ids"] for side in ("chosen", "rejected")]
        assert all((a.tokens == text.of_ids(old["prompt_ids"], b, vocab=99).tokens).all() for a, b in zip(made, ids, strict=True))
    train, held_out = reward.votes(
        tokenizer, len(tokenizer), won="{won}", tied="{tied}", **data | {"source": str(served.workdir / "votes.jsonl")}
    )
    assert [row["tied"] for *_, row in [*train, *held_out]] == [0, 0, 1, 0, 0]
    assert not {"gold_chosen", "ceiling"} & row.keys()  # which are of another annotator


def test_undo_goes_back_and_another_annotator_starts_anew(serve):
    served = serve(compared(3)[0])
    first = served.ask()[1]["pair"]["id"]
    second = served.label("1")[1]["pair"]["id"]
    assert served.label("undo", name=first)[1]["pair"]["id"] == first != second
    assert served.ask()[1]["last"] is None and not served.lines("votes")
    served.label("skip")
    assert served.ask()[1]["done"] == 1 and served.ask()[1]["pair"]["id"] == second
    other = serve(str(served.workdir.parent / "rows.jsonl"), annotator="you")
    assert other.ask()[1]["done"] == 0 and other.ask()[1]["last"] is None
    other.label("tie")
    assert [line["annotator"] for line in served.lines()] == ["me", "me", "me", "you"] and len(served.lines("votes")) == 1


def test_another_site_another_name_and_who_has_no_token_are_refused(serve):
    served = serve(compared(2)[0])
    told = {"id": served.ask()[1]["pair"]["id"], "choice": "1", "margin": "better", "seconds": 1}
    assert served.server.server_address[0] == "127.0.0.1"
    port = served.server.server_port
    for headers in (
        {"X-Token": "guess"},
        {"X-Token": "é"},
        {"Host": f"evil.example:{port}"},
        {"Host": "evil.example"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{port + 1}"},
    ):
        assert served.ask("label", told, **headers)[0] == 403 and served.ask(**headers)[0] == 403
    assert ask(served.url, Host=f"evil.example:{port}")[0] == 403 and not served.lines()
    assert served.ask("label", told, Origin=served.url[:-1])[0] == 200
    assert served.ask(Host=f"localhost:{port}")[0] == 200


@pytest.mark.parametrize(
    "sent, says",
    [
        (b"{", "no label"),
        (b"[]", "no label"),
        ({"id": "nobody"}, "no pair 'nobody'"),
        ({"id": ["a"]}, "no label"),
        ({"choice": "first"}, "choice 'first'"),
        ({"margin": "much"}, "margin 'much'"),
        ({"seconds": -1}, "seconds -1"),
        ({"seconds": True}, "seconds True"),
        (b'{"seconds": NaN}', "no pair None"),
    ],
)
def test_what_is_no_label_is_not_written(serve, sent, says):
    served = serve(compared(2)[0])
    if isinstance(sent, dict):
        sent = {"id": served.ask()[1]["pair"]["id"], "choice": "1", "margin": "better", "seconds": 1} | sent
    status, told = served.ask("label", sent)
    assert status == 400 and says in told["error"] and not served.lines()


def test_a_label_that_cannot_be_written_is_said_so(serve):
    served = serve(compared(2)[0])
    (served.workdir / "labels.jsonl").symlink_to(served.workdir / "nowhere" / "x")
    status, told = served.label("1")
    assert status == 500 and "could not be written" in told["error"]


def test_the_page_loads_nothing_and_is_not_kept(serve):
    served = serve(compared(2)[0])
    with urllib.request.urlopen(served.url, timeout=20) as reply:
        page, headers = reply.read().decode(), reply.headers
    assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["Cache-Control"] == "no-store"
    assert "://" not in page and "innerHTML" not in page and served.token not in page
    assert served.ask("label.py")[0] == served.ask("../label.py")[0] == 404


def command(workdir, source):
    """A run of the command, and the address that it prints."""
    given = [f"--config.pairs.source={source}", f"--workdir={workdir}"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": ""}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and all below them
    run = subprocess.Popen(
        [sys.executable, "-u", "-m", "experiments.label", *given], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, before)
    for line in run.stdout:
        if "http://" in line:
            return run, line.split()[-1].partition("#")
    raise AssertionError("no address was printed")


def test_a_killed_run_loses_no_label_and_goes_on_with_the_next_pair(tmp_path):
    source = written(tmp_path / "rows.jsonl", compared(4)[0])
    for begin in (0, 2):
        run, (url, _, token) = command(tmp_path / "run", source)
        try:
            told = ask(url + "pair", X_Token=token)[1]
            assert told["done"] == begin
            for _ in range(2):
                sent = {"id": told["pair"]["id"], "choice": "1", "margin": "better", "seconds": 1}
                told = ask(url + "label", sent, X_Token=token)[1]
            run.send_signal(signal.SIGINT if begin else signal.SIGKILL)
            assert run.wait(20) == (130 if begin else -9)
        finally:
            run.kill()
            run.stdout.close()
    assert told["pair"] is None and log.read_json(tmp_path / "run" / "summary.json")["comparisons"] == 4


# ----------------------------------------------------------------------------------------------- in a real browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium and chromedriver are installed")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    quiet = "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync"
    for flag in ("headless", "no-sandbox", "disable-gpu", *quiet, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


RIGHT, LEFT, SHIFT, CONTROL = "\ue014", "\ue012", "\ue008", "\ue009"  # as WebDriver has them


def wait(browser, holds):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20, 0.02).until(lambda _: holds())


def shown(browser, name):
    return browser.find_element("id", name).get_property("textContent")


def typed(browser, keys, hold=""):
    from selenium.webdriver.common.action_chains import ActionChains

    chain = ActionChains(browser)
    (chain.key_down(hold).send_keys(keys).key_up(hold) if hold else chain.send_keys(keys)).perform()


def press(browser, served, keys, hold=""):
    """Press keys, and wait until the label that they make is there and the next pair is shown. -> its line"""
    before, told = len(served.lines()), shown(browser, "progress")
    typed(browser, keys, hold)
    wait(browser, lambda: len(served.lines()) > before and shown(browser, "progress") != told)
    return served.lines()[-1]


def opened(browser, served):
    browser.get("about:blank")  # else another token of the same address would load nothing
    browser.get(served.address)
    wait(browser, lambda: shown(browser, "progress"))


def test_keys_label_and_the_place_that_was_seen_is_the_one_that_counts(browser, serve):
    served = serve(compared(11)[0])
    opened(browser, served)
    pairs = label.pairs(source=str(served.workdir.parent / "rows.jsonl"), **ROWS)
    for keys, hold, place, margin in (
        ("1", "", 1, "better"),
        (RIGHT, "", 2, "better"),
        (LEFT, SHIFT, 1, "significantly better"),
        ("-2", "", 2, "slightly better"),
        ("+" + LEFT, "", 1, "significantly better"),
        ("++1", "", 1, "better"),
    ):
        wanted = shown(browser, f"response-{place}")
        line = press(browser, served, keys, hold)
        assert (pairs[line["id"]][line["prefers"]].strip(), line["margin"]) == (wanted, margin), keys
    assert press(browser, served, "0")["prefers"] == press(browser, served, " ")["prefers"] == "tie"
    assert press(browser, served, "s")["prefers"] == "skip"
    assert shown(browser, "progress").startswith("9 done · 2 left")
    prompt = shown(browser, "prompt")
    undone = press(browser, served, "u")
    assert undone["prefers"] == "undo" and shown(browser, "prompt") != prompt
    typed(browser, "x")
    typed(browser, "1", CONTROL)  # neither is a label
    browser.refresh()
    wait(browser, lambda: shown(browser, "progress").startswith("8 done"))
    browser.find_element("id", "choose-2").click()  # the skipped one
    wait(browser, lambda: shown(browser, "progress").startswith("9 done"))
    assert press(browser, served, " ")["prefers"] == "tie"  # and not the button once more
    press(browser, served, "1")
    assert browser.find_element("id", "end").is_displayed() and not browser.find_element("id", "pair").is_displayed()
    assert [line["prefers"] for line in labels.standing(served.lines())].count("tie") == 3


def test_texts_are_shown_as_they_are_and_nothing_is_loaded(browser, serve):
    rows = [{"prompt": HOSTILE, "chosen": f"{HOSTILE}\n  1", "rejected": ""}] * 2
    opened(browser, serve(rows))
    wait(browser, lambda: shown(browser, "prompt"))
    assert shown(browser, "prompt") == HOSTILE and {shown(browser, f"response-{n}") for n in (1, 2)} == {f"{HOSTILE}\n  1", ""}
    assert browser.execute_script("return [window.broken || 0, document.images.length]") == [0, 0]
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => new URL(entry.name).host)")
    assert {*loaded} <= {browser.execute_script("return location.host")} and not browser.get_log("browser")


def test_it_fits_a_phone_follows_the_dark_and_has_names_for_a_screen_reader(browser, serve):
    opened(browser, serve([{"prompt": "p " * 300, "chosen": "x" * 400, "rejected": "y " * 300}]))
    seen = {}
    for scheme in ("light", "dark"):
        emulated = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", emulated)
        seen[scheme] = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert seen["light"] != seen["dark"]
    wide = {"width": 320, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", wide)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 320
    one, other = (browser.find_element("id", f"response-{n}").rect for n in (1, 2))
    assert one["x"] == other["x"] and other["y"] >= one["y"] + one["height"]  # one below the other
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    one, other = (browser.find_element("id", f"response-{n}").rect for n in (1, 2))
    assert other["x"] >= one["x"] + one["width"]
    controls = browser.find_elements("css selector", "main section, button, input, progress, [role=group]")
    assert len(controls) >= 12 and all(control.accessible_name for control in controls if control.is_displayed())
    assert browser.switch_to.active_element.get_attribute("id") == "main"


def test_a_server_that_is_gone_is_said_and_the_pair_stays(browser, serve):
    served = serve(compared(3)[0])
    opened(browser, served)
    press(browser, served, "1")
    prompt = shown(browser, "prompt")
    served.end()
    typed(browser, "2")
    wait(browser, lambda: "does not answer" in shown(browser, "wrong"))
    assert shown(browser, "prompt") == prompt and len(served.lines()) == 1
    again = serve(str(served.workdir.parent / "rows.jsonl"), port=served.server.server_port)
    typed(browser, "2")
    wait(browser, lambda: "open the address" in shown(browser, "wrong"))
    opened(browser, again)
    assert shown(browser, "prompt") == prompt and shown(browser, "progress").startswith("1 done")
